"""The interpreter itself: a kernel runs here, and an element that it does not write is seen."""

import torch
import triton
import triton.language as tl

from megatrain_kernels.jit_types import Number, Pointer, constexpr


def double(x: Pointer, out: Pointer, size: Number, BLOCK: constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < size), mask=at < size)


def test_a_kernel_runs_and_what_it_leaves_out_is_not_a_number() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    triton.jit(double)[(2,)](x, out, 100, 32)
    torch.testing.assert_close(out[:64], 2 * x[:64], rtol=0, atol=0)
    assert out[64:].isnan().all()
