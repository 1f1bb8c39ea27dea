"""The memory benchmark on tiny shapes: what it counts is what the operations are known to keep."""

import pytest
import torch

from benchmarks.memory import OPERATIONS, Shape, compare, measure, with_peak

SHAPE = Shape(batch=2, seq=7, hidden=12, ffn=20, vocab=336, heads=6, kv_heads=2, head_dim=4)
TOKENS = 14
KEPT = {  # bf16 has 2 bytes
    "linear_cross_entropy": (
        2 * (TOKENS * 12 + 336 * 12) + 8,  # two gradients and a count
        2 * TOKENS * 12 + 8 * TOKENS + 4 * TOKENS * 336 + 4,  # x, targets, log-probabilities, a count
    ),
    "swiglu": (2 * 2 * TOKENS * 20, 3 * 2 * TOKENS * 20),
    "rms_norm_with_residual": ((2 * 12 + 4) * TOKENS, (4 * 12 + 4 + 2 * 12) * TOKENS),
    "attention": (
        2 * TOKENS * 4 * (6 + 2 + 2 + 6) + 4 * TOKENS * 6,  # q, k, v, output, log-sum-exp
        2 * TOKENS * 4 * 6 * 3 + 2 * 2 * 6 * 7 * 7 + 7 * 7,  # q, k, v of all heads, probabilities, mask
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_kept_bytes(name: str) -> None:
    operation = OPERATIONS[name]
    found = [measure(way, operation, SHAPE) for way in (operation.fused, operation.plain)]
    assert tuple(figures["kept"] for figures in found) == KEPT[name]
    # Autograd holds what was saved; of that the inputs were there before, the rest was allocated.
    inputs = sum(t.nbytes for tensors in operation.inputs(SHAPE) for t in tensors)
    assert all(figures["peak"] >= figures["kept"] - inputs for figures in found)


def test_both_ways_compute_the_same() -> None:
    for name, operation in OPERATIONS.items():
        torch.manual_seed(0)
        tensors = [t for group in operation.inputs(SHAPE) for t in group]
        fused, plain = (way.run(*tensors) for way in (operation.fused, operation.plain))
        for mine, other in zip(
            *((t,) if isinstance(t, torch.Tensor) else t for t in (fused, plain)), strict=True
        ):
            mine = mine.transpose(1, 2) if name == "attention" else mine
            # Up to three roundings to bf16 of numbers of size 1 to 10.
            torch.testing.assert_close(mine.float(), other.float(), rtol=2e-2, atol=5e-2)


def test_a_wrong_formula_is_told() -> None:
    operation = OPERATIONS["swiglu"]
    wrong = operation.fused._replace(kept=operation.plain.kept)
    with pytest.raises(ValueError, match=f"{KEPT['swiglu'][0]} bytes are kept, but the formula says"):
        measure(wrong, operation, SHAPE)


def test_a_whole_micro_batch_is_computed_from_the_formula() -> None:
    found = compare(SHAPE, SHAPE._replace(seq=70))
    assert found["swiglu"]["fused"]["kept_whole_micro_batch"] == 10 * KEPT["swiglu"][0]


def test_the_peak_of_a_known_program() -> None:
    """Three tensors of 4,000 bytes, of which two live at a time."""
    x = torch.ones(1000)

    def action() -> int:
        first = torch.neg(x)
        second = torch.neg(first)
        del first
        return int(torch.neg(second).numel())

    result, peak = with_peak(action)
    assert (result, peak) == (1000, 8000)
