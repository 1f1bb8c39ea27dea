"""Every operation, forward and gradients, against a float64 definition written here or by torch."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import megatrain_kernels as kernels

# A result may be off by a few roundings of its own type, relative to the largest value of the true result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def assert_close(got: Tensor, truth: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
    assert error.item() <= TOLERANCE[dtype], f"{what}: relative error {error.item():.2e}"


def check(got: Tensor, truth: Tensor, inputs: list[Tensor], truths: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs, and gradients for one random cotangent."""
    assert_close(got.detach(), truth.detach(), dtype, "output")
    cotangent = draw(99, *truth.shape).detach()
    got_grads = torch.autograd.grad(got, inputs, cotangent.to(got.dtype))
    true_grads = torch.autograd.grad(truth, truths, cotangent.to(got.dtype).double(), retain_graph=True)
    for number, (mine, true) in enumerate(zip(got_grads, true_grads, strict=True)):
        assert_close(mine, true, dtype, f"gradient {number}")


def naive_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None = None) -> Tensor:
    """One query at a time, with explicit loops over batch and heads; visible `(batch, q, k)`."""
    batch, n_queries, heads, dim = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            scores = q[b, :, h] @ k[b, :, kv].T / math.sqrt(dim)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = F.softmax(scores.masked_fill(~visible[b], -math.inf), dim=-1)
            rows.append(weights @ v[b, :, kv])
    return torch.stack(rows).view(batch, heads, n_queries, -1).transpose(1, 2)


def visible_pairs(seq: int, window: int | None, doc_ids: Tensor | None, batch: int) -> Tensor:
    visible = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for b in range(batch):
        for i in range(seq):
            for j in range(i + 1):
                near = window is None or i - j < window
                same = doc_ids is None or bool(doc_ids[b, i] == doc_ids[b, j])
                visible[b, i, j] = near and same
    return visible


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    seq=st.sampled_from([1, 2, 17, 127, 128, 129, 200]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    window=st.sampled_from([None, 1, 5, 130]),
    documents=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_attention(
    seed: int, seq: int, heads: tuple[int, int], window: int | None, documents: bool, dtype: torch.dtype
) -> None:
    batch, (n_heads, n_kv) = 2, heads
    q, k, v = (draw(seed + i, batch, seq, n, 8, dtype=dtype) for i, n in enumerate((n_heads, n_kv, n_kv)))
    doc_ids = None
    if documents:
        generator = torch.Generator().manual_seed(seed)
        doc_ids = torch.cumsum(torch.rand(batch, seq, generator=generator) < 0.1, dim=1)
    truths = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = naive_attention(*truths, visible_pairs(seq, window, doc_ids, batch))
    for backend in ("torch", "reference"):
        got = kernels.attention(q, k, v, window=window, doc_ids=doc_ids, backend=backend)
        assert isinstance(got, Tensor)
        check(got, truth, [q, k, v], truths, dtype)
    with torch.no_grad():  # another path where nothing is trained
        got = kernels.attention(q, k, v, window=window, doc_ids=doc_ids)
    assert isinstance(got, Tensor)
    assert_close(got, truth.detach(), dtype, "inference")


def test_attention_with_cap_offset_and_log_sum_exp() -> None:
    q, k, v = draw(1, 2, 5, 2, 4), draw(2, 2, 9, 1, 4), draw(3, 2, 9, 1, 6)
    visible = visible_pairs(9, None, None, 2)[:, 4:]
    truth = naive_attention(q, k, v, visible, softcap=3.0)
    result = kernels.attention(q, k, v, softcap=3.0, q_offset=4, return_lse=True)
    assert isinstance(result, tuple)
    torch.testing.assert_close(result[0], truth)
    scores = 3.0 * torch.tanh(torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 2 / 3.0)
    torch.testing.assert_close(result[1], scores.masked_fill(~visible[:, None], -math.inf).logsumexp(-1))


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="the 2 key heads must divide the 3 query heads"):
        kernels.attention(draw(0, 1, 2, 3, 4), draw(0, 1, 2, 2, 4), draw(0, 1, 2, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rms_norm(dtype: torch.dtype, backend: str) -> None:
    x, weight, residual = (
        draw(1, 3, 7, 33, dtype=dtype),
        draw(2, 33, dtype=dtype),
        draw(3, 3, 7, 33, dtype=dtype),
    )
    xd, wd, rd = (t.detach().double().requires_grad_() for t in (x, weight, residual))
    truth = xd / torch.sqrt((xd**2).mean(-1, keepdim=True) + 1e-5) * wd
    got = kernels.rms_norm(x, weight, 1e-5, backend=backend)
    assert isinstance(got, Tensor)
    check(got, truth, [x, weight], [xd, wd], dtype)
    normed, total = kernels.rms_norm(x, weight, 1e-5, residual, backend=backend)
    both = xd + rd
    truth = both / torch.sqrt((both**2).mean(-1, keepdim=True) + 1e-5) * wd
    check(normed, truth, [x, weight, residual], [xd, wd, rd], dtype)
    assert_close(total.detach(), both.detach(), dtype, "sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_norm(dtype: torch.dtype, backend: str) -> None:
    inputs = [draw(1, 3, 7, 33, dtype=dtype), draw(2, 33, dtype=dtype), draw(3, 33, dtype=dtype)]
    truths = [t.detach().double().requires_grad_() for t in inputs]
    x, weight, bias = truths
    truth = (x - x.mean(-1, keepdim=True)) / torch.sqrt(
        x.var(-1, unbiased=False, keepdim=True) + 1e-5
    ) * weight + bias
    got = kernels.layer_norm(*inputs, 1e-5, backend=backend)
    assert isinstance(got, Tensor)
    check(got, truth, inputs, truths, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_norm_of_a_sum(dtype: torch.dtype, backend: str) -> None:
    shapes = ((3, 7, 33), (33,), (33,), (3, 7, 33))
    inputs = [draw(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]
    truths = [t.detach().double().requires_grad_() for t in inputs]
    both = truths[0] + truths[3]
    deviation = torch.sqrt(both.var(-1, unbiased=False, keepdim=True) + 1e-5)
    truth = (both - both.mean(-1, keepdim=True)) / deviation * truths[1] + truths[2]
    x, weight, bias, residual = inputs
    normed, total = kernels.layer_norm(x, weight, bias, 1e-5, residual, backend=backend)
    check(normed, truth, inputs, truths, dtype)
    assert_close(total.detach(), both.detach(), dtype, "sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rotary_is_a_complex_rotation(dtype: torch.dtype, backend: str) -> None:
    q, k = draw(1, 2, 5, 3, 8, dtype=dtype), draw(2, 2, 5, 1, 8, dtype=dtype)
    angles = draw(3, 2, 5, 4).detach()
    for x, got in zip((q, k), kernels.rotary(q, k, angles.cos(), angles.sin(), backend=backend), strict=True):
        xd = x.detach().double().requires_grad_()
        turned = (
            torch.complex(xd[..., :4], xd[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
        )
        check(got, torch.cat([turned.real, turned.imag], -1), [x], [xd], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_swiglu(dtype: torch.dtype, backend: str) -> None:
    inputs = [draw(1, 5, 13, dtype=dtype), draw(2, 5, 13, dtype=dtype)]
    truths = [t.detach().double().requires_grad_() for t in inputs]
    truth = truths[0] / (1 + torch.exp(-truths[0])) * truths[1]
    check(kernels.swiglu(*inputs, backend=backend), truth, inputs, truths, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tanh", [True, False])
def test_bias_gelu(tanh: bool, dtype: torch.dtype, backend: str) -> None:
    inputs = [draw(1, 2, 5, 13, dtype=dtype), draw(2, 13, dtype=dtype)]
    truths = [t.detach().double().requires_grad_() for t in inputs]
    total = truths[0] + truths[1]
    # By the normal distribution's integral, or with its well-known approximation.
    part = torch.special.ndtr(total)
    if tanh:
        part = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (total + 0.044715 * total**3))
    check(kernels.bias_gelu(*inputs, tanh=tanh, backend=backend), total * part, inputs, truths, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.1, None), (0.0, 2.0), (0.1, 2.0)])
def test_linear_cross_entropy(
    dtype: torch.dtype, reduction: str, z_loss: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(
        module, "CHUNK_ELEMENTS", {"cpu": 5 * 37}
    )  # five tokens a chunk, the last one shorter
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 1)
    x, weight = draw(1, 3, 11, 16, dtype=dtype), draw(2, 37, 16, dtype=dtype)
    targets = torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(3))
    targets[0, 2:9] = -100
    xd, wd = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = xd @ wd.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 11)
    losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != -100)
    truth = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (targets != -100).sum()}[reduction]
    got = kernels.linear_cross_entropy(
        x, weight, targets, z_loss=z_loss, softcap=softcap, reduction=reduction
    )
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    check(got, truth, [x, weight], [xd, wd], dtype)


def test_linear_cross_entropy_without_valid_targets_is_zero() -> None:
    x, weight = draw(1, 4, 8), draw(2, 5, 8)
    loss = kernels.linear_cross_entropy(x, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_linear_cross_entropy_never_holds_all_logits() -> None:
    x, weight = draw(1, 4096, 8, dtype=torch.float32), draw(2, 4096, 8, dtype=torch.float32)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kernels.linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64), reduction="sum")
    assert kept == x.numel() + weight.numel()  # their gradients


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='fast'"):
        kernels.swiglu(draw(0, 2), draw(1, 2), backend="fast")
