"""The gradient of a private step (DP-SGD): of each sample alone, clipped, summed over all ranks, with noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from megatrain.checkpoint.keys import writing_key
from megatrain.data.loader import IGNORED, Batch, StepBatch
from megatrain.optim.master import MasterWeights
from megatrain.optim.privacy import Noise, require_privacy_packages
from megatrain.optim.privacy_config import PrivacyConfig
from megatrain.parallel.apply import ParallelModel
from megatrain.train.config import Config

LossSum = Callable[[Batch], Tensor]
"""Returns the loss of a batch in nats, summed over its valid tokens."""


@dataclass(frozen=True, slots=True)
class PrivateGradients:
    """What a private run adds to a step."""

    cfg: PrivacyConfig
    noise: Noise
    batch: int
    """Samples of a step, over all ranks."""

    def accumulate(
        self, parallel: ParallelModel, weights: MasterWeights, batch: StepBatch, loss_of: LossSum
    ) -> Tensor:
        """Set the weights' gradients; return this rank's share of the loss per token, without noise (float64).

        The gradient is the sum of the samples' clipped ones and of noise, divided by the number of samples. The loss of
        a sample is the mean over its own tokens, so that no other sample has a part in it.
        """
        trained = weights.trained
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        total = torch.zeros((), dtype=torch.float64, device=parallel.device)
        for part in batch.micro_batches:
            for sample in rows_of(part):
                valid = int((sample.targets != IGNORED).sum())
                if not valid:
                    continue
                loss = loss_of(sample)
                (loss / valid).backward()
                weights.collect_gradients()
                add_clipped(sums, {name: p.grad for name, p in trained.items()}, self.cfg.max_grad_norm)
                weights.zero_gradients()
                total += loss.detach().to(torch.float64) / max(batch.valid_tokens, 1)
        scale = self.cfg.noise_multiplier * self.cfg.max_grad_norm
        for name, parameter in trained.items():
            if parallel.mesh is None or parallel.mesh.data_rank == 0:
                drawn = self.noise.normal(parameter.shape, step=batch.step, name=name)
                sums[name] += (drawn * scale).to(sums[name])
            if parallel.mesh is not None:
                dist.all_reduce(sums[name])
            parameter.grad = sums[name].div_(self.batch)
        return total


def private_gradients(cfg: Config) -> PrivateGradients | None:
    """Return what makes the steps of `cfg` private; None if they are not.

    Raises:
        UserError: a package is missing, or the key from which the noise is drawn.
    """
    if not cfg.privacy.is_on:
        return None
    require_privacy_packages()
    noise = Noise(writing_key().secret, cfg.run.id, cfg.train.seed)
    return PrivateGradients(cfg.privacy, noise, cfg.global_batch_size)


def rows_of(batch: Batch) -> list[Batch]:
    """Return each row of a batch as a batch of its own."""
    names = ("tokens", "targets", "positions", "doc_ids", "token_numbers")
    given = {name: tensor for name in names if (tensor := getattr(batch, name)) is not None}
    return [
        replace(batch, **{name: tensor[n : n + 1] for name, tensor in given.items()})
        for n in range(len(batch.tokens))
    ]


@torch.no_grad()
def add_clipped(sums: dict[str, Tensor], gradients: dict[str, Tensor | None], max_norm: float) -> None:
    """Add the gradients of one sample to `sums`, scaled so that their 2-norm together is at most `max_norm`."""
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    squares = [gradient.to(torch.float64).square().sum() for gradient in found.values()]
    norm = torch.stack(squares).sum().sqrt()
    scale = torch.clamp(max_norm / norm, max=1.0)  # of a norm of 0 it is 1
    for name, gradient in found.items():
        sums[name] += gradient * scale.to(gradient.dtype)
