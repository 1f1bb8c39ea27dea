"""Faults that `megatrain verify` can plant in a layout, and which layouts each of them can reach.

Each one is an error that a parallel technique could have. `planting.py` plants them in the worker processes. A fault
that a layout does not use the code of can't reach it: there nothing is tried, and nothing is promised.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatrain.models.config import ModelConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size

Reach = Callable[[ModelConfig, ParallelConfig], bool]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its effect, and the layouts that it can reach."""

    effect: str
    rule: str
    """The layouts that it can reach, in words."""
    reaches: Reach
    """Tells whether it can reach a layout of a model."""


def _experts_sharing(layout: ParallelConfig) -> int:
    """Return the number of ranks that hold the same experts, or shards of them."""
    return layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp // layout.ep


FAULTS: dict[str, Fault] = {
    "dropped_gradient_sum": Fault(
        "the data-parallel ranks do not sum their gradients: each keeps its own",
        "dp_replicate · dp_shard · cp > 1",
        lambda model, layout: layout.dp_replicate * layout.dp_shard * layout.cp > 1,
    ),
    "dropped_expert_sum": Fault(
        "the ranks that hold the same experts do not sum the gradients of these",
        "ep > 1 and dp_replicate · dp_shard · cp · tp > ep: otherwise each expert is on one rank only",
        lambda model, layout: layout.ep > 1 and _experts_sharing(layout) > 1,
    ),
    "dropped_scatter_sum": Fault(
        "the tensor-parallel ranks do not sum their partial results: each keeps its own",
        "tp > 1",
        lambda model, layout: layout.tp > 1,
    ),
    "dropped_replicated_sum": Fault(
        "the tensor-parallel ranks do not sum the gradients of what they all hold, such as norms",
        "tp > 1",
        lambda model, layout: layout.tp > 1,
    ),
    "dropped_context_exchange": Fault(
        "attention uses a rank's own keys and values in place of those of the other context-parallel ranks",
        "cp > 1",
        lambda model, layout: layout.cp > 1,
    ),
    "dropped_tied_sum": Fault(
        "the first and the last pipeline stage do not sum the gradients of their copies of a tied embedding",
        "pp > 1 and model.tie_embeddings",
        lambda model, layout: layout.pp > 1 and model.tie_embeddings,
    ),
    "doubled_tokens": Fault(
        "one of the ranks that compute the loss divides it by twice the tokens of the global batch",
        "every layout",
        lambda model, layout: world_size(layout) > 1,
    ),
    "stale_shard": Fault(
        "one rank's weights are, after each optimizer step, what they were before",
        "every layout",
        lambda model, layout: world_size(layout) > 1,
    ),
    "stale_gather": Fault(
        "gathered weights outlive the optimizer step, so that the next one computes with the old values",
        "every layout: FSDP computes with a gathered copy even where nothing is sharded",
        lambda model, layout: world_size(layout) > 1,
    ),
    "wrong_gather_order": Fault(
        "gathered parts are concatenated in the reverse order of ranks",
        "tp > 1, or cp > 1 with cp_kind=all_gather",
        lambda model, layout: layout.tp > 1 or (layout.cp > 1 and layout.cp_kind == "all_gather"),
    ),
    "wrong_chunk_order": Fault(
        "context-parallel ranks get adjacent chunks of a sequence, not those that attention expects",
        "cp > 1",
        lambda model, layout: layout.cp > 1,
    ),
    "wrong_stage_order": Fault(
        "the pipeline stages between the first and the last hold their layers in reverse order",
        "pp > 1 and at least four stages in all (pp · stages_per_rank in the interleaved schedules, 2 · pp in the "
        "V-shaped ones)",
        lambda model, layout: layout.pp > 1 and layout.stages >= 4,
    ),
    "wrong_micro_batch_order": Fault(
        "the last pipeline stage compares each micro-batch with the targets of another one",
        "pp > 1",
        lambda model, layout: layout.pp > 1,
    ),
    "wrong_expert_rank": Fault(
        "tokens are sent to the experts of the next rank",
        "ep > 1",
        lambda model, layout: layout.ep > 1,
    ),
    "unscaled_expert": Fault(
        "the outputs of experts are summed without their routing weights",
        "ep > 1",
        lambda model, layout: layout.ep > 1,
    ),
}
"""Every fault by its name. dropped: a collective does not communicate; stale: values of the step before; wrong: an
order of ranks."""
