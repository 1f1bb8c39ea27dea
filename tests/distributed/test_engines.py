"""DeepSpeed and Accelerate compute what the native engine does, and a run may move between the three.

In float32 a run is compared with the native run in float64, and may be off by three times what the native run in
float32 is, or by three roundings. Accelerate computes in float64, too, and meets the bound of layouts (1e-9).
"""

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Course, course
from layouts import RUNS, STORE
from test_parity import BOUND, FACTOR

from megatrain.engines.config import DeepSpeedConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config
from megatrain.train.parity import Arrays, relative_errors

STEPS = 3
ROUNDING = 2**-23
"""Of float32, in which losses are summed in every precision: a single number may be nearer to the truth by chance."""
slow = pytest.mark.slow
LIBRARIES = ("deepspeed", "accelerate")
needs = {
    name: pytest.mark.skipif(find_spec(name) is None, reason=f"the package {name} is not installed")
    for name in LIBRARIES
}


def config(
    name: str, engine: str, layout: dict[str, Any], precision: str, *, offload: bool = False
) -> Config:
    run = RUNS[name]
    cfg = replace(
        run,
        train=replace(run.train, precision=precision),
        engine=engine,
        parallel=ParallelConfig(**layout),
        deepspeed=DeepSpeedConfig(offload_optimizer=offload),
        micro_batch_size=2,  # two micro-batches on each of two ranks
    )
    assert not list(cfg.problems()), list(map(str, cfg.problems()))
    return cfg


def run(workers: WorkerPool, cfg: Config, steps: int = STEPS, directory: Path | None = None) -> Course:
    return workers.run(course, world_size(cfg.parallel), cfg, STORE, steps, directory)[0]


@cache
def alone(name: str, precision: str, steps: int = STEPS) -> Course:
    """The native run in one process."""
    return course(config(name, "native", {}, precision), STORE, steps)


def weights(tensors: Arrays) -> Arrays:
    return {key: value for key, value in tensors.items() if key.startswith("model.")}


def moments(tensors: Arrays) -> Arrays:
    return {key: value for key, value in tensors.items() if key.startswith("optim.") and value.size > 1}


def errors(found: Course, truth: Course) -> dict[str, float]:
    """The largest relative error of each kind of result."""
    return {
        "loss": max(abs(a - b) / b for a, b in zip(found.losses, truth.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(found.norms, truth.norms, strict=True)),
        "eval_loss": abs(found.eval_loss - truth.eval_loss) / truth.eval_loss,
        "weights": max(relative_errors(weights(found.tensors), weights(truth.tensors)).values()),
        "moments": max(relative_errors(moments(found.tensors), moments(truth.tensors)).values()),
    }


def check(found: Course, name: str, precision: str) -> None:
    """Compare the last steps of the native run in float64 with as many of `found`."""
    truth = alone(name, "fp64")
    assert found.digests == truth.digests
    assert found.tensors.keys() == truth.tensors.keys()
    for key in (key for key in truth.tensors if key.endswith(".step")):
        assert found.tensors[key] == truth.tensors[key], key
    off = errors(found, truth)
    if precision == "fp64":
        assert max(off.values()) <= BOUND, off
        return
    usual = errors(alone(name, precision), truth)
    assert all(off[kind] <= FACTOR * max(usual[kind], ROUNDING) for kind in off), (off, usual)


SHARDED = {"dp_shard": 2}


@needs["accelerate"]
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("untied", {"dp_replicate": 2}),
        pytest.param("tied", {**SHARDED, "zero_stage": 3}, marks=slow),
        pytest.param("experts", {**SHARDED, "zero_stage": 2}, marks=slow),
        pytest.param("experts", {"dp_replicate": 2}, marks=slow),
        pytest.param("gpt2", {**SHARDED, "zero_stage": 3}, marks=slow),
        pytest.param("muon", {**SHARDED, "zero_stage": 3}, marks=slow),
        pytest.param("muon", {"dp_replicate": 2}, marks=slow),
    ],
    ids=str,
)
def test_accelerate_computes_what_one_process_does(
    workers: WorkerPool, name: str, layout: dict[str, Any]
) -> None:
    check(run(workers, config(name, "accelerate", layout, "fp64")), name, "fp64")


@needs["deepspeed"]
@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        pytest.param("untied", 2, False, marks=slow),
        pytest.param("untied", 1, False, marks=slow),
        pytest.param("untied", 3, False, marks=slow),
        pytest.param("untied", 1, True, marks=slow),
        pytest.param("untied", 2, True, marks=slow),
        pytest.param("untied", 3, True, marks=slow),
        pytest.param("tied", 3, False, marks=slow),
        pytest.param("gpt2", 3, False, marks=slow),
        pytest.param("experts", 2, False, marks=slow),
        pytest.param("experts", 3, False, marks=slow),
        pytest.param("sgd_experts", 2, False, marks=slow),
    ],
)
def test_zero_stages_of_deepspeed_compute_what_one_process_does(
    workers: WorkerPool, name: str, stage: int, offload: bool
) -> None:
    cfg = config(name, "deepspeed", {**SHARDED, "zero_stage": stage}, "fp32", offload=offload)
    check(run(workers, cfg), name, "fp32")


@slow
@needs["deepspeed"]
@pytest.mark.parametrize("name", ["untied", "muon"])
def test_deepspeed_without_zero_computes_what_one_process_does(workers: WorkerPool, name: str) -> None:
    cfg = config(name, "deepspeed", {"dp_replicate": 2, "zero_stage": 0}, "fp32")
    check(run(workers, cfg), name, "fp32")


@slow
@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        pytest.param("deepspeed", 2, marks=needs["deepspeed"]),
        pytest.param("accelerate", 3, marks=needs["accelerate"]),
    ],
)
def test_bf16_rounds_no_more_than_the_native_engine_does(
    workers: WorkerPool, engine: str, stage: int
) -> None:
    cfg = config("untied", engine, {**SHARDED, "zero_stage": stage}, "bf16")
    check(run(workers, cfg), "untied", "bf16")


@slow
@needs["deepspeed"]
def test_biases_of_experts_keep_their_precision_in_bf16(workers: WorkerPool) -> None:
    """They are sums of steps of 1e-3, which bf16 would round."""
    cfg = config("experts", "deepspeed", {**SHARDED, "zero_stage": 2}, "bf16")
    found, native = run(workers, cfg), alone("experts", "bf16")
    assert found.tensors.keys() == native.tensors.keys()
    biases = [value for key, value in found.tensors.items() if key.endswith("expert_bias")]
    assert len(biases) == 3
    for bias in biases:
        np.testing.assert_allclose(bias / 1e-3, np.round(bias / 1e-3), atol=1e-4)


NATIVE = ("native", {})
MOVES = [
    pytest.param(
        [NATIVE, ("deepspeed", {**SHARDED, "zero_stage": 2}), ("accelerate", {**SHARDED, "zero_stage": 3})],
        marks=[needs["deepspeed"], needs["accelerate"]],
        id="native, ZeRO-2, FSDP2",
    ),
    pytest.param(
        [
            ("deepspeed", {**SHARDED, "zero_stage": 3}),
            ("native", {"tp": 2}),
            ("accelerate", {"dp_replicate": 2}),
        ],
        marks=[slow, needs["deepspeed"], needs["accelerate"]],
        id="ZeRO-3, tensor parallel, DDP",
    ),
    pytest.param(
        [("accelerate", {"dp_replicate": 2}), ("deepspeed", {"dp_shard": 4, "zero_stage": 3}), NATIVE],
        marks=[slow, needs["deepspeed"], needs["accelerate"]],
        id="DDP, ZeRO-3 on four ranks, native",
    ),
    pytest.param(
        [
            ("deepspeed", {**SHARDED, "zero_stage": 1}),
            ("deepspeed", {"dp_shard": 4, "zero_stage": 2}),
            NATIVE,
        ],
        marks=[slow, needs["deepspeed"]],
        id="ZeRO-1, ZeRO-2 on four ranks, native",
    ),
]


@pytest.mark.parametrize("stations", MOVES)
def test_a_run_moves_between_engines(
    workers: WorkerPool, stations: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    """One step in each, through the checkpoint; then what an uninterrupted native run has computed."""
    assert len(stations) == STEPS
    parts = [run(workers, config("untied", *station, "fp32"), 1, tmp_path) for station in stations]
    joined = Course(
        losses=[loss for part in parts for loss in part.losses],
        norms=[norm for part in parts for norm in part.norms],
        digests=[digest for part in parts for digest in part.digests],
        eval_loss=parts[-1].eval_loss,
        tensors=parts[-1].tensors,
    )
    check(joined, "untied", "fp32")


def test_the_comparison_sees_a_difference() -> None:
    """A step at a learning rate that is off by 1 %."""
    cfg = config("untied", "native", {}, "fp32")
    off = course(replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr * 1.01)), STORE, STEPS)
    with pytest.raises(AssertionError):
        check(off, "untied", "fp32")
    np.testing.assert_array_equal(off.losses[0], alone("untied", "fp32").losses[0])
