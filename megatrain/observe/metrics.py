"""Throughput, utilization and memory of a step, under the names that metrics.jsonl uses.

`perf/mfu` counts attention in full, as PaLM does (arXiv 2204.02311, appendix B); `perf/mfu_causal` counts only what
the causal mask leaves. Recomputed work counts in neither.
"""

import resource
import sys
from typing import Any

import torch

from megatrain.runtime.device import Peak


def throughput(
    tokens: int,
    seconds: float,
    *,
    flops_per_token_full: float,
    flops_per_token_causal: float,
    peak: Peak | None,
    devices: int,
) -> dict[str, Any]:
    """Rates of a step of `tokens` tokens on `devices` devices; no utilization where the peak is not known."""
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


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, GiB: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
