"""What machine a result comes from, and its measured ceilings."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe_machine() -> dict[str, object]:
    """Return the facts that a figure depends on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def gemm_peak(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the best of several repeats of a (2048, 1024) x (1024, 1024) product, in FLOP/s by `clock`."""
    m, k, n = 2048, 1024, 1024
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    best = float("inf")
    for _ in range(20):
        started = clock()
        torch.mm(a, b)
        best = min(best, clock() - started)
    return 2 * m * k * n / best
