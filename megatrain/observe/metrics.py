"""Throughput, utilization and memory of a step, under the names that metrics.jsonl uses.

`perf/mfu` counts attention in full, as PaLM does (arXiv 2204.02311, appendix B); `perf/mfu_causal` counts only what
the causal mask leaves. Recomputed work counts in neither.
"""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from megatrain.runtime.device import Peak

TIMES = ("perf/step_time_s", "perf/data_time_s")
RATES = (
    "perf/tokens_per_sec",
    "perf/tokens_per_sec_per_device",
    "perf/tflops_per_device",
    "perf/mfu",
    "perf/mfu_causal",
)


def throughput(
    tokens: int,
    seconds: float,
    *,
    flops_per_token_full: float,
    flops_per_token_causal: float,
    peak: Peak | None,
    devices: int,
) -> dict[str, Any]:
    """Return the rates of a step of `tokens` tokens on `devices` devices; no MFU where the peak is unknown."""
    rate = tokens / seconds
    per_device = rate / devices
    row: dict[str, Any] = {
        "perf/tokens_per_sec": rate,
        "perf/tokens_per_sec_per_device": per_device,
        "perf/tflops_per_device": per_device * flops_per_token_full / 1e12,
    }
    if peak is not None:
        row["perf/mfu"] = per_device * flops_per_token_full / peak.flops
        row["perf/mfu_causal"] = per_device * flops_per_token_causal / peak.flops
    return row


STALL = "checkpoint/stall_s"
EVALUATION = "perf/eval_time_s"
ELAPSED = "perf/elapsed_s"


class Interval:
    """The steps since the last recorded row, whose times and rates are to be those of all of them."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take in the row of one step."""
        self._rows.append({key: row[key] for key in (*TIMES, *RATES, STALL) if key in row})

    def averages(self) -> dict[str, float]:
        """Return the mean seconds a step, rates over all its seconds, and the sum of stalls; begin a new interval."""
        rows, self._rows = self._rows, []
        found = {key: sum(row[key] for row in rows) / len(rows) for key in TIMES if key in rows[0]}
        if stalls := [row[STALL] for row in rows if STALL in row]:
            found[STALL] = sum(stalls)
        for key in RATES:
            if key in rows[0]:
                seconds = sum(row["perf/step_time_s"] for row in rows)
                found[key] = sum(row[key] * row["perf/step_time_s"] for row in rows) / seconds
        return found


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory_gib`, so that it does not tell of what came before (preparing the data, say).

    On a CPU that takes Linux; elsewhere the peak remains that of the process's whole life.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the high-water mark


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, GiB: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, IndexError):
        # Rather than getrusage's: that one begins with the memory of the process which started this one.
        status = Path("/proc/self/status").read_bytes()
        return int(status.split(b"VmHWM:")[1].split()[0]) / 2**20  # KiB there
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
