"""What an engine cannot run is refused with the rule and the nearest legal values, before torch is imported."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatrain.config.load import rule_problems
from megatrain.engines.config import DeepSpeedConfig, engine_problems, legal_precisions, zero_stage
from megatrain.parallel.config import ParallelConfig
from megatrain.train.auto import with_precision
from megatrain.train.config import Config, TrainConfig

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str, tuple[object, ...]]] = [
    *[
        (engine, {axis: 2}, {}, f"parallel.{axis}", (1,))
        for engine in ("deepspeed", "accelerate")
        for axis in ("tp", "pp", "cp", "ep")
    ],
    ("accelerate", {"dp_replicate": 2, "dp_shard": 2}, {}, "parallel.dp_replicate", (1,)),
    ("deepspeed", {"dp_replicate": 2, "dp_shard": -1}, {}, "parallel.dp_replicate", (1,)),
    ("deepspeed", {"compile": True}, {}, "parallel.compile", (False,)),
    ("accelerate", {"dp_shard": 2, "zero_stage": 1}, {}, "parallel.zero_stage", (0, 2, 3)),
    ("deepspeed", {"zero_stage": 0}, {"offload": True}, "parallel.zero_stage", (1, 2, 3)),
    ("native", {}, {"offload": True}, "deepspeed.offload_optimizer", (False,)),
    ("accelerate", {}, {"offload": True}, "deepspeed.offload_optimizer", (False,)),
    ("deepspeed", {"dp_shard": 2}, {"precision": "fp64"}, "train.precision", ("fp32", "bf16")),
    ("deepspeed", {}, {"precision": "bf16"}, "train.precision", ("fp32",)),
    ("accelerate", {"dp_replicate": 2}, {"precision": "bf16"}, "train.precision", ("fp32", "fp64")),
    ("accelerate", {"dp_shard": 2}, {"precision": "fp8"}, "train.precision", ("fp32", "bf16", "fp64")),
    ("deepspeed", {"dp_shard": 2}, {"optimizer": "muon"}, "optim.kind", ()),
    ("deepspeed", {"dp_shard": 2}, {"ema_decay": 0.9}, "train.ema_decay", (None,)),
]


def problems(
    engine: Any, layout: dict[str, Any], other: dict[str, Any]
) -> list[tuple[str, tuple[object, ...]]]:
    given = {"precision": "fp32", "optimizer": "adamw", "ema_decay": None, **other}
    deepspeed = DeepSpeedConfig(offload_optimizer=given.pop("offload", False))
    found = engine_problems(engine, ParallelConfig(**layout), deepspeed, **given)
    return [(each.field, each.legal) for each in found]


@pytest.mark.parametrize(("engine", "layout", "other", "field", "legal"), REFUSED)
def test_what_an_engine_cannot_run_is_refused(
    engine: str, layout: dict[str, Any], other: dict[str, Any], field: str, legal: tuple[object, ...]
) -> None:
    assert problems(engine, layout, other) == [(field, legal)]


@pytest.mark.parametrize(
    ("engine", "layout", "other"),
    [
        ("native", {"tp": 2, "compile": True}, {"precision": "fp8", "optimizer": "muon", "ema_decay": 0.9}),
        *[("deepspeed", {"dp_shard": 2, "zero_stage": stage}, {}) for stage in range(4)],
        ("deepspeed", {"dp_replicate": 4}, {"optimizer": "muon", "ema_decay": 0.9}),
        ("deepspeed", {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 0}, {}),
        ("deepspeed", {}, {"offload": True, "precision": "bf16"}),
        *[
            ("accelerate", {"dp_shard": -1, "zero_stage": stage}, {"optimizer": "muon"})
            for stage in (0, 2, 3)
        ],
    ],
)
def test_what_it_runs_is_not(engine: str, layout: dict[str, Any], other: dict[str, Any]) -> None:
    assert problems(engine, layout, other) == []


def test_the_stage_is_zero_where_nothing_is_sharded() -> None:
    """The default zero_stage is 3, whatever the number of ranks."""
    assert zero_stage(ParallelConfig(dp_replicate=2), DeepSpeedConfig()) == 0
    assert zero_stage(ParallelConfig(), DeepSpeedConfig(offload_optimizer=True)) == 3


def test_automatic_precision_is_one_that_the_engine_has() -> None:
    ddp = Config(engine="accelerate", parallel=ParallelConfig(dp_replicate=2))
    sharded = replace(ddp, parallel=ParallelConfig(dp_shard=2))
    assert (with_precision(ddp, "bf16").train.precision, with_precision(sharded, "bf16").train.precision) == (
        "fp32",
        "bf16",
    )
    for cfg in (ddp, sharded):
        for precision in legal_precisions(cfg.engine, cfg.parallel, cfg.deepspeed):
            changed: Any = replace(cfg, train=TrainConfig(precision=precision))
            assert list(rule_problems(changed)) == []


def command(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, and then print whether torch was imported."""
    code = f"import sys\n{before}\nfrom megatrain.cli.main import main\ncode = main(sys.argv[1:])\n"
    code += "print('torch' in sys.modules)\nsys.exit(code)"
    return subprocess.run(
        [sys.executable, "-c", code, "train", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_all_problems_are_reported_at_once_without_torch() -> None:
    done = command("engine=deepspeed", "parallel.tp=2", "parallel.pp=3", "optim.lr=-1")
    assert (done.returncode, done.stdout.split()[-1]) == (2, "False")
    assert "parallel.tp=2: must be 1: engine=deepspeed runs data parallelism only" in done.stderr
    assert "parallel.pp=3: must be 1: engine=deepspeed" in done.stderr
    assert "optim.lr=-1" in done.stderr


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_missing_package_is_named_with_its_installation(engine: str) -> None:
    done = command(
        f"engine={engine}", "optim=adamw", "parallel.dp_shard=2", before=f"sys.modules[{engine!r}] = None"
    )
    assert (done.returncode, done.stdout.split()[-1]) == (2, "False")
    assert f"engine={engine} needs the package {engine}. Install it: " in done.stderr
    assert f"-m pip install {engine}" in done.stderr
