"""A private step is the formula of DP-SGD, worked out here with other means, and the same in every layout."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from layouts import GPT2, RUNS, examples_store, with_layout
from test_parity import BOUND
from torch.nn import functional as F

from megatrain.config.errors import UserError
from megatrain.data.loader import IGNORED
from megatrain.data.store import TokenSource
from megatrain.optim.privacy_config import PrivacyConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config, RunConfig
from megatrain.train.parity import Trace, merged, relative_errors, trace
from megatrain.train.step import accumulate_gradients

SECRET = "0123456789abcdef" * 4
CLIP, SIGMA = 0.9, 0.7


def private(cfg: Config) -> Config:
    privacy = PrivacyConfig(noise_multiplier=SIGMA, max_grad_norm=CLIP)
    model = replace(cfg.model, n_layers=2)
    return replace(
        cfg, model=model, privacy=privacy, run=RunConfig(id="fixed"), train=replace(cfg.train, z_loss=0.0)
    )


def traced(cfg: Config, store: TokenSource, secret: str) -> Trace:
    os.environ["MEGATRAIN_KEY"] = secret
    try:
        return trace(cfg, store, 2)
    finally:
        del os.environ["MEGATRAIN_KEY"]


@pytest.mark.parametrize("clip", [CLIP, 1e9])
def test_the_gradient_is_the_formula_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    """Examples of many lengths, each alone in its sample; torch's own cross entropy of the model's logits."""
    monkeypatch.setenv("MEGATRAIN_KEY", SECRET)
    cfg = with_layout(RUNS["chat"], "fp64", {})
    cfg = private(cfg)
    cfg = replace(cfg, privacy=replace(cfg.privacy, max_grad_norm=clip))
    state, loader = build_state(cfg, torch.device("cpu")), build_loader(cfg, examples_store(), None)
    batch = loader.step_batch(3)
    accumulate_gradients(state, batch, cfg)
    found = {name: p.grad.clone() for name, p in state.weights.parameters.items()}  # type: ignore[union-attr]
    assert state.privacy is not None

    wanted = {name: torch.zeros_like(g) for name, g in found.items()}
    norms = []
    for part in batch.micro_batches:
        for n in range(len(part.tokens)):
            state.weights.zero_gradients()
            row = {name: getattr(part, name)[n : n + 1] for name in ("positions", "doc_ids")}
            logits = state.model(part.tokens[n : n + 1], **row)
            F.cross_entropy(logits[0], part.targets[n], ignore_index=IGNORED).backward()
            own = {name: p.grad.clone() for name, p in state.weights.parameters.items()}  # type: ignore[union-attr]
            norms.append(float(torch.cat([g.flatten() for g in own.values()]).norm()))
            for name, gradient in own.items():
                wanted[name] += gradient * min(1.0, clip / norms[-1])
    for name, total in wanted.items():
        noise = state.privacy.noise.normal(total.shape, step=3, name=name)
        error = found[name] - (total + SIGMA * clip * noise) / cfg.global_batch_size
        assert error.abs().max() <= 1e-12 * max(1.0, clip), name
    assert len(norms) == cfg.global_batch_size
    assert all(norm > CLIP for norm in norms)  # so the first case clips each, the second none
    lengths = np.diff(examples_store().document_starts, append=examples_store().n_tokens)
    assert loader.n_samples == (lengths <= cfg.seq_len).sum()  # no two examples share a sample


@pytest.mark.parametrize(
    "layout", [{"dp_replicate": 2}, {"dp_shard": 2, "zero_stage": 0}], ids=["replicas", "ddp"]
)
def test_every_data_parallel_layout_adds_the_same_noise(workers: WorkerPool, layout: dict[str, Any]) -> None:
    store = examples_store()
    one = traced(private(with_layout(RUNS["chat"], "fp64", {})), store, SECRET)
    cfg = private(with_layout(RUNS["chat"], "fp64", layout))
    many = merged(workers.run(traced, world_size(cfg.parallel), cfg, store, SECRET))
    np.testing.assert_allclose(many.losses, one.losses, rtol=BOUND)
    np.testing.assert_allclose(many.grad_norms, one.grad_norms, rtol=BOUND)
    for kind in ("gradients", "final"):
        errors = relative_errors(getattr(many, kind), getattr(one, kind))
        assert max(errors.values()) <= BOUND, kind
    other = traced(private(with_layout(RUNS["chat"], "fp64", {})), store, "f" * 64)
    assert max(relative_errors(other.gradients, one.gradients).values()) > 0.1


def test_a_private_run_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRAIN_KEY", raising=False)
    with pytest.raises(UserError, match="needs a key"):
        build_state(private(with_layout(GPT2, "fp64", {})), torch.device("cpu"))
