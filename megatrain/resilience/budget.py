"""The wall time of an attempt: when the next step would not end, and be saved, in time."""

import time

from megatrain.resilience.signals import STARTED

MARGIN_S = 5.0
"""Time for what follows the last save, in seconds."""
SLACK = 1.5
"""A step and a save may take this many times as long as the longest so far."""


class TimeBudget:
    """Seconds from the start of the command after which training must have stopped and saved."""

    def __init__(self, seconds: float | None, *, first_save_s: float) -> None:
        """Keep `seconds`; None: there is no limit.

        Args:
            first_save_s: what a save takes, as long as none was made.
        """
        self.seconds = seconds
        self._longest_save = first_save_s
        self._longest_step = 0.0

    def note_step(self, seconds: float) -> None:
        """Note how long a step took, with all that was done between it and the one before."""
        self._longest_step = max(self._longest_step, seconds)

    def note_save(self, seconds: float) -> None:
        """Note how long training stood still for a save."""
        self._longest_save = max(self._longest_save, seconds)

    def is_used_up(self) -> bool:
        """Tell whether another step and a save might end too late."""
        if self.seconds is None:
            return False
        reserve = SLACK * (self._longest_step + self._longest_save) + MARGIN_S
        return time.monotonic() - STARTED + reserve >= self.seconds
