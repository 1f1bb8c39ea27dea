"""Attention's kernels for Hopper on a machine in Python (gluon_machine): right in every order that a GPU may take."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_check import CASES, Problem, errors, right
from gluon_machine import Barrier, Descriptor, Machine, Pointer, WrongKernelError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatrain_kernels import attention
from megatrain_kernels.flash_attention import triton_hopper

HOPPER = {
    name: replace(problem, dtype=torch.bfloat16)
    for name, problem in CASES.items()
    if problem.sizes[5:] in ((64, 64), (128, 128)) and problem.sizes[2] and "softcap" not in problem.options
}
LONG = {
    "two blocks of keys": Problem((1, 256, 256, 1, 1, 64, 64), dtype=torch.bfloat16),
    "ragged": Problem((1, 333, 333, 2, 1, 64, 64), dtype=torch.bfloat16),
    "head 128, float16": Problem((1, 300, 300, 1, 1, 128, 128), dtype=torch.float16),
    "window": Problem((1, 600, 600, 1, 1, 64, 64), {"window": 130}, torch.bfloat16),
    "documents": Problem((2, 450, 450, 1, 1, 64, 64), dtype=torch.bfloat16, documents=150),
    "many documents": Problem((1, 300, 300, 2, 2, 64, 64), {"causal": False}, torch.bfloat16, documents=20),
    "part of a prompt": Problem((1, 200, 600, 4, 2, 64, 64), {"q_offset": 400}, torch.bfloat16),
}
SEEDS: list[int] = []
"""Of the next kernels' machines; 0 for the others."""
PROGRAMS = 3  # fewer than tiles, so that each takes several


@pytest.fixture(autouse=True)
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels on machines."""

    def run(kernel: Any, programs: int, *args: Any, warps: int, **constants: Any) -> None:
        Machine(SEEDS.pop(0) if SEEDS else 0).launch(kernel, programs, *map(_given, args), **constants)

    monkeypatch.setattr(triton_hopper, "run", run)
    monkeypatch.setattr(triton_hopper, "processors", lambda x: PROGRAMS)


def _given(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return Descriptor(x.base, tuple(x.block_shape))
    return Pointer(x) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("problem", [*HOPPER.values(), *LONG.values()], ids=[*HOPPER, *LONG])
def test_case(problem: Problem) -> None:
    found = errors(problem, "triton_hopper")
    assert right(found), found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.integers(0, 1 << 30),
    sizes=st.sampled_from([(200, 200), (70, 300), (300, 200)]),
    window=st.sampled_from([None, 1, 90]),
    causal=st.booleans(),
    offset=st.sampled_from([-100, 0, 60]),
)
def test_any_order(first: int, sizes: tuple[int, int], window: int | None, causal: bool, offset: int) -> None:
    SEEDS[:] = [first, first + 1]
    options = {"window": window, "causal": causal, "q_offset": offset}
    found = errors(Problem((1, *sizes, 2, 1, 64, 64), options, torch.bfloat16), "triton_hopper")
    assert right(found), found


def _wrong(act: Callable[[], dict[str, float]]) -> bool:
    """Return whether a run is wrong or refused by the machine."""
    try:
        return not right(act())
    except WrongKernelError:
        return True


def _without_wait(patch: pytest.MonkeyPatch, kept: Callable[[int], bool]) -> None:
    """Let waits that `kept` does not hold pass at once."""
    passed, calls = Barrier.passed, iter(range(1 << 30))
    patch.setattr(Barrier, "passed", lambda bar, phase: passed(bar, phase) or not kept(next(calls)))


@pytest.mark.parametrize("name", ["two blocks of keys", "window"])
def test_a_wait_that_is_left_out_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_wait(monkeypatch, lambda call: call % 50 != 7)
    assert any(_wrong(lambda: errors(LONG[name], "triton_hopper")) for _ in range(3))


def test_a_missing_fence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Machine.__init__

    def without(machine: Machine, seed: int) -> None:
        plain(machine, seed)
        machine.names["fence_async_shared"] = lambda: None

    monkeypatch.setattr(Machine, "__init__", without)
    with pytest.raises(WrongKernelError, match="without a fence"):
        errors(LONG["ragged"], "triton_hopper")


def test_a_deadlock_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Barrier, "passed", lambda bar, phase: False)
    with pytest.raises(WrongKernelError, match="all wait"):
        errors(LONG["ragged"], "triton_hopper")


def test_what_it_does_not_take_is_refused() -> None:
    x = torch.zeros(1, 8, 1, 64)
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        attention(x, x, x, backend="triton_hopper")
    with pytest.raises(ValueError, match="heads of 64 or 128; got 32 and 32"):
        attention(*[x[..., :32].bfloat16()] * 3, backend="triton_hopper")
    with pytest.raises(ValueError, match="no soft-cap"):
        attention(*[x.bfloat16()] * 3, softcap=3.0, backend="triton_hopper")


def test_views_of_one_projection_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(replace(LONG["ragged"], layout="fused"), "triton_hopper")
    assert right(found), found
