"""The training step: what happens between two values of the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.data.loader import Batch, StepBatch
from megatrain.nn.balance import balance_experts, begin_balance
from megatrain.optim.clip import clip_gradients
from megatrain.train.config import Config
from megatrain.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StepStats:
    """Results of one step as 0-d tensors on the device (reading them waits for the device)."""

    loss: Tensor
    """Nats a token: mean over the valid tokens of the global batch (z-loss included)."""
    grad_norm: Tensor
    """Of the whole model, before clipping."""


def loss_sum(model: nn.Module, batch: Batch, *, z_loss: float = 0.0) -> Tensor:
    """Loss in nats, summed over the valid tokens of `batch` (float32 scalar on the model's device)."""
    device = next(model.parameters()).device
    tokens, targets, positions = (
        t.to(device, non_blocking=True) for t in (batch.tokens, batch.targets, batch.positions)
    )
    doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(device, non_blocking=True)
    loss: Tensor = model(tokens, targets=targets, positions=positions, doc_ids=doc_ids, z_loss=z_loss)
    return loss


def train_step(state: TrainState, batch: StepBatch, cfg: Config, *, lr: float) -> StepStats:
    """One optimizer step at learning rate `lr` over the global batch.

    Each micro-batch's loss is its sum over valid tokens divided by the number of valid tokens of the *global*
    batch, so the cut into micro-batches changes nothing but rounding.
    """
    device = next(state.model.parameters()).device
    begin_balance([state.model], 1 / max(batch.valid_tokens, 1))
    total_loss = torch.zeros((), dtype=torch.float64, device=device)  # a long sum of small parts
    for part in batch.micro_batches:
        loss = loss_sum(state.model, part, z_loss=cfg.train.z_loss) / max(batch.valid_tokens, 1)
        loss.backward()
        state.weights.collect_gradients()
        total_loss += loss.detach()

    grad_norm = clip_gradients(state.weights.parameters.values(), cfg.optim.clip_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.weights.zero_gradients()
    state.weights.publish()
    balance_experts([state.model], cfg.model, lambda counts: counts)
    if state.average is not None:
        state.average.update(state.weights.parameters)
    state.step += 1
    state.tokens += batch.valid_tokens
    return StepStats(loss=total_loss, grad_norm=grad_norm)
