"""Grouped products and the order by expert, against loops in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatrain_kernels import grouped_gemm, permute, unpermute
from megatrain_kernels.grouped_mm.cases import cost, make_inputs
from megatrain_kernels.grouped_mm.op import grouped_gemm_op, grouped_outer_op
from megatrain_kernels.grouped_mm.reference import permute_reference
from megatrain_kernels.kernel import Case

# Products of 13 or 16 terms (32 for weights' gradients): a few roundings of the type, relative to the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = {
    "uneven": [5, 1, 19, 7],
    "empty groups": [0, 32, 0, 0],
    "ends empty": [0, 3, 29, 0],
    "no tokens": [0, 0, 0, 0],
}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def assert_close(got: Tensor, truth: Tensor, what: str) -> None:
    assert (got.shape, got.isnan().any()) == (truth.shape, False), what
    error = (got.double() - truth).abs().sum() if not truth.numel() else (got.double() - truth).abs().max()
    assert error.item() <= TOLERANCE[got.dtype] * max(
        1.0, truth.abs().max().item() if truth.numel() else 0
    ), what


def by_hand(x: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rows = [weights[g] @ row for g, row in zip(groups, x, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weights.shape[1])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("in_size", "out_size"), [(13, 11), (16, 24)]
)  # torch's own wants multiples of 16 bytes
def test_product(sizes: list[int], dtype: torch.dtype, backend: str, in_size: int, out_size: int) -> None:
    x, weights = draw(1, sum(sizes), in_size, dtype=dtype), draw(2, 4, out_size, in_size, dtype=dtype)
    truths = [t.detach().double().requires_grad_() for t in (x, weights)]
    truth = by_hand(*truths, sizes)
    got = grouped_gemm(x, weights, torch.tensor(sizes), backend=backend)
    assert got.dtype == dtype
    assert_close(got.detach(), truth.detach(), "output")
    cotangent = draw(3, *truth.shape, dtype=dtype).detach()
    expected = (
        torch.autograd.grad(truth, truths, cotangent.double())
        if sum(sizes)
        else [torch.zeros_like(t) for t in truths]
    )
    for mine, true in zip(torch.autograd.grad(got, (x, weights), cotangent), expected, strict=True):
        assert_close(mine, true, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_inputs_and_an_expanded_gradient(dtype: torch.dtype) -> None:
    sizes = torch.tensor([3, 0, 5])
    x, weights = draw(1, 16, 32, dtype=dtype), draw(2, 3, 16, 8, dtype=dtype)
    got = grouped_gemm(x[::2, ::2], weights.mT[:, :, :16], sizes)
    truth = by_hand(x[::2, ::2].double(), weights.mT[:, :, :16].double(), sizes.tolist())
    assert_close(got.detach(), truth.detach(), "output")
    expected = torch.autograd.grad(truth.sum(), (x, weights))
    for mine, true in zip(torch.autograd.grad(got.sum(), (x, weights)), expected, strict=True):
        assert_close(mine, true.double(), "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    """Shapes without data, gradients registered, nothing mutated (torch.library.opcheck)."""
    sizes = torch.tensor([2, 0, 4])
    x, weights = draw(1, 6, 8, dtype=dtype), draw(2, 3, 4, 8, dtype=dtype)
    torch.library.opcheck(grouped_gemm_op, (x, weights, sizes, "torch"))
    torch.library.opcheck(grouped_outer_op, (x.detach(), draw(3, 6, 4, dtype=dtype).detach(), sizes, "torch"))


def test_flops_and_what_a_case_costs() -> None:
    case = Case("small", {"tokens": 10, "groups": 3, "in_size": 8, "out_size": 4}, {"skew": 1.5})
    (x, weights, sizes), options = make_inputs(case, dtype=torch.float32, device="cpu")
    assert int(sizes.sum()) == 10
    with FlopCounterMode(display=False) as counter:
        out = grouped_gemm(x.requires_grad_(), weights.requires_grad_(), sizes, **options)
    forward, backward = (cost(case, itemsize=4, backward=each) for each in (False, True))
    assert counter.get_total_flops() == forward.flops == 2 * 10 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward.flops
    assert forward.bytes == 4 * (x.numel() + weights.numel() + out.numel())
    assert backward.bytes == forward.bytes + 4 * (x.numel() + weights.numel())


def test_autocast_chooses_the_type() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_gemm(draw(1, 4, 8, dtype=torch.float32), draw(2, 2, 8, 8), torch.tensor([1, 3]))
    assert out.dtype == torch.bfloat16


def choices(seed: int, tokens: int, k: int, n_experts: int) -> Tensor:
    scores = torch.rand(tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k, dim=1).indices


@pytest.mark.parametrize(("tokens", "k", "n_experts"), [(7, 2, 4), (5, 1, 9), (12, 3, 3), (0, 2, 4)])
def test_permute(tokens: int, k: int, n_experts: int) -> None:
    x, indices = draw(1, tokens, 6), choices(2, tokens, k, n_experts)
    rows, permutation = permute(x, indices, n_experts)
    expected, sizes = permute_reference(x, indices, n_experts)
    assert torch.equal(rows, expected)
    assert torch.equal(permutation.group_sizes, sizes)
    cotangent = draw(3, *rows.shape).detach()
    (mine,), (true,) = (torch.autograd.grad(y, x, cotangent) for y in (rows, expected))
    torch.testing.assert_close(mine, true, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unpermute_is_the_weighted_sum_of_each_tokens_rows(dtype: torch.dtype) -> None:
    indices = choices(2, 7, 3, 5)
    wide = torch.promote_types(dtype, torch.float32)
    weights = draw(4, 7, 3, dtype=wide)
    rows = draw(5, 21, 6, dtype=dtype)
    _, permutation = permute(torch.zeros(7, 6), indices, 5)
    got = unpermute(rows, permutation, weights)
    assert got.dtype == dtype
    truths = [t.detach().double().requires_grad_() for t in (rows, weights)]
    # Row number of (token, expert) by counting: all rows of earlier experts, then earlier tokens of this one.
    truth = torch.zeros(7, 6, dtype=torch.float64)
    for t in range(7):
        for s in range(3):
            expert = int(indices[t, s])
            row = int((indices < expert).sum() + (indices[:t] == expert).sum())
            truth[t] += truths[0][row] * truths[1][t, s]
    assert_close(got.detach(), truth.detach(), "output")
    cotangent = draw(6, 7, 6, dtype=dtype).detach()
    expected = torch.autograd.grad(truth, truths, cotangent.double())
    for mine, true in zip(torch.autograd.grad(got, (rows, weights), cotangent), expected, strict=True):
        assert_close(mine, true, "gradient")
