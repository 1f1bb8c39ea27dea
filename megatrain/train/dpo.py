"""Direct preference optimization (Rafailov et al., arXiv 2305.18290).

Of a pair of answers to one prompt, the loss is -log σ(z), z = β · (log-ratio of the chosen one - of the rejected one),
where an answer's log-ratio is the logarithm of its probability under the model over that under the model's source. Its
gradient is that of the tokens' cross entropies times ±β · σ(-z).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatrain.data.loader import Batch, StepBatch
from megatrain.parallel.apply import ParallelModel
from megatrain.train.objective import Weighed, document_sums, token_losses
from megatrain.train.objective_config import DPOConfig
from megatrain.train.placing import on_device


class DPO:
    """The objective, with the log-probabilities of all answers under the source."""

    names: tuple[str, ...] = ("margin", "accuracy")
    eval_names = names
    is_shared = False
    rounds = 1

    def __init__(self, cfg: DPOConfig, *, answers: int, held_out: int) -> None:
        """Make room for the log-probabilities of so many training and validation answers."""
        self.cfg = cfg
        self.reference = torch.zeros(answers, dtype=torch.float64)
        """By the answers' numbers in the data, under the source."""
        self.held_out = torch.zeros(held_out, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Do as `Objective.tensors`."""
        return {"reference": self.reference, "held_out": self.held_out}

    def trained_tokens(self, batch: StepBatch) -> int:
        """Do as `Objective.trained_tokens`."""
        return batch.valid_tokens

    def begin(self, parallel: ParallelModel, training: Iterable[Batch], validation: Iterable[Batch]) -> None:
        """Compute the log-probabilities under the present weights, those of the source, before the first step.

        Args:
            training, validation: this rank's batches, equally many on all; together they hold each answer once.
        """
        for known, batches in ((self.reference, training), (self.held_out, validation)):
            total = torch.zeros(len(known), dtype=torch.float64, device=parallel.device)
            for batch in batches:
                found, _ = log_probabilities(parallel, batch)
                if parallel.owns_rows():
                    for row, numbers in enumerate(batch.examples or ()):
                        total[list(numbers)] = found[row, : len(numbers)]
            known.copy_(parallel.total(total))

    def weigh(self, parallel: ParallelModel, batch: StepBatch, round_: int) -> Weighed:
        """Do as `Objective.weigh`. The metrics are the mean of z, and the share of pairs in which it is positive."""
        pairs = batch.examples // 2
        parts, sums = [], torch.zeros(3, dtype=torch.float64, device=parallel.device)
        for part in batch.micro_batches:
            z, is_pair = self._margins(parallel, part, self.reference)
            losses, slopes = self._losses(z)
            sums += _totals(losses, z, is_pair)
            assert part.doc_ids is not None
            factors = torch.stack([slopes, -slopes], -1).flatten(1) * is_pair.repeat_interleave(2, -1)
            padded = torch.cat([factors, factors.new_zeros(len(factors), 1)], 1)
            ids = part.doc_ids.to(padded.device).clamp(max=factors.shape[1])
            parts.append(replace(part, factors=padded.gather(1, ids).cpu()))
        owned = sums / max(pairs, 1) if parallel.owns_rows() else torch.zeros_like(sums)
        return Weighed(replace(batch, micro_batches=parts, valid_tokens=pairs), owned)

    def validate(self, parallel: ParallelModel, batch: Batch) -> Tensor:
        """Do as `Objective.validate`."""
        z, is_pair = self._margins(parallel, batch, self.held_out)
        sums = torch.cat([_totals(self._losses(z)[0], z, is_pair), is_pair.sum().to(torch.float64)[None]])
        return sums if parallel.owns_rows() else torch.zeros_like(sums)

    def _margins(self, parallel: ParallelModel, batch: Batch, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return z `(rows, pairs)` of each pair of a row, and which of them are there."""
        found, is_there = log_probabilities(parallel, batch)
        assert batch.examples is not None
        known = torch.zeros_like(found)
        for row, numbers in enumerate(batch.examples):
            known[row, : len(numbers)] = reference[list(numbers)].to(known.device)
        ratios = (found - known) * is_there
        z = self.cfg.beta * (ratios[:, 0::2] - ratios[:, 1::2])
        return z, is_there[:, 0::2]

    def _losses(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair, and minus its derivative with respect to the chosen answer's log-ratio."""
        wrong = self.cfg.label_smoothing
        losses = -(1 - wrong) * logsigmoid(z) - wrong * logsigmoid(-z)
        return losses, self.cfg.beta * ((1 - wrong) * torch.sigmoid(-z) - wrong * torch.sigmoid(z))


def _totals(losses: Tensor, z: Tensor, is_pair: Tensor) -> Tensor:
    return torch.stack([(each * is_pair).sum() for each in (losses, z, (z > 0).to(z.dtype))])


def log_probabilities(parallel: ParallelModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer of each row, `(rows, answers)` float64, and which of them are there."""
    assert batch.examples is not None
    assert batch.doc_ids is not None
    count = max(map(len, batch.examples), default=0)
    count += count % 2
    losses = token_losses(parallel, on_device(parallel, batch))
    found = -document_sums(parallel, losses, batch.doc_ids.to(parallel.device), count)
    lengths = torch.tensor([len(numbers) for numbers in batch.examples], device=parallel.device)
    return found, torch.arange(count, device=parallel.device) < lengths[:, None]
