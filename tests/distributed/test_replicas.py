"""What ranks hold alike is alike, and a flipped bit in one of them is found, with its rank."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import RUNS, STORE, with_layout
from torch import distributed as dist

from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.parallel.replicas import Difference, Shards, differences, hash_bits, hash_shards
from megatrain.parallel.shards import local_tensor
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import accumulate_gradients, train_step


def held(cfg: Config, flip: tuple[int, str] | None) -> Shards:
    """What this rank holds after two steps, where `flip` flips a bit of a tensor on one rank."""
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device)
    state = build_state(cfg, device, mesh)
    loader = build_loader(cfg, STORE, mesh)
    for step in range(2):
        train_step(state, loader.step_batch(step), cfg, lr=1e-2)
    tensors = state.tensors()
    if flip is not None and flip[0] == dist.get_rank():
        local = local_tensor(tensors[flip[1]]).view(-1)
        local.view(torch.int64)[3] ^= 1
    return hash_shards(tensors, state.parallel.splits)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("untied", {"dp_replicate": 3, "zero_stage": 0}),
        ("muon", {"dp_replicate": 2, "tp": 2}),
        ("uneven_experts", {"dp_shard": 2, "tp": 2, "ep": 4}),
        ("tied", {"pp": 2, "dp_replicate": 2}),
    ],
    ids=str,
)
def test_ranks_hold_the_same_bits(workers: WorkerPool, name: str, layout: dict[str, Any]) -> None:
    cfg = with_layout(replace(RUNS[name], global_batch_size=12), "fp64", layout)
    shards = workers.run(held, world_size(cfg.parallel), cfg, None)
    assert differences(shards) == []
    several = [key for key in shards[0] if sum(key in each for each in shards) > 1]
    assert several, "nothing was compared"


def norm_with(cfg: Config, name: str) -> float:
    """The model's gradient norm, where the last rank's copy of `name` alone is not a number."""
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device)
    state = build_state(cfg, device, mesh)
    accumulate_gradients(state, build_loader(cfg, STORE, mesh).step_batch(0), cfg)
    gradients = {key: p.grad for key, p in state.weights.parameters.items() if p.grad is not None}
    if dist.get_rank() == dist.get_world_size() - 1:
        local_tensor(gradients[name]).view(-1)[0] = float("nan")
    return float(state.parallel.total(state.parallel.squared_norm(gradients)[None]))


@pytest.mark.parametrize(
    ("run", "layout", "name"),
    [
        ("tied", {"pp": 2}, "embed.weight"),
        ("untied", {"dp_replicate": 2, "zero_stage": 0}, "layers.1.attn.wq.weight"),
        ("untied", {"tp": 2}, "norm.weight"),
    ],
    ids=str,
)
def test_a_copy_that_is_not_a_number_is_seen(
    workers: WorkerPool, run: str, layout: dict[str, Any], name: str
) -> None:
    cfg = with_layout(RUNS[run], "fp64", layout)
    assert all(map(math.isnan, workers.run(norm_with, 2, cfg, name)))


@pytest.mark.parametrize("key", ["model.layers.1.attn.wq.weight", "optim.layers.1.attn.wq.weight.exp_avg"])
def test_a_flipped_bit_is_found(workers: WorkerPool, key: str) -> None:
    cfg = with_layout(
        replace(RUNS["untied"], global_batch_size=12), "fp64", {"dp_replicate": 3, "zero_stage": 0}
    )
    found = differences(workers.run(held, 3, cfg, (1, key)))
    assert found == [Difference(key, odd=(1,), holders=(0, 1, 2))]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str
)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    tensor = (torch.arange(77) % 2).to(dtype)
    seen = {int(hash_bits(tensor))}
    for place in range(77):
        changed = tensor.clone()
        changed[place] = 1 - tensor[place].to(torch.int8) if dtype == torch.bool else tensor[place] + 1
        seen.add(int(hash_bits(changed)))
    assert len(seen) == 78


def test_without_a_majority_all_are_named() -> None:
    key = ("w", (0,))
    assert differences([{key: 1}, {key: 2}]) == [Difference("w", (0, 1), (0, 1))]
    assert differences([{key: 1}, {("w", (4,)): 2}]) == []
