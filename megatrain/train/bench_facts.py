"""What a measurement depends on beside the config: machine, versions, code, and load from other processes."""

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatrain
import megatrain_kernels
from megatrain.runtime.device import cpu_name, memory_bytes

PACKAGES = ("megatrain", "torch", "triton", "numpy")


def machine_facts(device: torch.device, processes: int) -> dict[str, object]:
    """Return host, processor or GPU, cores, threads and memory."""
    on_gpu = device.type == "cuda"
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads_per_process": torch.get_num_threads(),
        "processes": processes,
        "memory_gib": round(memory_bytes(device) / 2**30, 1),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_facts() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that determine speed; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def code_facts() -> dict[str, str | bool | None]:
    """Return the commit if the code is in a git checkout, whether it was changed since, and a hash of the source."""
    source = Path(megatrain.__path__[0])
    hashed = hashlib.sha256()
    for package in (source, Path(megatrain_kernels.__path__[0])):
        for file in sorted(package.rglob("*.py")):
            hashed.update(file.relative_to(package.parent).as_posix().encode() + b"\0" + file.read_bytes())
    # A file that git knows: a virtual environment inside somebody's own checkout is not this code's.
    is_checkout = _git(source, "ls-files", "--error-unmatch", "__main__.py") is not None
    return {
        "commit": _git(source, "rev-parse", "HEAD") if is_checkout else None,
        "changed_since": bool(_git(source, "status", "--porcelain", "--", ".")) if is_checkout else None,
        "source_sha256": hashed.hexdigest(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None if it fails or is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class BusyCores:
    """A moment from which on the load by other processes is measured (on Linux)."""

    at: float
    all_s: float | None
    """CPU seconds that all processes had used."""
    own_s: float

    @classmethod
    def now(cls) -> "BusyCores":
        """Return the present moment."""
        return cls(time.monotonic(), _all_cpu_seconds(), time.process_time())

    def others(self, processes: int) -> float:
        """Return the mean number of cores that others kept busy since then, where `processes` like this one run."""
        later = BusyCores.now()
        elapsed = later.at - self.at
        if (
            self.all_s is None or later.all_s is None or elapsed < 0.5
        ):  # its clock ticks a hundred times a second
            return 0.0
        return max(0.0, (later.all_s - self.all_s - processes * (later.own_s - self.own_s)) / elapsed)


def _all_cpu_seconds() -> float | None:
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, softirq = map(int, words[:7])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


DEBUG_FLAGS: Mapping[str, tuple[str, ...]] = {
    "CUDA_LAUNCH_BLOCKING": ("1",),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1",),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "INFO"),
    "NCCL_DEBUG": ("INFO", "TRACE"),
    "TRITON_INTERPRET": ("1",),
    "TORCH_COMPILE_DEBUG": ("1",),
    "PYTHONDEVMODE": ("1",),
}
"""Environment variables, and their values that make training slower."""


def debug_flags(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the settings of the environment that make training slower, as `NAME=value`."""
    found = [
        f"{name}={environment[name]}"
        for name, slow in DEBUG_FLAGS.items()
        if environment.get(name, "") in slow
    ]
    return [*found, *(["torch.autograd.set_detect_anomaly"] if torch.is_anomaly_enabled() else [])]
