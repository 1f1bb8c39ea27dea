"""A step waits for its device once, to read the row that is reported; with ep once a layer, for counts."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import RUNS, STORE, with_layout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.parallel.layout import data_ranks, world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

CPU = torch.device("cpu")
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor for whose result the host waits."""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
"""The same as operators, wherever they are called."""
ON_CPU = {"megatrain_kernels", "device_mesh.py", "_utils.py"}
"""Kernels look at the values of a CPU, which costs nothing there; on a GPU other code runs, which does not. A mesh has
its map of ranks on the CPU, and DTensor (`tensor/_utils.py`) computes offsets from it."""
WRAPPERS = {"test_syncs.py", "_python_dispatch.py", "_ops.py", "_compile.py", "eval_frame.py"}
"""Files that stand between a caller and what it calls."""


class Operators(TorchDispatchMode):
    """Counts operators for whose result the host waits, by the file that calls them."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._opname in WAITING:
            count(self.found)
        return func(*args, **(kwargs or {}))


def count(found: Counter[str]) -> None:
    """Add one for the innermost file that is no wrapper."""
    frame = sys._getframe(1)
    files = []
    while frame is not None:
        files.append(Path(frame.f_code.co_filename))
        frame = frame.f_back  # type: ignore[assignment]
    outside = next(file for file in files if file.name not in WRAPPERS)
    if ON_CPU.isdisjoint(outside.parts):
        found["/".join(outside.parts[-2:])] += 1


def syncs(cfg: Config) -> dict[str, int]:
    """Of a training step (the second one: the first one sets things up), and of reading what it found."""
    mesh = make_mesh(cfg.parallel, CPU) if world_size(cfg.parallel) > 1 else None
    state, loader = build_state(cfg, CPU, mesh), build_loader(cfg, STORE, mesh)
    train_step(state, loader.step_batch(0), cfg, lr=1e-3)
    batch = loader.step_batch(1)
    found: Counter[str] = Counter()

    def heard(name: str) -> Any:
        method = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **options: Any) -> Any:
            count(found)
            return method(self, *args, **options)

        return mock.patch.object(Tensor, name, call)

    patches = [heard(name) for name in READS]
    for patch in patches:
        patch.start()
    try:
        with Operators(Counter()) as operators:  # those below the methods would be counted twice
            stats = train_step(state, batch, cfg, lr=1e-3, wants_stop=lambda: False)
        stats.read()
    finally:
        for patch in patches:
            patch.stop()
    return dict(found | operators.found)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("untied", {}),
        ("tied", {"pp": 2, "pp_schedule": "zbv", "zero_stage": 2}),
        ("experts", {"dp_shard": 2, "cp": 2, "ep": 2}),
        *[
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name, layout in [
                ("muon", {"dp_shard": 2}),
                ("sgd_experts", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
                ("latent", {"cp": 2, "cp_kind": "ulysses"}),
                ("untied", {"pp": 2, "tp": 2}),
                ("gpt2", {"cp": 2, "cp_kind": "ring", "dp_shard": 2, "zero_stage": 1}),
            ]
        ],
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_once(workers: WorkerPool, name: str, layout: dict[str, Any]) -> None:
    cfg = with_layout(RUNS[name], "fp64", layout)
    wanted = {"train/step.py": 1}
    if cfg.parallel.ep > 1:  # how many rows come from where
        micro_batches = cfg.global_batch_size // data_ranks(cfg.parallel) // cfg.resolved_micro_batch_size
        wanted["parallel/expert.py"] = micro_batches * (cfg.model.n_layers - 1)
    ranks = world_size(cfg.parallel)
    for found in workers.run(syncs, ranks, cfg) if ranks > 1 else [syncs(cfg)]:
        assert found == wanted
