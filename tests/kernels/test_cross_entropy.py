"""Cross entropy, plain and with its linear layer: all options, chunks, a vocabulary sharded over processes."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatrain_kernels import cross_entropy, linear_cross_entropy
from megatrain_kernels.kernel import Case
from megatrain_kernels.linear_xent import cases as linear_cases
from megatrain_kernels.xent import cases
from megatrain_kernels.xent.op import row_losses

TOKENS, VOCAB, HIDDEN, WORLD = 23, 38, 16, 2
CHUNK = 8 * 22  # 8 rows of the smaller half of 45 tokens, but 7 of the larger one
OPTIONS = [(0.0, None), (0.1, None), (0.0, 2.0), (0.1, 2.0)]


def draw(seed: int, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


def draw_targets() -> Tensor:
    targets = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    targets[4:9] = -100
    return targets


def true_losses(logits: Tensor, targets: Tensor, z_loss: float, softcap: float | None) -> Tensor:
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses + z_loss * logits.logsumexp(-1).square() * (targets != -100)


# Both compute in the type of the inputs at least; one rounding of the gradient in theirs.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("z_loss", "softcap"), OPTIONS)
def test_cross_entropy(
    dtype: torch.dtype, tolerance: float, backend: str, z_loss: float, softcap: float | None
) -> None:
    logits = (3 * draw(1, TOKENS, VOCAB)).detach().to(dtype).requires_grad_()
    targets, cotangent = draw_targets(), draw(4, TOKENS).detach()
    wide = logits.detach().double().requires_grad_()
    truth = true_losses(wide, targets, z_loss, softcap)
    got = cross_entropy(logits, targets, z_loss=z_loss, softcap=softcap, reduction="none", backend=backend)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=2e-6)
    (mine,) = torch.autograd.grad(got, logits, cotangent.to(got.dtype))
    (true,) = torch.autograd.grad(truth, wide, cotangent)
    torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


def test_rows_of_several_blocks_and_far_apart_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("megatrain_kernels.blocks"), "BLOCK_ELEMENTS", 5 * VOCAB)
    logits, targets = (1e4 * draw(1, TOKENS, VOCAB)).detach().requires_grad_(), draw_targets()
    truth = true_losses(logits, targets, 0.0, None)
    got = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(got, truth)
    cotangent = draw(4, TOKENS).detach()
    mine, true = (torch.autograd.grad(loss, logits, cotangent)[0] for loss in (got, truth))
    torch.testing.assert_close(mine, true)


def test_double_precision_gradcheck() -> None:
    x, weight, targets = draw(1, 5, 3), draw(2, 7, 3), torch.tensor([0, 6, -100, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, z_loss=0.1, softcap=2.0), (x, weight)
    )


def test_weight_gradient_of_many_bf16_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks are as exact as one: their sum is kept in float32 (in bf16 the error here is over 2 %)."""
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 64})
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 64)
    x = draw(1, 4096, HIDDEN).detach().bfloat16().requires_grad_()
    weight = draw(2, VOCAB, HIDDEN).detach().bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (4096,), generator=torch.Generator().manual_seed(3))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    loss = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    (true,) = torch.autograd.grad(loss, wide[1])
    (mine,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, reduction="sum"), weight)
    assert (mine.double() - true).abs().max() <= 5e-3 * true.abs().max()  # one bf16 rounding is 4e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 45, 131, 1031])
def test_a_vocabulary_of_odd_size_has_aligned_rows_and_the_same_numbers(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of logits begin at multiples of 16 bytes; loss and gradients are those without rows of zeros below."""
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 8})
    seen: list[int] = []

    def watched(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        assert logits.shape[1] == vocab
        seen.append(logits.stride(0) * logits.itemsize % 16 + logits.data_ptr() % 16)
        return row_losses(logits, *args, **options)

    monkeypatch.setattr(module, "row_losses", watched)
    x, weight = (draw(n, rows, HIDDEN).detach().to(dtype) for n, rows in ((1, TOKENS), (2, vocab)))
    targets = torch.arange(TOKENS) % vocab

    def run() -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*inputs, targets, z_loss=0.1, softcap=2.0, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    padded = run()
    assert seen
    assert not any(seen)
    monkeypatch.setattr(module, "_aligned", lambda weight: weight)
    # Sums in another order: of the type that the products of 16-bit numbers are summed in.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    for mine, plain in zip(padded, run(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


def test_the_weight_gradient_is_added_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot add a product of 16-bit numbers to float32, it is never there as a whole in 16 bits."""
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    logits, part = (draw(n, 64, size).detach().bfloat16() for n, size in ((1, 301), (2, HIDDEN)))
    true = torch.ones(301, HIDDEN, dtype=torch.float64) + logits.double().T @ part.double()
    for elements in (1, 7 * HIDDEN, 1 << 24):
        monkeypatch.setattr(module, "SLICE_ELEMENTS", elements)
        total = torch.ones(301, HIDDEN)
        module._add_product(total, logits, part)
        assert (total.double() - true).abs().max() <= 4e-3 * true.abs().max()  # one bf16 rounding


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_factors_of_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the losses times the factors, which have none; chunks of 7 tokens."""
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 7 * VOCAB})
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 1)
    x, weight, targets = draw(1, TOKENS, HIDDEN), draw(2, VOCAB, HIDDEN), draw_targets()
    factors = draw(5, TOKENS)
    losses = true_losses(x @ weight.T, targets, 0.1, None) * factors.detach()
    options: dict[str, Any] = {"factors": factors, "z_loss": 0.1, "backend": backend}
    got = linear_cross_entropy(x, weight, targets, reduction="sum", **options)
    torch.testing.assert_close(got, losses.sum(), rtol=1e-12, atol=1e-12)
    true = torch.autograd.grad(losses.sum(), (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, (x, weight)), true, rtol=1e-12, atol=1e-12)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            each = linear_cross_entropy(x, weight, targets, reduction="none", **options)
        torch.testing.assert_close(each, losses, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="factors must be as targets"):
        linear_cross_entropy(x, weight, targets, factors=factors[:3])


def _sharded_worker(rank: int, store: str, z_loss: float, softcap: float | None, vocab: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    module.CHUNK_ELEMENTS, module.MIN_CHUNK_ROWS = {"cpu": CHUNK}, 1  # type: ignore[attr-defined]
    x, weight, targets = draw(1, TOKENS, HIDDEN), draw(2, vocab, HIDDEN), draw_targets()
    cut = (vocab + 1) // 2
    columns = (slice(0, cut), slice(cut, vocab))[rank]
    options: dict[str, Any] = {"tp_group": group, "vocab_size": None if vocab % WORLD == 0 else vocab}
    shard = weight.detach()[columns].clone().requires_grad_()
    got = linear_cross_entropy(x, shard, targets, z_loss=z_loss, softcap=softcap, **options)
    losses = true_losses(x @ weight.T, targets, z_loss, softcap)
    truth = losses.sum() / (targets != -100).sum()
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    grads, true = (
        torch.autograd.grad(got, (x, shard)),
        torch.autograd.grad(truth, (x, weight), retain_graph=True),
    )
    torch.testing.assert_close(grads[0], true[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[1], true[1][columns], rtol=1e-12, atol=1e-12)
    factors = draw(5, TOKENS).detach()
    summed = {"z_loss": z_loss, "softcap": softcap, "factors": factors, **options}
    got = linear_cross_entropy(x, shard, targets, reduction="sum", **summed)
    grads = torch.autograd.grad(got, (x, shard))
    true = torch.autograd.grad((losses * factors).sum(), (x, weight), retain_graph=True)
    torch.testing.assert_close(grads[0], true[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[1], true[1][columns], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        each = linear_cross_entropy(x, shard, targets, reduction="none", **summed)
    torch.testing.assert_close(each, (losses * factors).detach(), rtol=1e-12, atol=1e-12)
    # Logits so far apart that only the true maximum over all shards keeps exp within range.
    logits = (1e4 * (x @ weight.T)).detach()
    got = cross_entropy(logits[:, columns], targets, z_loss=z_loss, reduction="none", **options)
    torch.testing.assert_close(got, true_losses(logits, targets, z_loss, None), rtol=1e-12, atol=1e-12)
    dist.destroy_process_group()


@pytest.mark.parametrize("vocab", [VOCAB, 45])
def test_vocabulary_sharded_over_two_processes(tmp_path: Path, vocab: int) -> None:
    mp.spawn(_sharded_worker, (str(tmp_path / "store"), 0.1, 2.0, vocab), nprocs=WORLD)


def test_a_sharded_vocabulary_has_no_reference() -> None:
    x, weight, targets = draw(1, TOKENS, HIDDEN), draw(2, VOCAB, HIDDEN), draw_targets()
    group = object()
    with pytest.raises(ValueError, match="sharded over tp_group"):
        linear_cross_entropy(x, weight, targets, tp_group=group, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sharded over tp_group"):
        cross_entropy(x @ weight.T, targets, tp_group=group, backend="reference")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="and no tp_group that shards them"):
        linear_cross_entropy(x, weight, targets, vocab_size=VOCAB + 1)


def test_the_factor_of_the_loss_is_not_rounded_to_bf16() -> None:
    """1/3000 in bf16 is off by 0.15 %, which would be the mean error of every gradient."""
    x, weight = (draw(s, 3000, 64).detach().bfloat16().requires_grad_() for s in (1, 2))
    targets = torch.arange(3000)
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, reduction="sum"), x)
    (mean,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    ratio = (mean.double() * 3000 * whole.double()).sum() / whole.double().square().sum()
    assert abs(ratio.item() - 1) < 1e-4  # 192,000 roundings of 0.1 % each average out


def test_flops_and_what_a_case_costs() -> None:
    case = Case("small", {"tokens": 600, "hidden": 8, "vocab": 37}, {"z_loss": 0.1})
    (x, weight, targets), options = linear_cases.make_inputs(case, dtype=torch.float32, device="cpu")
    forward, backward = (linear_cases.cost(case, itemsize=4, backward=each) for each in (False, True))
    assert forward.bytes == 4 * (x.numel() + weight.numel()) + 8 * targets.numel()
    assert backward.bytes == 4 * (x.numel() + weight.numel())
    for wanted, expected in ((False, forward.flops), (True, forward.flops + backward.flops)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(x.requires_grad_(wanted), weight.requires_grad_(wanted), targets, **options)
        assert counter.get_total_flops() == expected
    assert forward.flops == 2 * 600 * 8 * 37
    rows = Case("small", {"tokens": 6, "vocab": 37}, {"softcap": 2.0})
    (logits, targets), options = cases.make_inputs(rows, dtype=torch.bfloat16, device="cpu")
    losses = cross_entropy(logits, targets, reduction="none", **options)
    forward, backward = (cases.cost(rows, itemsize=2, backward=each) for each in (False, True))
    assert forward.bytes == logits.nbytes + targets.nbytes + losses.nbytes
    assert (backward.bytes, forward.flops, backward.flops) == (logits.nbytes, 0, 0)


def test_triton_is_refused_without_a_device_for_it() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device; got cpu"):
        cross_entropy(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), backend="triton")
