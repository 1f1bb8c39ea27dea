"""The gate of a mixture of experts where no kernel runs: what it costs, and what it refuses."""

import pytest
import torch

from megatrain_kernels import moe_gate
from megatrain_kernels.kernel import Case
from megatrain_kernels.router.cases import cost, make_inputs


def test_what_a_case_costs() -> None:
    case = Case("small", {"tokens": 10, "experts": 16, "top_k": 3}, {"scores": "sigmoid", "n_groups": 4})
    (logits,), options = make_inputs(case, dtype=torch.float32, device="cpu")
    indices, weights, scores = moe_gate(logits, **options)
    forward, backward = (cost(case, itemsize=4, backward=each) for each in (False, True))
    assert (forward.flops, backward.flops) == (0, 0)
    assert forward.bytes == sum(t.nbytes for t in (logits, scores, indices, weights))
    # Scores, their gradient and the logits'; the choice and its gradient.
    assert backward.bytes == 3 * scores.nbytes + indices.nbytes + weights.nbytes


def test_triton_is_refused_without_a_device_for_it() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device; got cpu"):
        moe_gate(torch.zeros(2, 8), top_k=2, backend="triton")
