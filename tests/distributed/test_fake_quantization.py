"""Training with rounded weights computes the same in every layout that the rules allow."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from layouts import CFG, STEPS
from test_parity import BOUND, check

from megatrain.data.store import SyntheticStore
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config
from megatrain.train.parity import Trace, merged, trace

STORE = SyntheticStore(64, n_tokens=1 << 14, documents=100)
SIZES: dict[str, Any] = {"n_layers": 4, "hidden_size": 64, "n_heads": 4, "ffn_size": 128, "vocab_size": 64}
RUNS = {
    "qwen3": replace(CFG, model=Qwen3Config(**SIZES, n_kv_heads=2, head_dim=32, init_std=0.1)),
    "gpt2": replace(CFG, model=GPT2Config(**SIZES, max_seq_len=64)),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int4", "qwen3", {"dp_shard": 2, "tp": 2}),
    ("int4", "gpt2", {"pp": 2, "tp": 2}),
]
MORE_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int8", "qwen3", {"dp_shard": 2, "zero_stage": 3}),
    ("int4", "qwen3", {"cp": 2}),
    ("int4", "gpt2", {"pp": 2, "pp_schedule": "zbv"}),
]


def config(number: Any, name: str, layout: dict[str, Any]) -> Config:
    cfg = RUNS[name]
    made = replace(cfg, train=replace(cfg.train, qat=number, qat_group=32), parallel=ParallelConfig(**layout))
    assert not list(made.problems())
    return made


@cache
def single(number: str, name: str) -> Trace:
    return trace(config(number, name, {}), STORE, STEPS)


@pytest.mark.parametrize(
    ("number", "name", "layout"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
    ids=str,
)
def test_a_layout_computes_what_one_process_does(
    workers: WorkerPool, number: str, name: str, layout: dict[str, Any]
) -> None:
    cfg = config(number, name, layout)
    check(
        merged(workers.run(trace, world_size(cfg.parallel), cfg, STORE, STEPS)), single(number, name), BOUND
    )


def test_weights_are_rounded_at_all() -> None:
    with pytest.raises(AssertionError):
        check(single("int4", "qwen3"), single("none", "qwen3"), 1e-2)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"qat_group": 48}, "train.qat_group"),
        ({"qat_group": 64, "tp": 4}, "train.qat_group"),
        ({"precision": "fp8"}, "train.precision"),
    ],
)
def test_what_would_depend_on_the_layout_is_refused(changes: dict[str, Any], field: str) -> None:
    cfg = RUNS["qwen3"]
    parallel = ParallelConfig(tp=changes.pop("tp", 1))
    train = replace(cfg.train, **({"qat": "int4"} | changes))
    found = list(replace(cfg, train=train, parallel=parallel).problems())
    assert field in [problem.field for problem in found]
