"""Attention's PyTorch paths against float64: in chunks with log-sum-exp and soft-cap, and torch's fused operation."""

from importlib import import_module
from typing import Any

import pytest
import torch
from attention_check import CASES, ROUNDINGS, Problem, draw, error, errors, right
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatrain_kernels import attention
from megatrain_kernels.flash_attention.cases import cost, make_inputs, visible_pairs
from megatrain_kernels.flash_attention.reference import allowed, attention_reference
from megatrain_kernels.kernel import Case

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
chunked = import_module("megatrain_kernels.flash_attention.torch")
operation = import_module("megatrain_kernels.flash_attention.op")


def retyped(problem: Problem, dtype: torch.dtype) -> Problem:
    return Problem(problem.sizes, problem.options, dtype, problem.documents, problem.layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_chunks(problem: Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _, k_seq, heads, *_ = problem.sizes
    # 24 queries at a time; the last chunk is shorter.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", {"cpu": 24 * batch * heads * max(1, k_seq)})
    found = errors(retyped(problem, dtype), "torch")
    assert right(found), found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "softcap" not in case.options])
def test_fused(name: str, dtype: torch.dtype) -> None:
    """Without log-sum-exp and soft-cap: torch's operation, or blocks of queries, also where a row sees nothing."""
    problem = retyped(CASES[name], dtype)
    inputs, options = draw(problem)
    truths = [t.detach().double().requires_grad_() for t in inputs]
    truth, _ = attention_reference(*truths, **options)
    cotangent = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    true_grads = torch.autograd.grad(truth, truths, cotangent.double())
    out = attention(*inputs, **options)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, inputs, cotangent)
    # Here 16-bit scores are rounded too, and their sums over blocks: a few roundings more.
    tolerance = 4 * ROUNDINGS[dtype] * torch.finfo(dtype).eps
    for mine, true in zip((out, *grads), (truth, *true_grads), strict=True):
        assert error(mine, true) <= tolerance


@settings(max_examples=40)
@given(
    q_seq=st.integers(0, 9),
    k_seq=st.integers(0, 9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    q_offset=st.integers(-12, 12),
)
def test_who_sees_whom(q_seq: int, k_seq: int, causal: bool, window: int | None, q_offset: int) -> None:
    """The mask, the shortcuts around it, and the range of keys that a chunk reads, pair by pair."""
    expected = [
        [
            (not causal or key <= query + q_offset) and (window is None or key > query + q_offset - window)
            for key in range(k_seq)
        ]
        for query in range(q_seq)
    ]
    mask = allowed(q_seq, k_seq, causal=causal, window=window, q_offset=q_offset, device=torch.device("cpu"))
    assert mask.tolist() == expected
    rule = import_module("megatrain_kernels.flash_attention.reference").Rule(
        causal, 1.0, window, None, q_offset
    )
    if rule.sees_all(k_seq):
        assert mask.all()
    elif not rule.masks(q_seq, k_seq):
        assert torch.equal(mask, torch.ones_like(mask).tril())
    first, last = rule.keys(2, min(5, q_seq), k_seq)
    assert not mask[2:5, :first].any()
    assert not mask[2:5, last:].any()
    sizes = {"q_seq": q_seq, "k_seq": k_seq}
    options = {"causal": causal, "window": window, "q_offset": q_offset}
    assert visible_pairs(sizes, options) == mask.sum()


def test_a_wrong_scale_or_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chunked, "allowed", lambda *a, q_offset, **o: allowed(*a, q_offset=q_offset + 1, **o))
        assert not right(errors(CASES["window"], "torch"))
    scores = chunked._scores
    monkeypatch.setattr(chunked, "_scores", lambda q, *rest: scores(q * 1.001, *rest))
    assert not right(errors(CASES["causal"], "torch"))


@pytest.mark.parametrize("name", ["documents and window", "soft-cap", "groups of three"])
def test_operator_keeps_its_contract(name: str) -> None:
    """Schema, fake shapes and strides, and the gradient's registration, as torch checks them."""
    problem = CASES[name]
    inputs, options = draw(Problem((2, 33, 33, 4, 2, 16, 24), problem.options, documents=problem.documents))
    rule = (True, 0.25, options.get("window"), options.get("softcap"), 0, "torch")
    doc_ids = options.get("doc_ids")
    torch.library.opcheck(operation.attention_op, (*inputs, doc_ids, *rule))
    q, k, v = (t.detach() for t in inputs)
    out, lse = operation.attention_op(q, k, v, doc_ids, *rule)
    args = (q, k, v, out, lse, torch.ones_like(out), torch.ones_like(lse), doc_ids, *rule)
    torch.library.opcheck(operation.attention_backward_op, args)


def test_compiles_in_one_graph() -> None:
    inputs, options = draw(CASES["soft-cap"])

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention(q, k, v, return_lse=True, **options)
        return out.square().sum() + lse.sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 2, "q_offset": 3}])
def test_shapes_are_known_without_data(options: dict[str, Any]) -> None:
    q, k, v = (torch.zeros(2, 4, heads, dim, device="meta") for heads, dim in ((4, 8), (2, 8), (2, 6)))
    out, lse = attention(q, k, v, return_lse=True, **options)
    assert out.shape == (2, 4, 4, 6)
    assert lse.shape == (2, 4, 4)
    assert attention(q, k, v, **options).shape == out.shape  # type: ignore[union-attr]


def test_autocast_rounds_inputs_and_nothing_else() -> None:
    (q, k, v), _ = draw(CASES["causal"])
    q16, k16, v16 = (t.bfloat16() for t in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        got, lse = attention(q, k16, v, return_lse=True)
        double = attention(q.double(), k.double(), v.double())
    expected, _ = attention(q16, k16, v16, return_lse=True)
    assert torch.equal(got, expected)
    assert got.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert isinstance(double, Tensor)
    assert double.dtype == torch.float64


def test_flops_are_counted_and_cost_agrees() -> None:
    """Where all pairs are seen the least work is all the work: 2 products of 2·q·k·dim forward, 5 backward."""
    case = Case(
        "full",
        {"batch": 2, "q_seq": 12, "k_seq": 20, "heads": 4, "kv_heads": 2, "head_dim": 8, "v_dim": 6},
        {"causal": False, "softcap": 2.0},
    )
    inputs, options = make_inputs(case, dtype=torch.float32, device="cpu")
    with FlopCounterMode(display=False) as counter:
        out = attention(*(t.requires_grad_() for t in inputs), **options)
        forward = counter.get_total_flops()
        assert isinstance(out, Tensor)
        out.sum().backward()
    assert forward == cost(case, itemsize=4).flops == 2 * (2 * 4 * 12 * 20) * (8 + 6)
    backward = cost(case, itemsize=4, backward=True).flops
    assert counter.get_total_flops() - forward == backward == 2 * (2 * 4 * 12 * 20) * (3 * 8 + 2 * 6)
    numbers = sum(t.numel() for t in (*inputs, out))
    assert cost(case, itemsize=4).bytes == 4 * (numbers + 2 * 4 * 12)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"window": 0}, "window=0"),
    ({"softcap": -1.0}, "softcap=-1.0"),
    (
        {"doc_ids": torch.zeros(1, 3, dtype=torch.int64)},
        r"doc_ids must be integers \(1, 4\), .* got doc_ids \(1, 3\)",
    ),
    ({"doc_ids": torch.zeros(1, 4, dtype=torch.int64), "q_offset": 1}, "queries must lie among the keys"),
    ({"backend": "triton"}, "backend='triton' needs a CUDA device"),
    ({"backend": "fast"}, "backend='fast'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **options)


def test_tensors_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="v as k but for v_dim; got"):
        attention(x, x[:, :3], x)
    with pytest.raises(ValueError, match="one type"):
        attention(x, x, x.double())
