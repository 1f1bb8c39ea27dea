"""Products of scaled fp8 matrices in PyTorch, against float64 and against torch's own product."""

import pytest
import torch
from scaled_matmul_check import GROUP, PAIRS, SHAPES, error, operand, turned
from torch.utils.flop_counter import FlopCounterMode

from megatrain_kernels import scaled_matmul
from megatrain_kernels.kernel import Case
from megatrain_kernels.scaled_mm.cases import cost, make_inputs
from megatrain_kernels.scaled_mm.op import scaled_matmul_op

# Relative to the sum of the terms' sizes: roundings of the result, and of up to 130 partial sums in float32.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_scaling(pair: str, out_dtype: torch.dtype) -> None:
    for m, k, n in SHAPES:
        a, b = operand(m, k, "e4m3", PAIRS[pair][0]), operand(n, k, "e4m3", PAIRS[pair][1], seed=1)
        args = (a.values, b.values.mT, a.scales, turned(b.scales))
        got = scaled_matmul(*args, out_dtype=out_dtype, group_size=GROUP)
        assert got.dtype == out_dtype
        assert error(got, a, b) <= TOLERANCE[out_dtype]


@pytest.mark.parametrize("pair", ["tensor", "row"])
def test_equals_torchs_own_product(pair: str) -> None:
    a, b = operand(48, 64, "e5m2", PAIRS[pair][0]), operand(32, 64, "e4m3", PAIRS[pair][1])
    args = (a.values, b.values.mT, a.scales, turned(b.scales))
    expected = torch._scaled_mm(
        args[0], args[1], scale_a=a.scales, scale_b=turned(b.scales).contiguous(), out_dtype=torch.float32
    )
    got = scaled_matmul(*args, out_dtype=torch.float32, group_size=GROUP)
    assert error(expected, a, b) < 1e-6
    assert error(got, a, b) < 1e-6


def test_operands_in_any_order_of_memory() -> None:
    """Both transposed, as for a weight's gradient."""
    a, b = operand(40, 70, "e5m2", "block"), operand(35, 70, "e4m3", "block", seed=1)
    values = (each.values.mT.contiguous().mT for each in (a, b))
    left, right = values
    got = scaled_matmul(left, right.mT, a.scales, turned(b.scales), out_dtype=torch.float64, group_size=GROUP)
    assert error(got, a, b) < 1e-14


def test_nothing_to_sum() -> None:
    empty = torch.empty(3, 0, dtype=torch.float8_e4m3fn)
    out = scaled_matmul(empty, empty.mT, torch.ones(()), torch.ones(()))
    assert torch.equal(out, torch.zeros(3, 3, dtype=torch.bfloat16))


def test_mistakes_are_refused() -> None:
    a = operand(4, 64, "e4m3", "group")
    with pytest.raises(ValueError, match=r"must be fp8 and \(m, k\) and \(k, n\)"):
        scaled_matmul(a.values, a.values, a.scales, a.scales)
    with pytest.raises(ValueError, match="must be fp8"):
        scaled_matmul(a.values.float(), a.values.mT, a.scales, a.scales.mT)
    with pytest.raises(ValueError, match=r"scales \(4, 2\) do not fit a matrix \(4, 64\) in groups of 128"):
        scaled_matmul(a.values, a.values.mT, a.scales, a.scales.mT)
    with pytest.raises(ValueError, match="needs a CUDA device with tensor cores for fp8"):
        scaled_matmul(a.values, a.values.mT, a.scales, a.scales.mT, group_size=GROUP, backend="triton")


def test_operator_keeps_its_contract() -> None:
    a, b = operand(20, 70, "e5m2", "group"), operand(35, 70, "e4m3", "block")
    codes = (each.values.view(torch.uint8) for each in (a, b))
    formats = (a.values.dtype, b.values.dtype)
    args = (*codes, a.scales, b.scales, *formats, torch.bfloat16, GROUP, "torch")
    torch.library.opcheck(scaled_matmul_op, args)


def test_flops_and_what_a_case_costs() -> None:
    case = Case("small", {"m": 6, "k": 32, "n": 8}, {"a": "group", "b": "block"})
    (a, b, scale_a, scale_b), _ = make_inputs(case, dtype=torch.bfloat16, device="cpu")
    with FlopCounterMode(display=False) as counter:
        out = scaled_matmul(a, b, scale_a, scale_b)
    made = cost(case, itemsize=2)
    assert counter.get_total_flops() == made.flops == 2 * 6 * 32 * 8
    assert made.bytes == a.nbytes + b.nbytes + out.nbytes
