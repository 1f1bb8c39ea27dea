"""Triton's kernels of norms, gated activations and rotary positions, with gradients, against float64."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_check import break_module
from torch import Tensor
from torch.nn import functional as F

from megatrain_kernels import bias_gelu, geglu, layer_norm, rms_norm, rotary, swiglu
from megatrain_kernels.gated.op import gated_backward_op, gated_op
from megatrain_kernels.gelu.op import bias_gelu_backward_op, bias_gelu_op
from megatrain_kernels.kernel import KERNELS
from megatrain_kernels.norm.op import norm_backward_op, norm_op
from megatrain_kernels.rope.op import rotary_op

EPS = 1e-3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest true value: float32 sums of some hundred terms; one rounding of a 16-bit result, which the
interpreter cuts off instead of rounding (a whole unit), and twice where a stored sum is read again."""
SHAPES = [(1, 2), (1, 7), (5, 64), (3, 65), (17, 128), (7, 331)]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def compare(
    function: Callable[..., Any], truth: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any
) -> float:
    """How far results and gradients are off, in tolerances: right ones stay under 1, and NaN is not."""
    dtype = inputs[0].dtype
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    got, true = function(*inputs, backend="triton", **options), truth(*wide, **options)
    got, true = ((each,) if isinstance(each, Tensor) else tuple(each) for each in (got, true))
    cotangents = [draw(90 + n, *t.shape, dtype=dtype).detach() for n, t in enumerate(got)]
    mine = torch.autograd.grad(got, inputs, cotangents)
    real = torch.autograd.grad(true, wide, [c.double() for c in cotangents])
    errors = []
    for found, exact in zip((*got, *mine), (*true, *real), strict=True):
        assert found.dtype == dtype
        assert found.shape == exact.shape
        if exact.numel():
            errors.append(((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item())
    worst = max(errors, default=0.0) if all(e == e for e in errors) else torch.nan
    return worst / TOLERANCE[dtype]


def true_rms(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight
    return out if residual is None else (out, total)


def rms(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, backend: str) -> Any:
    return rms_norm(x, weight, EPS, residual, backend=backend)


def true_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return out if residual is None else (out, total)


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str,
) -> Any:
    return layer_norm(x, weight, bias, EPS, residual, backend=backend)


def true_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def true_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def norm_inputs(seed: int, rows: int, size: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    last = {
        "rms": (),
        "rms, added": ((rows, size),),
        "layer": (),
        "layer, biased": ((size,),),
        "layer, added": ((size,), (rows, size)),
    }[kind]
    shapes = ((rows, size), (size,), *last)
    return tuple(draw(seed + n, *shape, dtype=dtype) for n, shape in enumerate(shapes))


NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms": (rms, true_rms),
    "rms, added": (rms, true_rms),
    "layer": (layer, true_layer),
    "layer, biased": (layer, true_layer),
    "layer, added": (layer, true_layer),
}
GATED = {"swiglu": (swiglu, true_swiglu), "geglu": (geglu, true_geglu)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert compare(*NORMS[kind], norm_inputs(1, *shape, kind, dtype)) <= 1


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(NORMS)),
    rows=st.integers(0, 9),
    size=st.integers(2, 150),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_norm(kind: str, rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    assert compare(*NORMS[kind], norm_inputs(seed, rows, size, kind, dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (0, 5)])
@pytest.mark.parametrize("kind", GATED)
def test_gated(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert compare(*GATED[kind], (draw(1, *shape, dtype=dtype), draw(2, *shape, dtype=dtype))) <= 1


def true_bias_gelu(x: Tensor, bias: Tensor, *, tanh: bool) -> Tensor:
    return F.gelu(x + bias, approximate="tanh" if tanh else "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (0, 5)])
@pytest.mark.parametrize("tanh", [True, False])
def test_bias_gelu(tanh: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = draw(1, *shape, dtype=dtype), draw(2, shape[1], dtype=dtype)
    assert compare(bias_gelu, true_bias_gelu, inputs, tanh=tanh) <= 1


@settings(max_examples=25)
@given(
    kind=st.sampled_from([*GATED, True, False]),
    rows=st.integers(0, 9),
    size=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_gated_or_with_a_bias(
    kind: str | bool, rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    x = draw(seed, rows, size, dtype=dtype)
    if isinstance(kind, str):
        assert compare(*GATED[kind], (x, draw(seed + 1, rows, size, dtype=dtype))) <= 1
    else:
        assert compare(bias_gelu, true_bias_gelu, (x, draw(seed + 1, size, dtype=dtype)), tanh=kind) <= 1


def test_gated_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-300.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 300.0]], requires_grad=True)
    for kind in GATED:
        assert compare(*GATED[kind], (gate, draw(2, 1, 7))) <= 1
    for tanh in (True, False):
        assert compare(bias_gelu, true_bias_gelu, (gate, torch.zeros(7).requires_grad_()), tanh=tanh) <= 1


def true_rotary(q: Tensor, k: Tensor, *, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """By complex numbers."""
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        made = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([made.real, made.imag], -1)

    return turned(q), turned(k)


def ours(q: Tensor, k: Tensor, *, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return rotary(q, k, cos, sin, backend=backend)


@settings(max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 9, 5, 3, 20)]),
    each_row=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_rotary(sizes: tuple[int, ...], each_row: bool, dtype: torch.dtype, seed: int) -> None:
    batch, seq, heads, kv_heads, half = sizes
    angles = 3 * draw(seed + 5, *([batch] if each_row else []), seq, half).detach()
    inputs = tuple(draw(seed + n, batch, seq, n, 2 * half, dtype=dtype) for n in (heads, kv_heads))
    assert compare(ours, true_rotary, inputs, cos=angles.cos(), sin=angles.sin()) <= 1


@pytest.mark.parametrize("rows", [None, 2], ids=["one table", "a table a row"])
@pytest.mark.parametrize(
    ("dim", "heads", "dtype"),
    [
        *[(dim, heads, torch.float32) for dim in (2, 22) for heads in ((1, 1), (6, 2), (5, 5))],
        *[(16, (6, 2), dtype) for dtype in DTYPES],
    ],
)
def test_rotary(dim: int, heads: tuple[int, int], rows: int | None, dtype: torch.dtype) -> None:
    angles = 3 * draw(5, *([rows] if rows else []), 5, dim // 2).detach()
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    inputs = tuple(draw(n, 2, 5, count, dim, dtype=dtype) for n, count in enumerate(heads))

    assert compare(ours, true_rotary, inputs, **tables) <= 1


STRIDED = {
    "columns first": lambda: draw(1, 70, 9).T,
    "every second column": lambda: draw(1, 9, 140)[:, ::2],
    "every third row": lambda: draw(1, 27, 70)[::3],
    "part of wider rows": lambda: draw(1, 9, 100)[:, 17:87],
    "one row for all": lambda: draw(1, 1, 70).expand(9, 70),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout: str) -> None:
    x = STRIDED[layout]()
    assert compare(rms, true_rms, (x, draw(2, 70), draw(3, 9, 70))) <= 1
    assert compare(layer, true_layer, (x, draw(2, 70), draw(3, 70))) <= 1
    assert compare(layer, true_layer, (draw(4, 9, 70), draw(2, 70), draw(3, 70), x)) <= 1
    assert compare(swiglu, true_swiglu, (x, draw(2, 9, 70))) <= 1
    for bias in (draw(2, 70), draw(2, 140)[::2]):
        assert compare(bias_gelu, true_bias_gelu, (x, bias), tanh=True) <= 1


def test_more_dimensions_and_views_of_one_matrix() -> None:
    both = draw(1, 2, 3, 4, 40)
    gate, up = both.chunk(2, -1)
    made = swiglu(gate, up, backend="triton")
    torch.testing.assert_close(made, F.silu(gate) * up, rtol=1e-5, atol=1e-5)
    q, k = draw(2, 2, 5, 12, 8).split([8, 4], 2)  # neighbours in one projection
    angles = draw(3, 5, 4).detach()
    for got, true in zip(
        rotary(q, k, angles.cos(), angles.sin(), backend="triton"),
        true_rotary(q.double(), k.double(), cos=angles.cos(), sin=angles.sin()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rms, added", "layer, added"])
def test_gradients_are_the_same_bits_every_time(kind: str) -> None:
    inputs, run = norm_inputs(1, 50, 70, kind, torch.float32), NORMS[kind][0]
    first, second = (
        torch.autograd.grad(sum(t.square().sum() for t in run(*inputs, backend="triton")), inputs)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["rms, added", "layer, added"])
def test_x_and_the_residual_share_no_gradient(kind: str) -> None:
    """It is one tensor on its way; what leaves keep may be changed in place."""
    x, *weights, residual = norm_inputs(1, 5, 70, kind, torch.float32)
    for _ in range(2):
        out, total = NORMS[kind][0](x, *weights, residual, backend="triton")
        (out.square().sum() + total.sum() + residual.sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    torch.testing.assert_close(residual.grad, x.grad + 2)


BROKEN: list[tuple[str, str, str, str]] = [
    # module, what the kernel says, what it says when broken, the kind that must fail
    ("norm.triton", "known = columns < size", "known = columns < size - 1", "rms"),
    ("norm.triton", "wide * scale * tl.load", "wide * tl.load", "rms"),
    ("norm.triton", "wide = stored.to(tl.float32)", "wide = stored.to(tl.float32) * 0.5", "rms, added"),
    ("norm.triton", "made -= tl.sum(inner, 0) / size", "made -= 0.0", "layer"),
    ("norm.triton", "made += tl.load(grad_total", "made += 0.0 * tl.load(grad_total", "rms, added"),
    ("norm.triton", "made += tl.load(grad_total", "made += 0.0 * tl.load(grad_total", "layer, added"),
    ("norm.triton", "wide += tl.load(residual", "wide += 0.5 * tl.load(residual", "layer, added"),
    ("norm.triton", "for_weight += above * normed", "for_weight += above", "layer, biased"),
    ("norm.triton", "tl.where(row < rows, size, 0)", "tl.where(row < rows - 1, size, 0)", "rms"),
    ("gated.triton", "known = columns < size", "known = columns < size - 1", "swiglu"),
    ("gated.triton", "part + x * part * (1.0 - part) * inner", "part", "swiglu"),
    ("gated.triton", "1.0 + 3.0 * cubic * x * x", "1.0 + cubic * x * x", "geglu"),
    (
        "gelu.triton",
        "known = (row < rows) & (columns < size)",
        "known = (row < rows) & (columns < size - 1)",
        "bias_gelu",
    ),
    ("gelu.triton", "+ x * density * tl.exp(-0.5 * x * x)", "", "bias_gelu"),
    ("gelu.triton", "total += made", "total += above", "bias_gelu"),
    ("gelu.triton", "row = program * rows_each", "row = program * (rows_each - 1)", "bias_gelu"),
    ("rope.triton", "(pair < half)", "(pair < half - 1)", "rotary"),
    ("rope.triton", "b * c + a * s", "b * c - a * s", "rotary"),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0]}: {case[2]}")
def test_a_broken_kernel_fails(
    case: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module_name, right, wrong, kind = case
    module = import_module(f"megatrain_kernels.{module_name}")
    source = open(str(module.__file__)).read()  # noqa: SIM115
    assert right in source
    broken = break_module(tmp_path, source.replace(right, wrong))
    for name in (
        "normalize",
        "gradients",
        "gated_forward",
        "gated_backward",
        "rotate",
        "bias_gelu_forward",
        "bias_gelu_backward",
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(broken, name))
    if kind == "rotary":
        angles = draw(5, 7, 6).detach()
        tables = {"cos": angles.cos(), "sin": angles.sin()}

        found = compare(ours, true_rotary, (draw(1, 3, 7, 2, 12), draw(2, 3, 7, 1, 12)), **tables)
    elif kind == "bias_gelu":
        found = compare(bias_gelu, true_bias_gelu, (draw(1, 25, 65), draw(2, 65)), tanh=False)
    elif kind in GATED:
        found = compare(*GATED[kind], (draw(1, 5, 65), draw(2, 5, 65)))
    else:
        found = compare(*NORMS[kind], norm_inputs(1, 5, 65, kind, torch.float32))
    assert not found <= 1


def test_operators_are_well_formed() -> None:
    x, weight, residual = norm_inputs(1, 3, 20, "rms, added", torch.float32)
    torch.library.opcheck(norm_op, (x, residual, weight, None, EPS, False, "triton"))
    torch.library.opcheck(norm_op, (x, None, weight, draw(4, 20), EPS, True, "triton"))
    stats = (draw(6, 3).detach(), draw(7, 3).detach())
    plain = tuple(t.detach() for t in (x, residual, x, weight))
    torch.library.opcheck(norm_backward_op, (*plain, *stats, True, "triton"))
    gate, up = draw(1, 3, 20), draw(2, 3, 20)
    torch.library.opcheck(gated_op, (gate, up, True, "triton"))
    torch.library.opcheck(bias_gelu_op, (gate, weight, True, "triton"))
    torch.library.opcheck(
        bias_gelu_backward_op, (up.detach(), gate.detach(), weight.detach(), False, "triton")
    )
    torch.library.opcheck(gated_backward_op, (up.detach(), gate.detach(), up.detach(), False, "triton"))
    q, k, angles = draw(1, 2, 5, 3, 8), draw(2, 2, 5, 1, 8), draw(3, 5, 4).detach()
    torch.library.opcheck(rotary_op, (q, k, angles.cos(), angles.sin(), False, "triton"))


@pytest.mark.parametrize(
    "kind", ["rms, added", "layer, biased", "layer, added", "swiglu", "geglu", "bias_gelu", "rotary"]
)
def test_plain_pytorch_takes_over_where_a_kernel_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback of the operators, against the same truth."""
    for folder in ("norm", "gated", "gelu", "rope"):
        module = import_module(f"megatrain_kernels.{folder}.op")
        monkeypatch.setattr(module, "run_triton", lambda *args, **kwargs: None)
    if kind == "rotary":
        q, k, angles = draw(1, 2, 5, 3, 8), draw(2, 2, 5, 1, 8), draw(3, 5, 4).detach()
        made = rotary(q, k, angles.cos(), angles.sin(), backend="triton")
        true = true_rotary(q.double(), k.double(), cos=angles.cos(), sin=angles.sin())
        for got, exact in zip(made, true, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    elif kind == "bias_gelu":
        for tanh in (True, False):
            assert compare(bias_gelu, true_bias_gelu, (draw(1, 5, 65), draw(2, 65)), tanh=tanh) <= 1
    elif kind in GATED:
        assert compare(*GATED[kind], (draw(1, 5, 65), draw(2, 5, 65))) <= 1
    else:
        assert compare(*NORMS[kind], norm_inputs(1, 5, 65, kind, torch.float32)) <= 1


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rotary", "swiglu", "geglu", "bias_gelu"])
def test_cases_make_inputs_of_their_sizes(name: str) -> None:
    kernel = KERNELS[name]
    suite = kernel.suite
    for case in suite.cases:
        small = type(case)(case.name, {key: min(size, 8) for key, size in case.sizes.items()}, case.options)
        inputs, options = suite.make_inputs(small, dtype=torch.float32, device="cpu")
        kernel.function(*inputs, **options, backend="triton")
        moved = sum(t.nbytes for t in inputs if isinstance(t, Tensor))
        assert suite.cost(small, itemsize=4).bytes >= 0.9 * moved  # every input is read
        assert suite.cost(small, itemsize=4).bytes < suite.cost(small, itemsize=4, backward=True).bytes * 1.5
