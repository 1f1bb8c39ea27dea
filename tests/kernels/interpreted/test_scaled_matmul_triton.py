"""The Triton kernel of scaled products against float64; blocks are 16 rows, 32 columns and a group of 32.

The interpreter multiplies operands that the kernel has made float32 there: reading fp8 is right in it, but for codes
of NaN and infinity, which quantization never makes.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaled_matmul_check import GROUP, PAIRS, SHAPES, Operand, error, operand, turned

from megatrain_kernels import quantize, scaled_matmul
from megatrain_kernels.scaled_mm.op import scaled_matmul_op

BOUND = 2e-6  # float32 sums of up to 130 terms, relative to the sum of their sizes


def product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    args = (a.values, b.values.mT, a.scales, turned(b.scales))
    return scaled_matmul(*args, out_dtype=out_dtype, group_size=GROUP, backend="triton")


@pytest.mark.parametrize("pair", PAIRS)
def test_each_scaling(pair: str) -> None:
    for m, k, n in SHAPES:
        a, b = operand(m, k, "e5m2", PAIRS[pair][0]), operand(n, k, "e4m3", PAIRS[pair][1], seed=1)
        assert error(product(a, b), a, b) <= BOUND


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(*[st.integers(1, 80)] * 3),
    formats=st.tuples(*[st.sampled_from(["e4m3", "e5m2"])] * 2),
    pair=st.sampled_from(sorted(PAIRS)),
)
def test_any(seed: int, sizes: tuple[int, ...], formats: tuple[str, ...], pair: str) -> None:
    m, k, n = sizes
    a, b = (
        operand(rows, k, dtype, scaling, seed=seed + rows)
        for rows, dtype, scaling in zip((m, n), formats, PAIRS[pair], strict=True)
    )
    assert error(product(a, b), a, b) <= BOUND


def test_operands_in_any_order_of_memory() -> None:
    a, b = operand(40, 70, "e4m3", "block"), operand(35, 70, "e5m2", "block", seed=1)
    left, right = (each.values.mT.contiguous().mT for each in (a, b))
    moved = (Operand(left, a.scales, a.truth), Operand(right, b.scales.mT.contiguous().mT, b.truth))
    assert error(product(*moved), a, b) <= BOUND


def test_groups_longer_than_a_program_takes_at_a_time() -> None:
    """Of 256: each is two pieces of 128 with the same scale."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 600, generator=generator) * torch.arange(1, 601)
    values, scales = quantize(x, dtype="e4m3", scaling="group", group_size=256)
    each = scales.repeat_interleave(256, 1)[:, :600].double() * values.double()
    got = scaled_matmul(
        values, values.mT, scales, scales.mT, out_dtype=torch.float32, group_size=256, backend="triton"
    )
    sizes = each.abs() @ each.abs().T
    assert ((got.double() - each @ each.T).abs() / sizes).max() <= BOUND


@pytest.mark.parametrize("name", ["GROUP", "A_ROWS", "B_ROWS"])
def test_a_wrong_scale_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = import_module("megatrain_kernels.scaled_mm.triton")
    kernel = launcher.scaled_matmul_kernel

    class Wrong:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: kernel[grid](*args, **constants | {name: 64})

    monkeypatch.setattr(launcher, "scaled_matmul_kernel", Wrong())
    a, b = operand(70, 130, "e4m3", "block"), operand(70, 130, "e4m3", "block", seed=1)
    assert error(product(a, b), a, b) > 1000 * BOUND


def test_operator_keeps_its_contract() -> None:
    a, b = operand(20, 70, "e5m2", "group"), operand(35, 70, "e4m3", "block")
    codes = (each.values.view(torch.uint8) for each in (a, b))
    formats = (a.values.dtype, b.values.dtype)
    args = (*codes, a.scales, b.scales, *formats, torch.float32, GROUP, "triton")
    torch.library.opcheck(scaled_matmul_op, args)
