"""The objectives of a run other than likelihood, as the training step sees them.

Each is brought to one form: a factor on the cross entropy of every token, which makes the gradient that the objective
has. The factors come from a pass without gradients before the usual one, so every layout that trains on likelihood
trains on them too, pipelines included.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from megatrain.data.loader import Batch, StepBatch
from megatrain.parallel.apply import ParallelModel


@dataclass(frozen=True, slots=True)
class Weighed:
    """The batch of a step whose tokens have factors, and what the objective is at the present weights.

    `batch.valid_tokens` is what the sum of the tokens' losses is divided by.
    """

    batch: StepBatch
    sums: Tensor | None
    """`(1 + names,)` float64: this rank's share of the loss, and of each further metric; their sums over all ranks are
    the means of the global batch. None: the loss is what the pass itself finds, and there are no further ones."""


class Objective(Protocol):
    """What is minimized in place of the cross entropy of the targets."""

    names: tuple[str, ...]
    """Further metrics of a step."""
    eval_names: tuple[str, ...]
    """Those of a validation."""
    rounds: int
    """Updates that each step's batch is used for."""
    is_shared: bool
    """Whether all ranks read the same batches, and share them out themselves."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold of it, by name; a checkpoint is loaded into these."""
        ...

    def trained_tokens(self, batch: StepBatch) -> int:
        """Return how many tokens of the global batch the present step trains on."""
        ...

    def weigh(self, parallel: ParallelModel, batch: StepBatch, round_: int) -> Weighed:
        """Return this rank's batch with factors for update number `round_` of the step; all ranks call it together."""
        ...

    def validate(self, parallel: ParallelModel, batch: Batch) -> Tensor:
        """Return this rank's sums over `batch`: loss, further metrics, and number of what they are means over.

        All ranks call it together; where `is_shared`, with the same batch.
        """
        ...


@torch.no_grad()
def token_losses(parallel: ParallelModel, tensors: dict[str, Tensor | None]) -> Tensor:
    """Return each token's cross entropy, `(rows, seq)` of this rank's part of the sequence, on every pipeline rank.

    Args:
        tensors: by the names of the model's arguments, as `placing.on_device` returns them.
    """
    given = dict(tensors)
    if parallel.pipeline is None:
        losses: Tensor | None = parallel.models[0](given.pop("tokens"), **given, per_token=True)
    else:
        losses = parallel.pipeline.forward(given, per_token=True)
    targets = tensors["targets"]
    assert targets is not None
    found = torch.zeros(targets.shape, dtype=torch.float64, device=parallel.device)
    if losses is not None:
        found += losses
    if parallel.mesh is not None and parallel.cfg.pp > 1:
        dist.all_reduce(found, group=parallel.mesh.pp.get_group())
    return found


def document_sums(parallel: ParallelModel, values: Tensor, doc_ids: Tensor, count: int) -> Tensor:
    """Return the sums of `values` `(rows, seq)` over documents, `(rows, count)`, on every rank that has the rows.

    Args:
        doc_ids: `(rows, seq)` of the full sequence, of which `values` is this context-parallel rank's part.
    """
    own = parallel.shard_batch({"ids": doc_ids})["ids"]
    assert own is not None
    # Padding is a document of its own, after the last one.
    found = torch.zeros(len(values), count + 1, dtype=torch.float64, device=values.device)
    found.scatter_add_(1, own.clamp(max=count), values.to(torch.float64))
    if parallel.mesh is not None and parallel.cfg.cp > 1:
        dist.all_reduce(found, group=parallel.mesh.cp.get_group())
    return found[:, :count]
