"""Validation: loss and bits per byte on the held-out split."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatrain.data.loader import Batch, ignored_batch
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.layout import data_ranks
from megatrain.train.objective import Objective
from megatrain.train.step import evaluation_loss, right_documents


class CalledOffError(Exception):
    """A validation was called off before its end."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """Total nats / (ln 2 · bytes of text that the predicted tokens stand for); None where tokens have no text."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Further metrics by name. Of a classifier `accuracy`: the share of documents all of whose labels are right."""


def evaluate(
    parallel: ParallelModel,
    batches: Sequence[Batch],
    token_bytes: np.ndarray | None,
    *,
    objective: Objective | None = None,
    is_called_off: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Return the mean loss over every valid token of `batches`; the model's mode and weights are left as they were.

    Ranks that read different data take turns; each computes equally many batches, since they compute together.

    Args:
        batches: the same on every rank.
        objective: what the run minimizes; None: the cross entropy of the targets.
        token_bytes: `(vocab,)` bytes of text of each token, 0 for special tokens.
        is_called_off: asked after each batch; the answer is the same on all ranks.

    Raises:
        CalledOffError: it was called off.
    """
    if objective is not None and not objective.eval_names:
        objective = None
    is_shared = objective is not None and objective.is_shared
    readers = 1 if is_shared else data_ranks(parallel.cfg)
    reader = 0 if parallel.mesh is None or is_shared else parallel.mesh.data_rank
    names = () if objective is None else objective.eval_names
    sums = torch.zeros(2 + len(names), dtype=torch.float64, device=parallel.device)
    for first in range(0, len(batches), readers):
        own = batches[first + reader] if first + reader < len(batches) else ignored_batch(batches[0])
        if objective is not None:
            sums += objective.validate(parallel, own)
        else:
            sums[0] += evaluation_loss(parallel, own)
        if parallel.plan.has_classifier:
            sums[1] += right_documents(parallel, own)
        if is_called_off():
            raise CalledOffError
    total, *more = parallel.total(sums).tolist()
    if objective is not None:
        *values, count = more
        return Evaluation(
            total / max(count, 1), None, {n: v / max(count, 1) for n, v in zip(names, values, strict=True)}
        )
    targets = np.concatenate([batch.targets[batch.targets >= 0].numpy() for batch in batches])
    if parallel.plan.has_classifier:
        count = max(targets.size, 1)
        return Evaluation(loss=total / count, bits_per_byte=None, more={"accuracy": more[0] / count})
    text_bytes = 0 if token_bytes is None else int(token_bytes[targets].sum())
    bits_per_byte = total / (math.log(2) * text_bytes) if text_bytes else None
    return Evaluation(loss=total / max(targets.size, 1), bits_per_byte=bits_per_byte)
