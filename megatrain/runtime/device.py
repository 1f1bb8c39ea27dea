"""The device of a process: its choice, its peak FLOP/s, and the faster training precision."""

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatrain.config.errors import UserError
from megatrain.runtime.paths import cache_dir

PUBLISHED_TFLOPS: dict[str, tuple[float, float | None, float | None, float | None]] = {
    # Dense (no structured sparsity) peaks: float32 without tensor cores, TF32, bf16 and fp16 with float32 sums, fp8.
    # Sources: NVIDIA's data sheets of each product (where they count sparsity, half of it), the appendices of its
    # white papers on GA102, AD102 and GB202, AMD's data sheets (float32: its matrix cores; MI250X: one of two dies).
    "V100": (15.7, None, None, None),
    "T4": (8.1, None, None, None),
    "A10": (31.2, 62.5, 125, None),
    "A40": (37.4, 74.8, 149.7, None),
    "A100": (19.5, 156, 312, None),
    "A800": (19.5, 156, 312, None),
    "L4": (30.3, 60.5, 121, 242.5),
    "L40": (90.5, 90.5, 181, 362),
    "L40S": (91.6, 183, 362, 733),
    "H20": (44, 74, 148, 296),
    "H100": (67, 494.5, 989.5, 1979),
    "H100 PCIe": (51, 378, 756, 1513),
    "H100 NVL": (60, 417.5, 835.5, 1670.5),
    "H800": (67, 494.5, 989.5, 1979),
    "H200": (67, 494.5, 989.5, 1979),
    "H200 NVL": (60, 417.5, 835.5, 1670.5),
    "GH200": (67, 494.5, 989.5, 1979),
    "B200": (75, 1125, 2250, 4500),
    "GB200": (80, 1250, 2500, 5000),
    "MI250X": (47.9, None, 191.5, None),
    "MI300X": (163.4, 653.7, 1307.4, 2614.9),
    "MI325X": (163.4, 653.7, 1307.4, 2614.9),
    "RTX 3090": (35.6, 35.6, 71, None),
    "RTX 4090": (82.6, 82.6, 165.2, 330.3),
    "RTX 5090": (104.8, 104.8, 209.5, 419),
    "RTX A6000": (38.7, 77.4, 154.8, None),
}
SLOWER_KINDS = {
    "laptop",
    "mobile",
    "max",
    "d",
    "mig",
}  # words that name a slower kind, or a part, of a known GPU

GEMM_SHAPE = (2048, 1024, 1024)  # rows, inner, columns: large enough for the peak, 25 ms on two cores
QUICK_S = 0.05  # a product that takes longer is not made larger
FASTER = 1.3  # casts and norms cancel a smaller gain
NOISE = 1.02  # measurements that differ by less are the same


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak FLOP/s, the denominator of MFU."""

    flops: float
    """FLOP/s of dense matrix products."""
    how: Literal["published", "measured"]


def pick_device(local_rank: int = 0) -> torch.device:
    """Return the GPU of the process `local_rank` of this machine, or the CPU.

    A single visible GPU is the process's own, whatever its rank: schedulers can show each task one GPU only.

    Raises:
        UserError: this machine has several GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this process sees {visible} GPUs (0 to {visible - 1}). Start as many "
            "processes on each machine as it has GPUs, or let each task see its own GPU alone."
        )
    return torch.device("cuda", local_rank if visible > 1 else 0)


def memory_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the bytes of memory that a process has: the GPU's, or its share of what the machine gives `processes`."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit: "max", or no such file
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total // processes


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Return the best FLOP/s of `device` in `dtype`: published for a known GPU, measured for a CPU, else None.

    On a CPU, the best that any process on this machine ever measured, so that a moment in which others kept the
    machine busy does not lower the ceiling for good. Takes a tenth of a second.
    """
    if device.type != "cpu":
        tflops = published_tflops(torch.cuda.get_device_name(device), dtype)
        return None if tflops is None else Peak(tflops * 1e12, "published")
    known = _read_peaks()
    best = known.get(_key(dtype), 0.0)
    now = _measure((dtype,), seconds=0.1)[dtype]
    if now > NOISE * best:
        best = now
        _write_peaks(known | {_key(dtype): now})
    return Peak(best, "measured")


def published_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Return the dense TFLOP/s in `dtype` of the GPU that its driver calls `name`; None if they are not known.

    float32 is counted as TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    fits = [known for known in PUBLISHED_TFLOPS if words.issuperset(known.lower().split())]
    if not fits or words & SLOWER_KINDS:
        return None
    fp32, tf32, half, fp8 = PUBLISHED_TFLOPS[max(fits, key=lambda known: len(known.split()))]
    if dtype == torch.float32:
        return fp32 if tf32 is None or torch.get_float32_matmul_precision() == "highest" else tf32
    if dtype in (torch.bfloat16, torch.float16):
        return half
    return fp8 if dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else None


def choose_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """Choose bf16 where the device multiplies it clearly faster than float32.

    On a CPU by a measurement of 0.3 s, kept in the cache directory.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    both = (torch.bfloat16, torch.float32)
    known = _read_peaks()
    if any(_key(dtype) not in known for dtype in both):
        known |= {_key(dtype): flops for dtype, flops in _measure(both, seconds=0.3).items()}
        _write_peaks(known)
    bf16, fp32 = (known[_key(dtype)] for dtype in both)
    return "bf16" if bf16 > FASTER * fp32 else "fp32"


def _measure(dtypes: Iterable[torch.dtype], *, seconds: float) -> dict[torch.dtype, float]:
    """Measure the best FLOP/s of matrix products on this CPU; the types take turns, so that noise hits them alike."""
    products = {dtype: _affordable_product(dtype) for dtype in dtypes}
    best = dict.fromkeys(products, 0.0)
    deadline = time.perf_counter() + seconds
    while True:
        for dtype, product in products.items():
            best[dtype] = max(best[dtype], product())
        if time.perf_counter() > deadline:
            return best


def _affordable_product(dtype: torch.dtype) -> Callable[[], float]:
    """Return a product of GEMM_SHAPE, or of fewer rows where it would take long.

    (A CPU without instructions for bf16 can be hundreds of times slower in it than in float32.)
    """
    rows, inner, columns = 4, *GEMM_SHAPE[1:]
    while True:
        product = _product(dtype, rows)
        flops = 2 * rows * inner * columns
        quick = any(flops / product() < QUICK_S for _ in range(2))  # the first may be slow by chance
        if rows == GEMM_SHAPE[0] or not quick:
            return product
        rows = min(4 * rows, GEMM_SHAPE[0])


def _product(dtype: torch.dtype, rows: int) -> Callable[[], float]:
    """Make a function that multiplies matrices once, into the same memory, and returns the FLOP/s."""
    _, inner, columns = GEMM_SHAPE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    out = torch.ones(rows, columns, dtype=dtype)

    def multiply() -> float:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        return 2 * rows * inner * columns / (time.perf_counter() - before)

    return multiply


def _key(dtype: torch.dtype) -> str:
    """Name what a measured peak depends on."""
    precision = torch.get_float32_matmul_precision() if dtype == torch.float32 else "as is"
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}, {dtype}, {precision}"


def _peaks_file() -> Path:
    return cache_dir() / "gemm_peaks.json"


def _read_peaks() -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError, UserError):
        found = json.loads(_peaks_file().read_text())
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, float) and value > 0}
    return {}


def _write_peaks(peaks: dict[str, float]) -> None:
    with contextlib.suppress(OSError, UserError):  # without a cache it is measured again next time
        file = _peaks_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(peaks, indent=1) + "\n")
        partial.replace(file)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
