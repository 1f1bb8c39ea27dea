"""The training step: what happens between two values of the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.data.loader import StepBatch
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


def train_step(state: TrainState, batch: StepBatch, cfg: Config, *, lr: float) -> StepStats:
    """One optimizer step at learning rate `lr` over the global batch.

    Each micro-batch's loss is its sum over valid tokens divided by the number of valid tokens of the *global*
    batch, so the cut into micro-batches changes nothing but rounding.
    """
    device = next(state.model.parameters()).device
    total_loss = torch.zeros((), dtype=torch.float32, device=device)
    for part in batch.micro_batches:
        part = part.to(device)
        loss_sum = state.model(
            part.tokens,
            targets=part.targets,
            positions=part.positions,
            doc_ids=part.doc_ids,
            z_loss=cfg.train.z_loss,
        )
        loss = loss_sum / max(batch.valid_tokens, 1)
        loss.backward()
        state.weights.collect_gradients()
        total_loss += loss.detach()

    grad_norm = clip_gradients(state.weights.parameters.values(), cfg.optim.clip_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.weights.zero_gradients()
    state.weights.publish()
    if state.average is not None:
        state.average.update(state.weights.parameters)
    state.step += 1
    state.tokens += batch.valid_tokens
    return StepStats(loss=total_loss, grad_norm=grad_norm)
