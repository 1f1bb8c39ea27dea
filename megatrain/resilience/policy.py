"""What follows from a step's loss and gradient norm: take it, skip it, go back, or end the run.

Every rank comes to the same verdict, since all know the same numbers.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatrain.resilience.config import ResilienceConfig

WINDOW = 128
"""Losses to which the next one is compared."""
FEWEST = 20
"""Losses that there must be before one can be a spike."""
CONSISTENT = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation."""
LEAST = 0.01
"""Deviation relative to the median, at least: the losses of a small model may hardly differ."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with a step."""

    action: Literal["take", "skip", "roll back", "stop"]
    why: str = ""


TAKE = Verdict("take")


class FailurePolicy:
    """The verdicts of one attempt."""

    def __init__(self, cfg: ResilienceConfig, losses: Iterable[float] = ()) -> None:
        """Take over what is known of earlier attempts.

        Args:
            losses: of the latest steps of earlier attempts, the oldest first.
        """
        self.cfg = cfg
        self._losses = deque(losses, WINDOW)
        self._skipped = 0
        self._went_back_to: set[int] = set()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Return what is to be done with a step that has this loss and gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._judge_not_finite()
        self._skipped = 0
        limit = self._limit()
        if self.cfg.spike == "ignore" or loss <= limit:
            self._losses.append(loss)
            return TAKE
        return Verdict("roll back", f"its loss, {loss:.4g}, is a spike: above {limit:.4g}")

    def has_gone_back_to(self, step: int) -> bool:
        """Tell whether the run has gone back to the checkpoint of `step` before: the batches are not at fault."""
        return step in self._went_back_to

    def went_back(self, step: int, losses: Iterable[float]) -> None:
        """Note that the run has gone back to `step`; `losses` are those up to it."""
        self._went_back_to.add(step)
        self._losses = deque(losses, WINDOW)

    def _judge_not_finite(self) -> Verdict:
        what = "its loss or gradient norm is not finite"
        if self.cfg.non_finite == "stop":
            return Verdict("stop", what)
        if self._skipped >= self.cfg.max_skips:
            return Verdict("stop", f"{what}, as in the {self._skipped} steps before, which were skipped")
        self._skipped += 1
        return Verdict("skip", what)

    def _limit(self) -> float:
        """Return the largest loss that is no spike."""
        if len(self._losses) < FEWEST:
            return math.inf
        median = statistics.median(self._losses)
        deviation = CONSISTENT * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.cfg.spike_deviations * max(deviation, LEAST * abs(median))
