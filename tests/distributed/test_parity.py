"""The layout is only a performance choice: every layout computes what one process computes, in float64.

The same samples, bitwise equal initial weights, and losses, gradient norms, gradients, weights and validation after
three steps of AdamW with clipping that agree to 1e-9: float64 rounds at 1e-16, sums in another order differ by some
1e-15, and Adam divides by numbers as small as 1e-3 of the gradients.
"""

from typing import Any

import numpy as np
import pytest
from layouts import in_layout, single

from megatrain.runtime.workers import WorkerPool
from megatrain.train.parity import Trace, relative_errors

BOUND = 1e-9
FACTOR = 3

CASES: list[tuple[str, dict[str, Any]]] = [
    # each axis alone, each ZeRO stage, each way of context parallelism
    *[("untied", {"dp_shard": 2, "zero_stage": stage}) for stage in range(4)],
    ("tied", {"dp_replicate": 2}),
    *[(name, {"tp": 2}) for name in ("untied", "tied", "gpt2")],
    *[("untied", {"cp": 2, "cp_kind": kind}) for kind in ("all_gather", "ring", "ulysses")],
    ("gpt2", {"cp": 2}),
    # each schedule; the embedding's two copies wherever the head is tied
    *[("tied", {"pp": 2, "pp_schedule": schedule}) for schedule in ("gpipe", "1f1b", "interleaved_1f1b")],
    *[
        (name, {"pp": 2, "pp_schedule": schedule, "zero_stage": 2})
        for schedule in ("interleaved_zero_bubble", "zbv", "dualpipe_v")
        for name in ("untied", "tied")
    ],
    *[
        ("tied", {"pp": 2, "pp_schedule": schedule, "activation_checkpointing": "selective"})
        for schedule in ("interleaved_zero_bubble", "zbv", "dualpipe_v")
    ],
    ("gpt2", {"pp": 2}),
    ("untied", {"pp": 2, "pp_split": (3,)}),
    # pairs
    ("untied", {"dp_replicate": 2, "dp_shard": 2}),
    ("tied", {"dp_shard": 2, "tp": 2}),
    ("untied", {"dp_shard": 2, "cp": 2, "zero_stage": 1}),
    ("tied", {"dp_shard": 2, "pp": 2, "zero_stage": 2}),
    ("tied", {"cp": 2, "tp": 2, "cp_kind": "ulysses"}),
    ("gpt2", {"pp": 2, "tp": 2}),
    ("untied", {"pp": 2, "cp": 2, "cp_kind": "ring"}),
    ("untied", {"pp": 2, "dp_shard": 2, "pp_schedule": "zbv"}),
    ("tied", {"pp": 2, "tp": 2, "pp_schedule": "interleaved_zero_bubble", "zero_stage": 2}),
    ("gpt2", {"pp": 2, "tp": 2, "pp_schedule": "dualpipe_v"}),
    ("untied", {"tp": 4}),
    ("tied", {"pp": 4}),
    # experts: their balance loss, and the bias that follows the load of the global batch
    *[
        ("experts", layout)
        for layout in ({"dp_shard": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"dp_shard": 2, "tp": 2})
    ],
    *[("latent", layout) for layout in ({"tp": 2}, {"cp": 2, "cp_kind": "ring"}, {"pp": 2, "dp_shard": 2})],
    # whole experts on other ranks: over each axis that ep is folded over, with ranks that share experts and without
    *[("experts", {"dp_shard": 2, "ep": 2, "zero_stage": stage}) for stage in (2, 3)],
    ("experts", {"tp": 2, "ep": 2}),
    ("experts", {"cp": 2, "ep": 2, "cp_kind": "ring"}),
    ("experts", {"dp_shard": 4, "ep": 2, "zero_stage": 1}),
    ("latent", {"dp_shard": 4, "ep": 4}),
    ("latent", {"dp_shard": 2, "tp": 2, "ep": 2}),
    ("experts", {"cp": 2, "tp": 2, "ep": 4}),
    ("experts", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
    ("experts", {"pp": 2, "tp": 2, "ep": 2, "pp_schedule": "interleaved_1f1b"}),
    ("latent", {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "zbv"}),
    ("experts", {"pp": 2, "tp": 2, "pp_schedule": "zbv"}),
    ("uneven_experts", {"pp": 2, "tp": 2, "pp_schedule": "zbv"}),  # shards whose nodes torch does not find
    ("muon_experts", {"dp_shard": 2, "tp": 2, "ep": 2}),
    ("sgd_experts", {"dp_shard": 2, "ep": 2}),
    # an optimizer that needs whole matrices
    *[("muon", layout) for layout in ({"dp_shard": 2}, {"pp": 2}, {"dp_shard": 2, "tp": 2})],
    # states rounded by random bits that are a function of an element's place, and 8-bit blocks that no axis cuts
    *[("rounded", layout) for layout in ({"dp_shard": 2}, {"tp": 2}, {"pp": 2, "dp_shard": 2})],
    *[("int8", layout) for layout in ({"dp_shard": 2, "zero_stage": 1}, {"dp_shard": 2, "tp": 2}, {"pp": 2})],
    ("rounded_experts", {"dp_shard": 4, "ep": 2}),
    ("rounded_uneven", {"tp": 4}),
    ("int8_experts", {"dp_shard": 2, "tp": 2, "ep": 2}),
    # sizes that the axes do not divide: heads, key heads fewer than ranks, widths, vocabularies, experts
    ("uneven", {"tp": 4}),
    ("uneven_gpt2", {"tp": 2, "dp_shard": 2, "zero_stage": 2}),
    ("uneven_experts", {"dp_shard": 4, "tp": 2, "ep": 4}),
    ("gpt2_vocabulary", {"tp": 8}),
    # examples, of which the answers alone have a loss, in packed samples
    *[("chat", layout) for layout in ({"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"dp_shard": 2, "cp": 2})],
    # documents with a label, and with several, whose head's rows the axes do not divide
    *[("classes", layout) for layout in ({"dp_shard": 2, "cp": 2}, {"pp": 2, "tp": 2})],
    *[("labels", layout) for layout in ({"tp": 4}, {"pp": 2})],
    # pairs of answers, whose log-probabilities under the first weights are computed in the layout, too
    *[("pairs", layout) for layout in ({"cp": 2, "tp": 2}, {"pp": 2, "dp_shard": 2})],
    # answers that are sampled in the layout, and two updates on those of each step
    *[("answers", layout) for layout in ({"dp_shard": 2, "tp": 2}, {"pp": 2, "cp": 2})],
    # a teacher that computes beside the model
    *[("distilled", layout) for layout in ({"dp_shard": 2, "tp": 2}, {"pp": 2, "cp": 2})],
    # adapters beside frozen weights
    *[("lora", {"dp_shard": 2, "zero_stage": stage}) for stage in (1, 3)],
    ("lora", {"tp": 2}),
    ("lora_int4", {"dp_shard": 2, "zero_stage": 0}),
    ("lora_uneven", {"tp": 4}),
    ("lora", {"pp": 2}),
    ("lora_gpt2", {"pp": 2, "pp_schedule": "zbv", "dp_shard": 2}),
    # operators that are kept, and an FSDP group of experts inside of the recomputed block
    ("experts", {"dp_shard": 2, "ep": 2, "activation_checkpointing": "selective"}),
    # triples on eight ranks
    ("untied", {"dp_shard": 2, "cp": 2, "tp": 2, "zero_stage": 2}),
    ("tied", {"pp": 2, "cp": 2, "tp": 2, "pp_schedule": "interleaved_1f1b"}),
    ("untied", {"dp_replicate": 2, "dp_shard": 2, "pp": 2, "zero_stage": 2}),
]
MORE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("classes", {"tp": 2}),
    ("labels", {"dp_shard": 2, "zero_stage": 1}),
    *[("pairs", layout) for layout in ({"dp_shard": 2, "cp": 2}, {"tp": 2})],
    *[("labels", layout) for layout in ({"dp_shard": 2, "cp": 2}, {"pp": 2, "tp": 2, "pp_schedule": "zbv"})],
    ("untied", {"dp_replicate": 2, "tp": 2}),
    ("gpt2", {"dp_replicate": 2, "pp": 2}),
    ("untied", {"dp_replicate": 2, "cp": 2, "cp_kind": "ring"}),
    ("untied", {"cp": 4, "cp_kind": "ring"}),
    ("muon", {"tp": 2}),
    *[("experts", {"dp_shard": 4, "ep": 2, "zero_stage": stage}) for stage in (0, 3)],
    ("latent", {"pp": 2, "dp_shard": 2, "ep": 2}),
    ("experts", {"dp_shard": 4, "tp": 2, "ep": 4}),  # one expert on a rank, cut by the two that share it
    ("muon_experts", {"dp_shard": 4, "ep": 2}),
    ("muon_experts", {"dp_shard": 2, "tp": 2}),
    ("tied", {"pp": 2, "dp_shard": 2, "tp": 2}),
    ("gpt2", {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "zero_stage": 1}),
    ("untied", {"dp_replicate": 2, "dp_shard": 2, "pp": 2, "zero_stage": 0}),
    ("untied", {"dp_shard": 4, "tp": 2}),
    ("tied", {"dp_shard": 8}),
    ("uneven_tied", {"tp": 4, "dp_shard": 2}),
    ("uneven_gpt2", {"tp": 2, "dp_shard": 4, "zero_stage": 2}),
    ("uneven_muon", {"tp": 4, "dp_shard": 2}),
    *[("uneven", layout) for layout in ({"tp": 2}, {"tp": 4, "cp": 2, "cp_kind": "ring"})],
    ("uneven_tied", {"tp": 4, "pp": 2}),
    ("uneven_experts", {"tp": 4, "dp_shard": 2}),
    ("uneven_latent", {"tp": 2, "dp_shard": 2, "ep": 4}),
    ("uneven_muon", {"dp_shard": 4, "tp": 2, "ep": 4}),
    ("gpt2_vocabulary", {"tp": 2}),
    ("rounded_sgd", {"dp_shard": 2, "tp": 2}),
    ("rounded_experts", {"dp_shard": 2, "tp": 2, "ep": 2}),
    ("rounded_uneven", {"tp": 2, "dp_shard": 4}),
    *[("int8_lion", layout) for layout in ({"dp_shard": 4, "tp": 2}, {"pp": 2, "cp": 2})],
    ("int8_experts", {"dp_shard": 4, "ep": 4}),
    (
        "latent",
        {
            "pp": 2,
            "dp_shard": 2,
            "ep": 2,
            "activation_checkpointing": "selective",
            "pp_schedule": "zbv",
        },
    ),
]
"""Further ones, of kinds that `CASES` has, for the long suite."""


def label(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def check(found: Trace, truth: Trace, bound: float) -> None:
    """Everything that must not depend on the layout."""
    assert found.digests == truth.digests
    assert found.losses == pytest.approx(truth.losses, rel=bound)
    assert found.eval_loss == pytest.approx(truth.eval_loss, rel=bound)
    assert found.grad_norms == pytest.approx(truth.grad_norms, rel=bound)
    assert found.initial.keys() == truth.initial.keys()
    for name, values in truth.initial.items():
        np.testing.assert_array_equal(found.initial[name], values, err_msg=name)
    for kind in ("gradients", "final"):
        errors = relative_errors(getattr(found, kind), getattr(truth, kind))
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= bound, f"{kind} of {worst} are off by {errors[worst]:.1e}"


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=label
)
def test_a_layout_computes_what_one_process_does(
    workers: WorkerPool, case: tuple[str, dict[str, Any]]
) -> None:
    name, layout = case
    check(in_layout(workers, name, layout), single(name), BOUND)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", [{"dp_shard": 2, "tp": 2}, {"cp": 2, "cp_kind": "ring"}, {"pp": 2}], ids=str
)
def test_a_layout_rounds_no_more_than_one_process_does(
    workers: WorkerPool, layout: dict[str, Any], precision: str
) -> None:
    """Against float64, a lower precision is about as far off in a layout as in one process: which sums are rounded
    where is chance, which makes 0.2 to 2.2 times as much here."""
    truth, alone = single("untied"), single("untied", precision)
    found = in_layout(workers, "untied", layout, precision)
    for kind in ("gradients", "final"):
        errors, usual = (relative_errors(getattr(t, kind), getattr(truth, kind)) for t in (found, alone))
        assert max(errors.values()) <= FACTOR * max(usual.values()), kind
    np.testing.assert_allclose(found.losses, truth.losses, rtol=FACTOR * largest(alone.losses, truth.losses))
    np.testing.assert_allclose(
        found.grad_norms, truth.grad_norms, rtol=FACTOR * largest(alone.grad_norms, truth.grad_norms)
    )


def largest(values: list[float], truth: list[float]) -> float:
    """Relative error."""
    return max(abs(a - b) / b for a, b in zip(values, truth, strict=True))
