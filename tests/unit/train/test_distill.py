"""Distillation against its formula, differentiated by torch through all logits, in float64."""

from dataclasses import replace

import pytest
import torch
from layouts import RUNS, STORE
from torch.nn.functional import cross_entropy, kl_div

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.parallel import distill as heads
from megatrain.train.build import build_loader, build_state
from megatrain.train.distill import Distill
from megatrain.train.objective_config import DistillConfig
from megatrain.train.objectives import build_objective
from megatrain.train.step import accumulate_gradients


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
def test_loss_and_gradients(alpha: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", 24)  # no divisor of the tokens
    how = DistillConfig(teacher="itself", alpha=alpha, temperature=temperature)
    cfg = replace(RUNS["distilled"], objective=how, train=replace(RUNS["tied"].train, z_loss=0.0))
    cfg = replace(cfg, micro_batch_size=4)
    state = build_state(cfg, torch.device("cpu"))
    batch = build_loader(cfg, STORE, None).step_batch(0)
    plain = state.model.loss_head
    state.objective = build_objective(cfg, state.parallel, ByteTokenizer(), train=STORE, val=None)
    assert isinstance(state.objective, Distill)
    teacher = state.objective.teacher.models[0]
    (loss,) = accumulate_gradients(state, batch, cfg)
    found = {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}
    state.weights.zero_gradients()
    state.model.loss_head = teacher.loss_head = plain  # to logits
    total = torch.zeros((), dtype=torch.float64)
    for part in batch.micro_batches:
        inputs = {"positions": part.positions, "doc_ids": part.doc_ids}
        own = state.model(part.tokens, **inputs)[part.targets >= 0]
        with torch.no_grad():
            theirs = teacher(part.tokens, **inputs)[part.targets >= 0]
        both = [(each / temperature).log_softmax(-1) for each in (own, theirs)]
        divergence = kl_div(both[0], both[1], log_target=True, reduction="sum") * temperature**2
        usual = cross_entropy(own, part.targets[part.targets >= 0], reduction="sum")
        total = total + (alpha * divergence + (1 - alpha) * usual) / batch.valid_tokens
    torch.testing.assert_close(loss, total.detach(), rtol=1e-12, atol=1e-12)
    total.backward()
    for name, parameter in state.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
