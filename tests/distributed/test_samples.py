"""Text is generated from the sharded model: the same in every layout, and no rank has the whole model for it."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import RUNS, STORE, with_layout
from probes import live_bytes

from megatrain.models.flops import n_params
from megatrain.models.generate import Request, generate
from megatrain.models.sampling import Sampling
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.parallel.packed_logits import PackedLogits
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

PROMPT = [3, 14, 15, 9, 2]
CPU = torch.device("cpu")


def texts(cfg: Config) -> list[list[int]]:
    """Greedy and sampled tokens, more than the context holds, after a step of training."""
    mesh = make_mesh(cfg.parallel, CPU) if world_size(cfg.parallel) > 1 else None
    state = build_state(cfg, CPU, mesh)
    train_step(state, build_loader(cfg, STORE, mesh).step_batch(0), cfg, lr=1e-2)
    model = PackedLogits(state.parallel)
    ways = (Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=20, seed=5))
    requests = [Request(prompt=PROMPT, max_new_tokens=9, sampling=how) for how in ways]
    return [list(generate(model, request, context=10)) for request in requests]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", {"cp": 2, "tp": 2}),
        ("tied", {"pp": 2, "pp_schedule": "zbv", "zero_stage": 1}),
        ("experts", {"pp": 2, "dp_shard": 2, "ep": 2}),
        *[
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name, layout in [
                ("untied", {"tp": 2}),
                ("untied", {"dp_shard": 2}),
                ("latent", {"dp_replicate": 2, "cp": 2, "cp_kind": "ring", "ep": 2}),
                ("untied", {"pp": 2}),
                ("gpt2", {"dp_shard": 2, "zero_stage": 0}),
                ("untied", {"cp": 4, "cp_kind": "all_gather"}),
                ("untied", {"cp": 2, "cp_kind": "ulysses"}),
                ("tied", {"pp": 2, "cp": 2, "tp": 2}),
                ("experts", {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4}),
                ("tied", {"pp": 2, "dp_replicate": 2, "dp_shard": 2}),
            ]
        ],
    ],
    ids=str,
)
def test_every_layout_writes_what_one_process_does(
    workers: WorkerPool, name: str, layout: dict[str, Any]
) -> None:
    truth = texts(with_layout(RUNS[name], "fp64", {}))
    cfg = with_layout(RUNS[name], "fp64", layout)
    assert len({tuple(text) for text in truth}) == 2
    for each in workers.run(texts, world_size(cfg.parallel), cfg):
        assert each == truth


def most_bytes(cfg: Config) -> int:
    """What this rank holds at most while a token is generated, measured after each block."""
    gc.collect()
    before = live_bytes([])
    state = build_state(cfg, CPU, make_mesh(cfg.parallel, CPU))
    held: list[int] = []
    for model in state.parallel.models:
        for _, block in model.blocks():
            gathered = list(block.parameters())
            block.register_forward_pre_hook(lambda *_, gathered=gathered: held.append(live_bytes(gathered)))
            block.mlp.register_forward_hook(lambda *_, gathered=gathered: held.append(live_bytes(gathered)))  # type: ignore[union-attr]
    next(generate(PackedLogits(state.parallel), Request(prompt=PROMPT, max_new_tokens=1), context=32))
    return max(held) - before


@pytest.mark.parametrize(
    "layout", [{"dp_shard": 4}, pytest.param({"pp": 2, "tp": 2}, marks=pytest.mark.slow)], ids=str
)
def test_no_rank_holds_the_whole_model_for_a_sample(workers: WorkerPool, layout: dict[str, Any]) -> None:
    """Weights and two moments are shared out; beside them FSDP gathers two of eight blocks and the ends at once."""
    eight = replace(RUNS["untied"], model=replace(RUNS["untied"].model, n_layers=8))
    cfg = with_layout(eight, "fp64", layout)
    whole = 8 * n_params(cfg.model)
    for held in workers.run(most_bytes, 4, cfg):
        assert held - 3 * whole / 4 < 0.45 * whole, held / whole
