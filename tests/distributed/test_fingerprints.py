"""Fingerprints of gradients and weights are those of one process in every layout, and hear of exchanged elements."""

from typing import Any

import numpy as np
import pytest
import torch
from layouts import RUNS, STORE, with_layout
from test_parity import BOUND
from torch import Tensor
from torch import distributed as dist

from megatrain.nn.init import unsharded
from megatrain.parallel.fingerprints import Fingerprints, _signs, fingerprints
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step


def of_a_step(cfg: Config) -> tuple[Fingerprints, Fingerprints]:
    """Of the gradients of the second step, and of the weights after it."""
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device) if dist.is_initialized() else None
    state = build_state(cfg, device, mesh)
    loader = build_loader(cfg, STORE, mesh)
    found: Fingerprints = {}
    for step in range(2):
        train_step(
            state,
            loader.step_batch(step),
            cfg,
            lr=1e-2,
            on_gradients=lambda gradients: found.update(fingerprints(state.parallel, gradients)),
        )
    return found, fingerprints(state.parallel, state.weights.parameters)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("uneven", {"dp_shard": 2, "tp": 2}),
        ("tied", {"pp": 2, "cp": 2}),
        ("uneven_experts", {"dp_shard": 2, "tp": 2, "ep": 4}),
        ("gpt2", {"dp_replicate": 2, "zero_stage": 0}),
    ],
    ids=str,
)
def test_a_layout_changes_no_fingerprint(workers: WorkerPool, name: str, layout: dict[str, Any]) -> None:
    truth = of_a_step(with_layout(RUNS[name], "fp64", {}))
    cfg = with_layout(RUNS[name], "fp64", layout)
    for found in workers.run(of_a_step, world_size(cfg.parallel), cfg):
        for ours, theirs in zip(found, truth, strict=True):
            assert ours.keys() == theirs.keys()
            for part, (norm, projection) in theirs.items():
                assert norm > 0
                # the terms of a projection cancel, so its error is relative to the norm
                np.testing.assert_allclose(ours[part], (norm, projection), rtol=BOUND, atol=BOUND * norm)


def test_the_signs_are_balanced_and_hear_of_exchanged_elements() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    signs = _signs(unsharded("w", weight))
    assert signs.abs().eq(1).all()
    assert abs(signs.sum().item()) < 4 * signs.numel() ** 0.5

    def projection(tensor: Tensor) -> float:
        return float((tensor * signs).sum())

    assert projection(weight) != pytest.approx(projection(weight.flip(0)), abs=1e-6)
    assert projection(weight) != pytest.approx(projection(weight.roll(1, 1)), abs=1e-6)
