"""Candidates of a kernel's tuning, run one by one without timing: a wrong one is seen."""

import os
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.gpu.tuning import candidate, compiling
from megatrain_kernels.jit_types import Number, Pointer, constexpr

CONFIGS = [triton.Config({"ADDED": added}) for added in (1, 2, 3)]


def add(out: Pointer, size: Number, ADDED: constexpr) -> None:
    tl.store(out, ADDED)


with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
    add_kernel = triton.autotune(CONFIGS, key=["size"])(triton.jit(add))


def run() -> float:
    out = torch.zeros(1)
    add_kernel[(1,)](out, 1)
    return out.item()


def test_each_candidate_runs_once() -> None:
    found = []
    for number in range(4):
        with candidate(number) as seen:
            found.append(run())
    assert found == [1, 2, 3, 1]
    assert seen.candidates == 3
    assert add_kernel.cache == {}  # nothing was chosen


def test_a_kernel_without_candidates_has_one() -> None:
    with candidate(5) as seen:
        torch.zeros(1)
    assert seen.candidates == 1


@pytest.mark.parametrize(("part", "wanted"), [(0, [0, 2]), (1, [1]), (2, [])])
def test_compiling_takes_each_second_one_and_runs_the_first(
    part: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def warmup(*_: object, grid: object, **named: int) -> None:
        compiled.append(named["ADDED"] - 1)

    monkeypatch.setattr(add_kernel.fn, "warmup", warmup, raising=False)
    with compiling(part, 2 if part < 2 else 9):
        ran = run()
    assert compiled == (wanted or [2])
    assert ran == (wanted or [2])[0] + 1
    assert add_kernel.cache == {}
