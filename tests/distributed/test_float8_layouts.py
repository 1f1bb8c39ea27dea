"""Linear layers in fp8 compute the same in every layout that the rules allow.

All that is not quantized is computed in float64 here, so that the runs differ by float64's roundings only: quantization
makes the difference of two numbers larger only where one of them lies on the border between two codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from layouts import CFG, MOE, STEPS
from test_parity import check

from megatrain.data.store import SyntheticStore
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train import build
from megatrain.train.config import Config
from megatrain.train.parity import Trace, merged, trace

Gradients = Literal["e5m2", "e4m3"]
BOUND = 1e-6
"""As float64's roundings through the float32 numbers that are quantized; fp8's own are 1e-2."""
STORE = SyntheticStore(64, n_tokens=1 << 14, documents=100)
MODEL = Qwen3Config(
    n_layers=2,
    hidden_size=64,
    n_heads=8,
    n_kv_heads=8,
    head_dim=32,
    ffn_size=256,
    vocab_size=64,
    init_std=0.1,
)
BASE = replace(CFG, model=MODEL, seq_len=128, global_batch_size=4)
RUNS = {
    "dense": BASE,
    "experts": replace(BASE, model=replace(MODEL, experts=replace(MOE, first_k_dense=0, ffn_size=256))),
}
CASES: list[tuple[str, str, dict[str, Any], Gradients]] = [
    ("block", "dense", {"pp": 2}, "e5m2"),
    ("block", "dense", {"dp_shard": 2, "tp": 2}, "e5m2"),
    ("block", "dense", {"dp_shard": 2, "zero_stage": 2, "activation_checkpointing": "selective"}, "e4m3"),
    ("block", "experts", {"tp": 2}, "e5m2"),
    ("row", "dense", {"cp": 2}, "e4m3"),
    ("row", "dense", {"dp_replicate": 2, "activation_checkpointing": "full"}, "e5m2"),
    ("tensor", "dense", {"pp": 2}, "e4m3"),
]


@contextmanager
def otherwise_float64() -> Iterator[None]:
    before = build.COMPUTE_DTYPE["fp8"]
    build.COMPUTE_DTYPE["fp8"] = torch.float64
    try:
        yield
    finally:
        build.COMPUTE_DTYPE["fp8"] = before


def trace_in_float64(cfg: Config, *args: Any) -> Trace:
    with otherwise_float64():
        return trace(cfg, *args)


def config(scaling: Any, name: str, layout: dict[str, Any], gradients: Gradients = "e5m2") -> Config:
    cfg = RUNS[name]
    train = replace(cfg.train, precision="fp8", fp8_scaling=scaling, fp8_gradients=gradients)
    made = replace(cfg, train=train, parallel=ParallelConfig(**layout))
    assert not list(made.problems())
    return made


@cache
def single(scaling: str, name: str, gradients: Gradients = "e5m2") -> Trace:
    return trace_in_float64(config(scaling, name, {}, gradients), STORE, STEPS)


@pytest.mark.parametrize(("scaling", "name", "layout", "gradients"), CASES, ids=str)
def test_a_layout_computes_what_one_process_does(
    workers: WorkerPool, scaling: str, name: str, layout: dict[str, Any], gradients: Gradients
) -> None:
    cfg = config(scaling, name, layout, gradients)
    ranks = workers.run(trace_in_float64, world_size(cfg.parallel), cfg, STORE, STEPS)
    check(merged(ranks), single(scaling, name, gradients), BOUND)


def test_a_layout_that_the_rules_refuse_does_not() -> None:
    """Micro-batches, which need no process: the tokens that share a scale are others."""
    cfg = config("tensor", "dense", {})
    with pytest.raises(AssertionError):
        check(
            trace_in_float64(replace(cfg, micro_batch_size=2), STORE, STEPS), single("tensor", "dense"), BOUND
        )
