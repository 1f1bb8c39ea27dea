"""Time of a call on a device: median of several, with the caches emptied between them."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 2  # calls that compile, choose and allocate
MOST = 30
LEAST = 3


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, *, seconds: float) -> None:
        """Set how many seconds the timed calls of one measurement may take together, about."""
        self.device = device
        self.seconds = seconds
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            # Far more than any level-2 cache; and writing it gives the host time to queue up what is measured.
            size = min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 32)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def median_ms(self, run: Callable[[], object]) -> float:
        """Return the median of `run`, in milliseconds."""
        for _ in range(WARM_UP):
            run()
        first = self._times(run, 1)[0]
        repeats = max(LEAST, min(MOST, int(1e3 * self.seconds / max(first, 1e-3))))
        return statistics.median(self._times(run, repeats))

    def _times(self, run: Callable[[], object], repeats: int) -> list[float]:
        if self._flush is None:
            return [_host_ms(run) for _ in range(repeats)]
        marks = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            run()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in marks]


def _host_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)
