"""What the GPU benchmark calls right: a right kernel passes, and each way to be slightly wrong fails."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import correctness
from benchmarks.gpu.attention_truth import attention_truth
from benchmarks.gpu.bounds import BOUNDS
from benchmarks.gpu.correctness import Check, deviations, steps
from benchmarks.gpu.long_cases import LONG
from benchmarks.gpu.poison import deterministic
from benchmarks.gpu.rounding import Rounding, excess, rounding
from benchmarks.gpu.steps import Setting
from megatrain_kernels.flash_attention.reference import attention_reference
from megatrain_kernels.kernel import KERNELS, Case, Kernel, sized

CPU = torch.device("cpu")
ATTENTION = KERNELS["attention"]
CASES = {case.name: case for case in ATTENTION.suite.small}
SHAPE = "batch q_seq k_seq heads kv_heads head_dim v_dim"


def checked(
    function: Callable[..., Any],
    case: Case,
    kernel: Kernel = ATTENTION,
    *,
    dtype: torch.dtype = torch.bfloat16,
    lse: bool | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """What is found of the kernel with another function; attention with its log-sum-exp, so that scores are float32.

    The truth stays the right kernel's.
    """
    suite = kernel.suite
    if suite.truth is None and kernel is not ATTENTION:

        def truth(*given: Any, **options: Any) -> Any:
            wide = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given)
            return kernel.function(*wide, **options, backend="reference")

        suite = dataclasses.replace(suite, truth=truth)
    named = kernel.name  # of the public function
    function.__name__ = named
    changed = dataclasses.replace(kernel, function=function, suite=suite)
    with_lse = kernel is ATTENTION if lse is None else lse
    return deviations(CPU, Check(changed, case, dtype, "auto", with_lse))


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return ATTENTION.function(q, k, v, **options, scale=1.02 * q.shape[-1] ** -0.5)


def one_key_more(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return ATTENTION.function(q, k, v, **{**options, "q_offset": options.get("q_offset", 0) + 1})


def one_key_less(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return ATTENTION.function(q, k, v, **{**options, "q_offset": options.get("q_offset", 0) - 1})


def window_off_by_one(q: Tensor, k: Tensor, v: Tensor, *, window: int, **options: Any) -> Any:
    return ATTENTION.function(q, k, v, window=window + 1, **options)


def documents_off_by_one(q: Tensor, k: Tensor, v: Tensor, *, doc_ids: Tensor, **options: Any) -> Any:
    return ATTENTION.function(q, k, v, doc_ids=doc_ids.roll(1, 1), **options)


def no_softcap_in_the_gradient(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    capped, plain = (
        ATTENTION.function(q, k, v, **options),
        ATTENTION.function(q, k, v, **{**options, "softcap": None}),
    )
    return tuple(p + (c - p).detach() for c, p in zip(capped, plain, strict=True))


def lse_without_gradient(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    out, lse = ATTENTION.function(q, k, v, **options)
    return out, lse.detach() + 0 * lse


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_right_attention_passes(name: str, dtype: torch.dtype) -> None:
    for lse in (False, True):
        errors, facts = deviations(CPU, Check(ATTENTION, CASES[name], dtype, "auto", lse))
        assert max(errors.values()) <= 1, errors
        assert set(errors) == {
            *(f"output {n}" for n in range(1 + lse)),
            *(f"gradient {n}" for n in range(3)),
        }
        assert facts == {"candidates": 1, "same_bits": True}


@pytest.mark.parametrize(
    ("wrong", "name", "where"),
    [
        (wrong_scale, "causal_64", "output 0"),
        (wrong_scale, "causal_128", "gradient 0"),
        (wrong_scale, "full_128", "gradient 1"),
        (wrong_scale, "documents", "output 1"),
        (one_key_more, "causal_64", "output 0"),
        (one_key_more, "causal_128", "gradient 2"),
        (one_key_less, "causal_64", "output 0"),
        (one_key_less, "causal_128", "gradient 1"),
        (window_off_by_one, "window", "output 0"),
        (documents_off_by_one, "documents", "output 0"),
        (no_softcap_in_the_gradient, "softcap_256", "gradient 0"),
        (lse_without_gradient, "causal_64", "gradient 0"),
        (lse_without_gradient, "causal_64", "gradient 1"),
    ],
)
def test_attention_that_is_slightly_wrong_fails(wrong: Callable[..., Any], name: str, where: str) -> None:
    errors, _ = checked(wrong, CASES[name])
    assert errors[where] > 1, errors


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [wrong_scale, one_key_more])
def test_a_long_attention_that_is_slightly_wrong_fails(wrong: Callable[..., Any]) -> None:
    """At 1,024 tokens, where most probabilities are small, as right attention passes."""
    case = sized(SHAPE, "long", "1 1024 1024 2 1 64 64")
    assert max(checked(lambda *given, **o: ATTENTION.function(*given, **o), case)[0].values()) <= 1
    assert checked(wrong, case)[0]["output 0"] > 1


def test_an_element_that_is_never_written_is_seen() -> None:
    def unfinished(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        out, lse = ATTENTION.function(q, k, v, **options)
        place = torch.empty_like(out)
        place[:, :-1] = out[:, :-1]
        return place, lse

    assert checked(unfinished, CASES["full_128"])[0]["output 0"] == torch.inf


def test_two_calls_that_differ_in_a_bit_are_told() -> None:
    count = 0

    def drifting(gate: Tensor, up: Tensor, **options: Any) -> Tensor:
        nonlocal count
        count += 1
        out: Tensor = KERNELS["swiglu"].function(gate, up, **options)
        with torch.no_grad():
            out.view(-1)[0] = torch.nextafter(out.view(-1)[0], torch.tensor(count * 1.0).to(out))
        return out

    kernel = KERNELS["swiglu"]
    errors, facts = checked(drifting, kernel.suite.small[0], kernel, dtype=torch.float32)
    assert max(errors.values()) <= 1
    assert facts["same_bits"] is True  # both step up
    count = -2
    assert checked(drifting, kernel.suite.small[0], kernel, dtype=torch.float32)[1]["same_bits"] is False


def operations() -> list[Any]:
    """Each operation's first case in each of its types."""
    return [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name, kernel in KERNELS.items()
        if name in BOUNDS
        for dtype in kernel.suite.dtypes
    ]


@pytest.mark.parametrize(("name", "dtype"), operations())
def test_an_operation_that_is_2_percent_off_fails_in_each_output_and_gradient(
    name: str, dtype: torch.dtype
) -> None:
    kernel = KERNELS[name]
    case = kernel.suite.small[0]
    right, _ = deviations(CPU, Check(kernel, case, dtype, "auto"))
    assert max(right.values()) <= 1, right

    def scaled(*given: Any, **options: Any) -> Any:
        made = kernel.function(*given, **options)
        outputs = tuple(
            t * 1.02 if t.is_floating_point() and t.itemsize > 1 else t
            for t in (made if isinstance(made, tuple) else (made,))
        )
        return outputs if isinstance(made, tuple) else outputs[0]

    wrong, _ = checked(scaled, case, kernel, dtype=dtype)
    codes = {"output 0"} if name == "quantize" else set()  # of 8 bits: a code may be its neighbour
    assert {key for key, off in wrong.items() if off <= 1} == codes, wrong


def test_a_code_two_away_is_wrong() -> None:
    kernel = KERNELS["quantize"]

    def shifted(x: Tensor, **options: Any) -> Any:
        values, scales = kernel.function(x, **options)
        return values.clamp(-125, 125) + 2, scales

    case = next(case for case in kernel.suite.small if case.options["dtype"] == "int8")
    assert checked(shifted, case, kernel, dtype=torch.float32)[0]["output 0"] > 1


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 3.0}, {"causal": False}, {"q_offset": 9}])
def test_the_truth_of_attention_is_that_of_autograd(options: dict[str, Any]) -> None:
    """In float64, for grouped heads, documents and gradients of both results; chunks are of one query here."""
    queries = 23 if "q_offset" not in options else 14
    case = sized(SHAPE, "c", f"2 {queries} 23 4 2 8 6", **options)
    (q, k, v), given = ATTENTION.suite.make_inputs(case, dtype=torch.float64, device="cpu")
    given = {**given, "doc_ids": torch.tensor([[0] * 9 + [1] * 14, [0] * 23])}
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention_reference(*inputs, **given)
    grads = [torch.randn_like(t) for t in (out, lse)]
    expected = torch.autograd.grad([out, lse], inputs, grads)
    found = attention_truth((q.detach(), k.detach(), v.detach()), given, *grads, Rounding(0.0, 0.0, True))
    named = {"output 0": out, "output 1": lse, **{f"gradient {n}": t for n, t in enumerate(expected)}}
    assert set(found) == set(named)
    for name, each in named.items():
        torch.testing.assert_close(found[name][0], each.detach(), rtol=1e-12, atol=1e-12)


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), options = ATTENTION.suite.make_inputs(CASES["documents"], dtype=torch.bfloat16, device="cpu")
    grad = torch.randn(q.shape)
    whole = attention_truth((q, k, v), options, grad, None, rounding(torch.bfloat16))
    monkeypatch.setattr("benchmarks.gpu.attention_truth.CHUNK", 1 << 12)
    cut = attention_truth((q, k, v), options, grad, None, rounding(torch.bfloat16))
    for name, (value, allowed) in whole.items():
        torch.testing.assert_close(cut[name][0], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cut[name][1], allowed, rtol=1e-9, atol=1e-12)


def test_a_check_waits_for_memory_that_other_processes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "PAUSE_S", 0.0)
    calls: list[int] = []

    def crowded(_: object, check: Check) -> tuple[dict[str, float], dict[str, Any]]:
        calls.append(0)
        if len(calls) < 4:
            raise torch.OutOfMemoryError("all of it is in use")
        return {"output 0": 0.5}, {"same_bits": True, "candidates": 1}

    monkeypatch.setattr(correctness, "deviations", crowded)
    step = steps(Setting(CPU, small=True))[0]
    (row,) = step.run()
    assert row["right"]
    assert len(calls) == correctness.TRIES == 4
    monkeypatch.setattr(correctness, "TRIES", 2)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        step.run()


def test_excess() -> None:
    truth, allowed = torch.tensor([1.0, -torch.inf, 0.0]), torch.tensor([0.5, 0.0, 0.0])
    assert excess(truth, truth, allowed) == 0
    assert excess(truth + torch.tensor([0.25, 0.0, 0.0]), truth, allowed) == pytest.approx(0.5)
    assert excess(torch.tensor([1.0, torch.inf, 0.0]), truth, allowed) == torch.inf
    assert excess(torch.tensor([torch.nan, -torch.inf, 0.0]), truth, allowed) == torch.inf
    with pytest.raises(ValueError, match="shape"):
        excess(truth[:2], truth, allowed)


def test_new_memory_holds_nan_where_torch_is_deterministic() -> None:
    with deterministic():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_long_cases_are_checked_on_a_gpu_and_first() -> None:
    names = [step.name for step in steps(Setting(torch.device("cuda"), small=False))]
    assert names[0] == "attention causal_32k bfloat16 auto"
    assert "attention documents_8k bfloat16 triton lse" in names
    assert set(LONG) == set(KERNELS)
    lengths = {case.sizes["q_seq"] for case in LONG["attention"]}
    assert {1024, 8192, 32768} <= lengths
    assert not any("32k" in step.name for step in steps(Setting(CPU, small=True)))
