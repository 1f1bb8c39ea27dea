"""The Triton kernels of cross entropy, with gradients, against float64; blocks are 64 columns wide."""

import itertools
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F

from megatrain_kernels import cross_entropy, linear_cross_entropy

EXACT = 32 * torch.finfo(torch.float32).eps
"""A loss is a float32 sum over a row of numbers that are off by a few roundings, relative to the largest logit."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: list[dict[str, Any]] = [
    {"z_loss": z_loss, "softcap": softcap} for z_loss, softcap in itertools.product((0.0, 0.1), (None, 2.0))
]
SHAPES = [(1, 1), (1, 7), (5, 64), (3, 65), (4, 128), (13, 331)]
HIDDEN, WORLD = 16, 2


def draw(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).to(dtype).requires_grad_()


def draw_targets(rows: int, vocab: int, seed: int = 3) -> Tensor:
    """A third of the rows is ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return targets.masked_fill(torch.rand(rows, generator=generator) < 1 / 3, -100)


def true_losses(logits: Tensor, targets: Tensor, z_loss: float, softcap: float | None) -> Tensor:
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses + z_loss * logits.logsumexp(-1).square().where(targets != -100, 0.0)


def error(got: Tensor, truth: Tensor) -> float:
    """The largest deviation, relative to the largest true value or 1."""
    assert got.shape == truth.shape
    return (
        ((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1)).item() if truth.numel() else 0.0
    )


def rounding(dtype: torch.dtype) -> float:
    """Three roundings of a 16-bit gradient (itself, the loss's gradient, their product; the interpreter cuts off)."""
    return EXACT if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def errors(logits: Tensor, targets: Tensor, **options: Any) -> tuple[float, float]:
    """How far losses and gradients are off, in tolerances: right results stay under 1, and NaN is not."""
    leaf = logits.detach().double().requires_grad_()
    truth = true_losses(leaf, targets, options.get("z_loss", 0.0), options.get("softcap"))
    got = cross_entropy(logits, targets, reduction="none", backend="triton", **options)
    assert got.dtype == torch.float32
    cotangent = draw(4, len(targets)).detach()
    (mine,) = torch.autograd.grad(got, logits, cotangent)
    (true,) = torch.autograd.grad(truth, leaf, cotangent.double())
    assert mine.dtype == logits.dtype
    # Losses are differences of numbers as large as the capped logits.
    finite = logits.detach().double().masked_fill(logits.isneginf(), 0).abs().flatten()
    size = max(
        1.0, min([*finite.topk(min(1, len(finite))).values.tolist(), options.get("softcap") or torch.inf])
    )
    return error(got, truth) / (EXACT * size), error(mine, true) / (rounding(logits.dtype) * size)


def right(found: tuple[float, float]) -> bool:
    return all(value <= 1 for value in found)


@pytest.mark.parametrize("options", OPTIONS[::3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients(shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]) -> None:
    found = errors(draw(1, *shape, scale=3, dtype=dtype), draw_targets(*shape), **options)
    assert right(found), found


@settings(max_examples=15)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
    scale=st.sampled_from([0.01, 1.0, 10.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_any(
    rows: int, vocab: int, dtype: torch.dtype, options: dict[str, Any], scale: float, seed: int
) -> None:
    found = errors(
        draw(seed, rows, vocab, scale=scale, dtype=dtype), draw_targets(rows, vocab, seed), **options
    )
    assert right(found), found


LAYOUTS = {
    "columns first": draw(1, 150, 9).T,
    "every second column": draw(1, 9, 300)[:, ::2],
    "every third row": draw(1, 27, 150)[::3],
    "part of wider rows": draw(1, 9, 200)[:, 17:167],
    "one row for all": draw(1, 1, 150).expand(9, 150),
}


@pytest.mark.parametrize("logits", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(logits: Tensor) -> None:
    found = errors(logits, draw_targets(18, 150)[::2], z_loss=0.1)
    assert right(found), found


def test_more_dimensions_and_reductions() -> None:
    logits, targets = draw(1, 2, 3, 70), draw_targets(6, 70).view(2, 3)
    truth = true_losses(logits.double().flatten(0, 1), targets.flatten(), 0.0, None)
    for reduction, expected in (
        ("none", truth.view(2, 3)), ("sum", truth.sum()), ("mean", truth.sum() / (targets != -100).sum()),
    ):  # fmt: skip
        got = cross_entropy(logits, targets, reduction=reduction, backend="triton")
        torch.testing.assert_close(got.double(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the infinity
def test_all_rows_ignored() -> None:
    """Nothing of the rows reaches the loss or its gradient, even where they are no numbers."""
    logits = draw(1, 5, 100).detach().index_fill_(0, torch.tensor([1]), torch.inf).requires_grad_()
    loss = cross_entropy(logits, torch.full((5,), 7), ignore_index=7, backend="triton")
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(5, 100))


def test_forbidden_tokens() -> None:
    """Logits of -inf: whole blocks, at either end of a row."""
    logits = draw(1, 3, 300).detach()
    logits[0, :130], logits[1, 100:], logits[2, 64:192] = (-torch.inf,) * 3
    targets = torch.tensor([200, 50, 10])
    found = errors(logits.requires_grad_(), targets, z_loss=0.1)
    assert right(found), found


@pytest.mark.parametrize("target", [70, -1, 2**40])
def test_a_target_outside_of_the_vocabulary_is_not_a_number(target: int) -> None:
    losses = cross_entropy(draw(1, 2, 70), torch.tensor([target, 3]), reduction="none", backend="triton")
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_not_numbers_show() -> None:
    logits = draw(1, 2, 100).detach()
    logits[0, 80] = torch.nan
    losses = cross_entropy(logits, torch.tensor([1, 2]), reduction="none", backend="triton")
    assert losses.isnan().tolist() == [True, False]


def test_rows_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Two rows that lie 2^31 + 16 elements apart, in a file that has holes between them."""
    step = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=step + 100, dtype=torch.float16)
    logits = memory.as_strided((2, 100), (step, 1))
    logits.copy_(draw(1, 2, 100, dtype=torch.float16).detach())
    found = errors(logits.requires_grad_(), torch.tensor([3, 99]))
    assert right(found), found


def test_the_same_bits_every_time() -> None:
    logits, targets = draw(1, 9, 300), draw_targets(9, 300)

    def gradient() -> Tensor:
        loss = cross_entropy(logits, targets, z_loss=0.1, backend="triton")
        return torch.autograd.grad(loss, logits)[0]

    assert torch.equal(gradient(), gradient())


def linear_errors(tokens: int, vocab: int, dtype: torch.dtype, **options: Any) -> list[float]:
    """Of the loss, of x's and of the weight's gradient, in tolerances."""
    x, weight = draw(1, tokens, HIDDEN, dtype=dtype), draw(2, vocab, HIDDEN, scale=0.5, dtype=dtype)
    targets = draw_targets(tokens, vocab)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = true_losses(
        wide[0] @ wide[1].T, targets, options.get("z_loss", 0.0), options.get("softcap")
    ).sum()
    got = linear_cross_entropy(x, weight, targets, reduction="sum", backend="triton", **options)
    grads, true = torch.autograd.grad(got, (x, weight)), torch.autograd.grad(truth, wide)
    # In 16 bits logits of a few units are rounded before the losses are made of them.
    found = [error(got, truth) / (4 * rounding(dtype))]
    return found + [error(a, b) / (4 * rounding(dtype)) for a, b in zip(grads, true, strict=True)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last one shorter."""
    module = import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 5 * 131})
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 1)
    found = linear_errors(13, 131, dtype, **options)
    assert all(value <= 1 for value in found), found


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_linear_where_one_gradient_is_wanted(wanted: tuple[bool, bool]) -> None:
    tensors = [draw(1, 5, HIDDEN), draw(2, 70, HIDDEN)]
    targets = draw_targets(5, 70)
    truth = true_losses(tensors[0].double() @ tensors[1].double().T, targets, 0.0, None).sum()
    true = torch.autograd.grad(truth, tensors)
    x, weight = frozen = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    got = linear_cross_entropy(x, weight, targets, reduction="sum", backend="triton")
    torch.testing.assert_close(got.double(), truth, rtol=EXACT, atol=EXACT)
    if any(wanted):
        got.backward()
    for tensor, gradient, want in zip(frozen, true, wanted, strict=True):
        assert (tensor.grad is not None) == want
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient, rtol=EXACT, atol=EXACT)


def _sharded_worker(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    tokens, vocab = 9, 140
    x, weight = draw(1, tokens, HIDDEN), draw(2, vocab, HIDDEN)
    targets = torch.tensor([0, 69, 70, 139, -100, 3, 100, -100, 71])
    columns = slice(rank * vocab // WORLD, (rank + 1) * vocab // WORLD)
    for options in OPTIONS:
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        truth = true_losses(wide[0] @ wide[1].T, targets, **options)
        shard = weight.detach()[columns].clone().requires_grad_()
        more = {**options, "tp_group": group, "backend": "triton"}
        got = linear_cross_entropy(x, shard, targets, reduction="sum", **more)
        grads, true = torch.autograd.grad(got, (x, shard)), torch.autograd.grad(truth.sum(), wide)
        torch.testing.assert_close(got.double(), truth.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[0].double(), true[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[1].double(), true[1][columns], rtol=1e-5, atol=1e-5)
    # Logits so far apart that only the true maximum over all shards keeps exp within range.
    logits = (1e3 * (x @ weight.T)).detach()
    got = cross_entropy(logits[:, columns], targets, reduction="none", tp_group=group, backend="triton")
    torch.testing.assert_close(
        got.double(), true_losses(logits.double(), targets, 0.0, None), rtol=1e-5, atol=1e-2
    )
    dist.destroy_process_group()


def test_vocabulary_sharded_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_sharded_worker, (str(tmp_path / "store"),), nprocs=WORLD)


def _columns_off_by(shift: int) -> Any:
    def breaks(module: Any, patch: pytest.MonkeyPatch) -> None:
        load = module.load_columns
        patch.setattr(module, "load_columns", lambda row, at, size, *rest: load(row, at, size + shift, *rest))

    return breaks


def _no_rescaling(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Sums relative to earlier maxima are kept as they are: each block of its own, unscaled."""
    statistics = module.statistics

    def sum_of_blocks(row: Any, size: Any, *rest: Any) -> tuple[Any, Any]:
        first, last = statistics(row, 64, *rest), statistics(row + 64, size - 64, *rest)
        return module.tl.maximum(first[0], last[0]), first[1] + last[1]

    patch.setattr(module, "statistics", sum_of_blocks)


def _scale(module: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "LOG2E", 1.001 * module.LOG2E)


def _program_missing(module: Any, patch: pytest.MonkeyPatch) -> None:
    kernel = module.losses_kernel
    patch.setattr(module, "losses_kernel", {(5,): kernel[(4,)]})


def _neighbour(module: Any, patch: pytest.MonkeyPatch) -> None:
    locate = module.locate_target
    patch.setattr(module, "locate_target", lambda row, target, *rest: locate(row, target + 1, *rest))


BREAKS = {
    "one column too few": _columns_off_by(-1),
    "one column too many": _columns_off_by(1),
    "sums not rescaled": _no_rescaling,
    "scale of the cap": _scale,
    "a program too few": _program_missing,
    "the column beside the target": _neighbour,
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
def test_a_broken_kernel_is_noticed(breaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = draw(1, 5, 100, scale=3), torch.tensor([0, 50, 98, 7, 63])
    assert right(errors(logits, targets, softcap=2.0))
    breaks(import_module("megatrain_kernels.xent.triton"), monkeypatch)
    assert not right(errors(logits, targets, softcap=2.0))


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_operators_keep_their_contract(backend: str, wanted: bool) -> None:
    """Schema, and fake shapes and strides, as torch checks them."""
    operation = import_module("megatrain_kernels.xent.op")
    targets, options = draw_targets(5, 70), (-100, 0.1, 2.0, None, 70)
    logits = draw(1, 5, 70, dtype=torch.float16).detach()
    torch.library.opcheck(operation.cross_entropy_op, (logits, targets, *options, wanted, backend))
    linear = import_module("megatrain_kernels.linear_xent.op").linear_cross_entropy_op
    x, weight = (draw(s, n, HIDDEN, dtype=torch.float16).detach() for s, n in ((1, 5), (2, 70)))
    factors = torch.linspace(-1, 2, 5)
    torch.library.opcheck(linear, (x, weight, targets, factors, *options, wanted, True, backend))
    torch.library.opcheck(linear, (x, weight, targets, None, *options, True, wanted, backend))


@pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_graph(backend: str) -> None:
    """Loss and gradients of a compiled function without breaks in its graph."""
    x, weight, targets = draw(1, 5, HIDDEN), draw(2, 70, HIDDEN), draw_targets(5, 70)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        whole = linear_cross_entropy(x, weight, targets, z_loss=0.1, backend=backend)
        return whole + cross_entropy(x @ weight.T, targets, softcap=2.0, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads, true = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (compiled, loss))
    for mine, expected in zip(grads, true, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_pytorch_takes_over_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = import_module("megatrain_kernels.xent.op")
    kernels = import_module("megatrain_kernels.xent.triton")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(
        "megatrain_kernels.xent.op.CROSS_ENTROPY", replace(operation.CROSS_ENTROPY, runs_on=lambda x: True)
    )
    monkeypatch.setattr("megatrain_kernels.kernel._failed", set())
    monkeypatch.setattr(kernels, "losses", fails)
    logits, targets = draw(1, 4, 70).detach(), draw_targets(4, 70)
    with pytest.warns(
        UserWarning, match="cross_entropy: Triton failed, PyTorch takes over: no such instruction"
    ):
        loss = cross_entropy(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    cross_entropy(logits, targets)  # a second warning would be an error
    with pytest.raises(RuntimeError, match="no such instruction"):
        cross_entropy(logits, targets, backend="triton")


@pytest.mark.parametrize(
    "function", [cross_entropy, lambda x, *rest, **more: linear_cross_entropy(x, x, *rest, **more)]
)
def test_float64_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16 or float32; got torch\.float64"):
        function(draw(1, 4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), backend="triton")
