"""Direct preference optimization against its formula, differentiated by torch through all logits, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import RUNS, store_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.data.loader import Batch
from megatrain.data.tokenizer import ByteTokenizer
from megatrain.train.build import build_eval_batches, build_loader, build_state
from megatrain.train.dpo import DPO
from megatrain.train.evaluate import evaluate
from megatrain.train.objective_config import DPOConfig
from megatrain.train.objectives import begin_objective, build_objective
from megatrain.train.step import accumulate_gradients, train_step

CFG = replace(RUNS["pairs"], micro_batch_size=4)
STORE = store_of("pairs")


def log_probabilities(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """Of each row those of its answers, from the logits of all tokens."""
    logits = model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids)
    each = logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = each * (batch.targets >= 0)
    assert batch.doc_ids is not None
    assert batch.examples is not None
    return [
        torch.stack([row[ids == n].sum() for n in range(len(numbers))])
        for row, ids, numbers in zip(each, batch.doc_ids, batch.examples, strict=True)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_metrics_and_gradients(smoothing: float) -> None:
    objective = DPOConfig(beta=0.3, label_smoothing=smoothing)
    cfg = replace(CFG, objective=objective)
    state = build_state(cfg, torch.device("cpu"))
    loader = build_loader(cfg, STORE, None)
    state.objective = build_objective(cfg, state.parallel, ByteTokenizer(), train=STORE, val=STORE)
    held_out = build_eval_batches(cfg, STORE)
    begin_objective(state, loader, held_out)
    batch = loader.step_batch(0)
    with torch.no_grad():
        before = [ratios for part in batch.micro_batches for ratios in log_probabilities(state.model, part)]
        numbers = [n for part in batch.micro_batches for row in part.examples or () for n in row]
        assert isinstance(state.objective, DPO)
        known = state.objective.reference[numbers]
        torch.testing.assert_close(known, torch.cat(before), rtol=1e-12, atol=1e-12)
        generator = torch.Generator().manual_seed(1)
        for parameter in state.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    after = [ratios for part in batch.micro_batches for ratios in log_probabilities(state.model, part)]
    z = 0.3 * torch.cat([(a - b)[0::2] - (a - b)[1::2] for a, b in zip(after, before, strict=True)])
    loss = -((1 - smoothing) * logsigmoid(z) + smoothing * logsigmoid(-z)).mean()
    true = torch.autograd.grad(loss, list(state.model.parameters()))
    sums = accumulate_gradients(state, batch, cfg)
    expected = torch.stack([loss.detach(), z.detach().mean(), (z > 0).double().mean()])
    torch.testing.assert_close(sums, expected, rtol=1e-11, atol=1e-11)
    assert batch.examples == 2 * len(z)
    for parameter, gradient in zip(state.model.parameters(), true, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


def test_training_raises_the_margin() -> None:
    state = build_state(CFG, torch.device("cpu"))
    loader = build_loader(CFG, STORE, None)
    state.objective = build_objective(CFG, state.parallel, ByteTokenizer(), train=STORE, val=STORE)
    held_out = build_eval_batches(CFG, STORE)
    begin_objective(state, loader, held_out)
    first = evaluate(state.parallel, held_out, None, objective=state.objective)
    assert first.more == {"margin": 0.0, "accuracy": 0.0}
    assert first.loss == pytest.approx(np.log(2))
    stats = [train_step(state, loader.step_batch(n), CFG, lr=1e-2) for n in range(12)]
    margins = [each.more()["margin"] for each in stats]
    assert margins[0] == 0.0
    assert np.mean(margins[-3:]) > 0.5
    found = evaluate(state.parallel, held_out, None, objective=state.objective)
    assert found.more["margin"] > 0.5
    assert found.more["accuracy"] > 0.8
    assert found.loss < 0.5
