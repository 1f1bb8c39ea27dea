"""The device of a process: which one, how fast at best, and in which precision it trains faster."""

import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatrain.runtime.paths import cache_dir

# Dense tensor-core TFLOP/s in bf16 and in fp32 (TF32 where the chip has it), from the makers' data sheets.
PUBLISHED_TFLOPS = {
    "A100": (312, 156),
    "H100 PCIe": (756, 378),
    "H100": (989, 495),
    "H200": (989, 495),
    "B200": (2250, 1125),
    "MI300X": (1307, 654),
    "L40S": (362, 183),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
}
GEMM_SHAPE = (2048, 1024, 1024)  # rows, inner, columns: large enough for the peak, 30 ms on two slow cores


@dataclass(frozen=True, slots=True)
class Peak:
    """The ceiling that utilization is a share of."""

    flops: float
    """FLOP/s of dense matrix products."""
    how: Literal["published", "measured"]


def pick_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Best FLOP/s of `device` in `dtype`: published for a known GPU, measured for a CPU, else None."""
    if device.type == "cpu":
        return Peak(_measured(dtype), "measured")
    name = torch.cuda.get_device_name(device)
    for known, (bf16, fp32) in PUBLISHED_TFLOPS.items():
        if all(word in name for word in known.split()):
            if dtype in (torch.bfloat16, torch.float16):
                return Peak(bf16 * 1e12, "published")
            return Peak(fp32 * 1e12, "published") if dtype == torch.float32 else None
    return None


def choose_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies it faster than float32, by a quick measurement on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    faster = _measured(torch.bfloat16) > 1.3 * _measured(torch.float32)  # casts and norms eat a smaller gain
    return "bf16" if faster else "fp32"


def _measured(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this CPU; measured once and kept in the cache directory."""
    key = f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}"
    file = cache_dir() / "gemm_peaks.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text())
    if key not in known:
        known[key] = _time_gemm(dtype)
        with contextlib.suppress(OSError):  # without a cache it is measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(file)
    return known[key]


def _time_gemm(dtype: torch.dtype) -> float:
    rows, inner, columns = GEMM_SHAPE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    best, started = float("inf"), time.perf_counter()
    for _ in range(20):
        before = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - started > 0.3:
            break
    return 2 * rows * inner * columns / best


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
