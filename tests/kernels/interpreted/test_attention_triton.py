"""Attention's Triton kernels, with log-sum-exp and gradients, against float64; blocks are 64 queries by 32 keys."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from attention_check import CASES, Problem, draw, errors, right
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain_kernels import attention
from megatrain_kernels.flash_attention.reference import attention_reference

DESCRIBED = (
    "causal",
    "groups of three",
    "window",
    "documents, full",
    "head 192, values 128",
    "prefill in parts",
)
HALF = ("causal", "window, later keys too", "documents and window", "soft-cap", "head 192, values 128")


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_case(problem: Problem) -> None:
    found = errors(problem, "triton")
    assert right(found), found


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_case_in_five_products(problem: Problem) -> None:
    found = errors(problem, "triton_fused")
    assert right(found), found


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
@pytest.mark.parametrize("name", DESCRIBED)
def test_tensor_descriptors(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = import_module("megatrain_kernels.flash_attention.triton")
    monkeypatch.setitem(launcher.INTERPRETED, "TMA", True)
    found = errors(CASES[name], backend)
    assert right(found), found


def test_a_descriptor_off_by_a_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = import_module("megatrain_kernels.flash_attention.triton")
    monkeypatch.setitem(launcher.INTERPRETED, "TMA", True)
    for file in ("triton_forward", "triton_backward"):
        module = import_module(f"megatrain_kernels.flash_attention.{file}")
        _a_row_further(module, monkeypatch)
    found = errors(CASES["causal"], "triton")
    assert not right(found), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HALF)
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    found = errors(Problem(case.sizes, case.options, dtype, case.documents), "triton")
    assert right(found), found


@st.composite
def problems(drawn: st.DrawFn) -> Problem:
    choose = drawn
    q_seq, k_seq = choose(st.integers(1, 100)), choose(st.integers(1, 100))
    kv_heads, group = choose(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    dim, v_dim = choose(st.sampled_from([(16, 16), (64, 64), (24, 40)]))
    options: dict[str, Any] = {
        "causal": choose(st.booleans()),
        "window": choose(st.none() | st.integers(1, 80)),
        "softcap": choose(st.sampled_from([None, 3.0])),
        "q_offset": choose(st.integers(-60, 120)),
    }
    documents = choose(st.none() | st.integers(2, 50))
    if documents:
        k_seq = max(q_seq, k_seq)
        options["q_offset"] = choose(st.integers(0, k_seq - q_seq))
    sizes = (1, q_seq, k_seq, kv_heads * group, kv_heads, dim, v_dim)
    dtype = choose(st.sampled_from([torch.float32, torch.float16]))
    layout = choose(st.sampled_from(["contiguous", "heads first"]))
    return Problem(sizes, options, dtype, documents, layout, choose(st.integers(0, 1000)))


@settings(max_examples=12)
@given(problem=problems())
def test_any(problem: Problem) -> None:
    found = errors(problem, "triton")
    assert right(found), found


def test_rows_that_see_nothing_are_zero() -> None:
    (q, k, v), options = draw(CASES["some queries before all keys"])
    out, lse = attention(q, k, v, return_lse=True, backend="triton", **options)
    grad_q, _, _ = torch.autograd.grad((out.sum(), lse[..., 30:].sum()), (q, k, v), (torch.ones(()),) * 2)
    assert not out[:, :30].any()
    assert not grad_q[:, :30].any()
    assert lse[..., :30].isneginf().all()
    assert lse[..., 30:].isfinite().all()


def test_packed_sequences_equal_separate_ones() -> None:
    lengths = [1, 37, 64, 5, 20]
    (q, k, v), _ = draw(Problem((1, 127, 127, 2, 1, 16, 16)))
    doc_ids = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    out = attention(q, k, v, doc_ids=doc_ids, backend="triton")
    assert isinstance(out, Tensor)
    parts = zip(*(t.double().split(lengths, dim=1) for t in (q, k, v)), strict=True)
    truth = torch.cat([attention_reference(*part)[0] for part in parts], dim=1)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


def test_documents_in_any_order() -> None:
    """The ids need not rise: ranges then hold more than the document, never less."""
    (q, k, v), _ = draw(Problem((1, 101, 101, 1, 1, 16, 16)))
    doc_ids = torch.randint(-2, 3, (1, 101), generator=torch.Generator().manual_seed(0))
    out = attention(q, k, v, doc_ids=doc_ids, causal=False, backend="triton")
    truth, _ = attention_reference(q.double(), k.double(), v.double(), doc_ids=doc_ids, causal=False)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", ["documents and window", "groups of three"])
def test_gradients_have_the_same_bits_every_time(name: str) -> None:
    inputs, options = draw(CASES[name])

    def gradients() -> tuple[Tensor, ...]:
        out = attention(*inputs, backend="triton", **options)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view_as(out))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


# Which tokens are NaN or infinite, and which must not notice: whole blocks, hidden from each other.
HIDDEN: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "another document": ({"doc_ids": torch.arange(256)[None] // 128, "causal": False}, (128, 256), (0, 128)),
    "an earlier document": ({"doc_ids": torch.arange(256)[None] // 64}, (0, 64), (64, 256)),
    "before the window": ({"window": 33}, (0, 64), (128, 256)),
    "before an open window": ({"window": 33, "causal": False}, (0, 64), (128, 256)),
    "after the query": ({}, (128, 256), (0, 128)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN in the rows that do see the poison
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_blocks_are_never_read(name: str, poison: float) -> None:
    """Forward and for the queries' gradients keys are poisoned; for the keys' gradients queries."""
    options, hidden, seeing = HIDDEN[name]
    inputs, _ = draw(Problem((1, 256, 256, 1, 1, 16, 16)))
    clean = [t.detach().clone().requires_grad_() for t in inputs]
    dirty = [t.detach().clone() for t in inputs]
    for tensor in dirty[1:]:
        tensor[:, slice(*hidden)] = poison
    for tensor in dirty:
        tensor.requires_grad_()
    results = []
    for q, k, v in (clean, dirty):
        out = attention(q, k, v, backend="triton", **options)
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad(out[:, slice(*seeing)].sum(), q)
        results.append((out[:, slice(*seeing)], grad[:, slice(*seeing)]))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["another document", "an earlier document"])
def test_hidden_queries_are_never_read(name: str) -> None:
    options, hidden, seeing = HIDDEN[name]
    inputs, _ = draw(Problem((1, 256, 256, 1, 1, 16, 16)))
    grads = []
    for value in (0.5, float("nan")):
        q, k, v = (t.detach().clone() for t in inputs)
        q[:, slice(*hidden)] = value
        out = attention(*(t.requires_grad_() for t in (q, k, v)), backend="triton", **options)
        assert isinstance(out, Tensor)
        grads.append([g[:, slice(*seeing)] for g in torch.autograd.grad(out.sum(), (k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def _a_row_further(module: Any, patch: pytest.MonkeyPatch) -> None:
    found = module.load_rows
    patch.setattr(module, "load_rows", lambda base, first, *rest: found(base, first + 1, *rest))


def _one_further(module: Any, patch: pytest.MonkeyPatch) -> None:
    visible = module.visible
    patch.setattr(module, "visible", lambda r, c, k, offset, *rest: visible(r, c, k, offset + 1, *rest))


def _shifted_documents(module: Any, patch: pytest.MonkeyPatch) -> None:
    found = module.doc_range
    patch.setattr(module, "doc_range", lambda *at: found(*at[:4], at[4] + 16, *at[5:]))


def _never_mixed(module: Any, patch: pytest.MonkeyPatch) -> None:
    found = module.doc_range
    patch.setattr(module, "doc_range", lambda *given: (*found(*given)[:2], 0))


BREAKS = {
    "mask, forward": ("triton_forward", _one_further, "window"),
    "mask, backward": ("triton_backward", _one_further, "window"),
    "documents, forward": ("triton_forward", _shifted_documents, "documents"),
    "documents, backward": ("triton_backward", _shifted_documents, "documents"),
    "documents taken for one, forward": ("triton_forward", _never_mixed, "documents, full"),
    "documents taken for one, backward": ("triton_backward", _never_mixed, "documents, full"),
}


@pytest.mark.parametrize(("file", "breaks", "name"), BREAKS.values(), ids=BREAKS)
def test_a_broken_mask_is_noticed(file: str, breaks: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(import_module(f"megatrain_kernels.flash_attention.{file}"), monkeypatch)
    assert not right(errors(CASES[name], "triton"))


@pytest.mark.parametrize("name", ["LOG2E", "DELTA_BLOCK"])
def test_a_broken_launch_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is off by a thousandth; a program too few, whose rows are never written."""
    launcher = import_module("megatrain_kernels.flash_attention.triton")
    if name == "LOG2E":
        monkeypatch.setattr(launcher, "LOG2E", 1.001 * launcher.LOG2E)
    else:
        kernel = launcher.delta_kernel
        monkeypatch.setattr(launcher, "delta_kernel", {(8,): kernel[(7,)]})
    assert not right(errors(CASES["causal"], "triton"))


@pytest.mark.parametrize("name", ["documents and window", "soft-cap"])
def test_operator_keeps_its_contract(name: str) -> None:
    """Schema, fake shapes and strides, and the gradient's registration, as torch checks them."""
    problem = CASES[name]
    inputs, options = draw(Problem((1, 33, 33, 2, 1, 16, 24), problem.options, documents=problem.documents))
    operation = import_module("megatrain_kernels.flash_attention.op")
    rule = (True, 0.25, options.get("window"), options.get("softcap"), 0, "triton")
    doc_ids = options.get("doc_ids")
    torch.library.opcheck(operation.attention_op, (*inputs, doc_ids, *rule))
    q, k, v = (t.detach() for t in inputs)
    out, lse = operation.attention_op(q, k, v, doc_ids, *rule)
    args = (q, k, v, out, lse, torch.ones_like(out), torch.ones_like(lse), doc_ids, *rule)
    torch.library.opcheck(operation.attention_backward_op, args)


def test_pytorch_takes_over_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = import_module("megatrain_kernels.flash_attention.op")
    launcher = import_module("megatrain_kernels.flash_attention.triton")

    def fails(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(operation, "ATTENTION", replace(operation.ATTENTION, runs_on=lambda x: True))
    monkeypatch.setattr("megatrain_kernels.kernel._failed", set())
    monkeypatch.setattr(launcher, "attention_forward", fails)
    (q, k, v), _ = draw(Problem((1, 20, 20, 1, 1, 16, 16)))
    q, k, v = (t.detach() for t in (q, k, v))
    with pytest.warns(UserWarning, match="no such instruction"):
        _, lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, attention_reference(q, k, v)[1])
    attention(q, k, v, return_lse=True)  # a second warning would be an error
    with pytest.raises(RuntimeError, match="no such instruction"):
        attention(q, k, v, return_lse=True, backend="triton")
