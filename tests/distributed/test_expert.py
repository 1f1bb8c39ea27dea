"""Expert parallelism where routing is as uneven as it can be."""

from typing import Any

import numpy as np
import pytest
import torch
from layouts import EXPERTS, STORE, replace

from megatrain.data.loader import StepBatch
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import Mesh, make_mesh
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.parity import Arrays, full_arrays, relative_errors
from megatrain.train.state import TrainState
from megatrain.train.step import accumulate_gradients


def start(cfg: Config) -> tuple[TrainState, StepBatch, Mesh | None]:
    """The run `cfg` on this rank before its first step."""
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device) if world_size(cfg.parallel) > 1 else None
    return build_state(cfg, device, mesh), build_loader(cfg, STORE, mesh).step_batch(0), mesh


def one_sided_gradients(cfg: Config) -> Arrays:
    """Gradients where every token's two experts are the first two, which are on the first rank."""
    state, batch, _ = start(cfg)
    for _, block in state.model.blocks():
        if block.moe is not None:
            block.moe.expert_bias[:2] = 100.0
    accumulate_gradients(state, batch, cfg)
    gradients = {name: p.grad for name, p in state.weights.parameters.items() if p.grad is not None}
    return full_arrays(gradients, state.parallel.splits)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "ep": 2, "activation_checkpointing": "full"},
        {"dp_shard": 2, "tp": 2, "ep": 4},
    ],
    ids=str,
)
def test_all_tokens_go_to_one_rank(workers: WorkerPool, layout: dict[str, Any]) -> None:
    cfg = replace(EXPERTS, parallel=ParallelConfig(**layout))
    found = workers.run(one_sided_gradients, world_size(cfg.parallel), cfg)[0]
    truth = one_sided_gradients(replace(cfg, parallel=ParallelConfig()))
    assert max(relative_errors(found, truth).values()) <= 1e-12  # sums of some 300 terms in another order
    stacked = [name for name in found if ".experts." in name]
    assert len(stacked) == 9
    for name in stacked:
        assert np.abs(found[name][:2]).max() > 0
        assert np.array_equal(found[name][2:], np.zeros_like(found[name][2:])), name
