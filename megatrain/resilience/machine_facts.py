"""What a process knows of its machine, to be compared with what the others know of theirs."""

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatrain.runtime.device import device_name
from megatrain.runtime.paths import cache_dir

GIB = 2**30
PACKAGES = ("megatrain", "megatrain_kernels")
"""Packages whose code must be the same everywhere."""
LIBRARIES = ("torch", "numpy", "safetensors", "triton", "accelerate", "deepspeed")
"""Distributions that take part in computing, or in writing checkpoints."""
OF_RESULTS = (
    "CUBLAS",
    "CUDNN",
    "NVIDIA_TF32",
    "TORCH_ALLOW",
    "TORCH_BLAS",
    "TORCH_CUDNN",
    "TORCH_LINALG",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "TRITON_",
    "DNNL_",
    "ONEDNN_",
    "MKL_",
    "ATEN_",
)
"""Beginnings of names of environment variables that can change what is computed."""
OF_ROUTES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "KMP_")
"""And of those that change which way data take, or how fast: they may differ for a reason."""
OF_PLACES = ("_DIR", "_HOME", "_PATH", "_FILE", "_HOSTID", "_CACHE", "_LOG", "_LOGS")
"""Ends of names of variables that hold a place on the machine."""
SMI = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the last restart",
    "remapped_rows.failure": "a memory row that can't be remapped any more",
    "clocks_event_reasons.hw_thermal_slowdown": "throttled by heat",
    "clocks_event_reasons.hw_power_brake_slowdown": "throttled by the power supply",
}
"""Field of nvidia-smi -> what is wrong with a GPU for which it is neither 0 nor a word for no."""
FINE = ("0", "no", "not active", "n/a", "[n/a]", "[not supported]", "")


@dataclass(frozen=True)
class MachineFacts:
    """What one process found."""

    rank: int
    host: str
    code: str
    """Hash of the source files of the packages."""
    versions: dict[str, str]
    settings: dict[str, str]
    """Environment variables that can change results."""
    routes: dict[str, str]
    """Environment variables that can change routes and speed."""
    device: str
    unhealthy: tuple[str, ...] = ()
    """What is wrong with the device."""
    free_gib: dict[str, float] = field(default_factory=dict)
    """Place -> free space; `memory` -> what is available."""
    time: float = 0.0
    """Wall clock at a moment that all processes share, s."""


def machine_facts(rank: int, device: torch.device) -> MachineFacts:
    """Find the facts, but for the time. Takes about 0.05 s, more where nvidia-smi is asked."""
    return MachineFacts(
        rank=rank,
        host=socket.gethostname(),
        code=hash_of_code(),
        versions=_versions(device),
        settings=_environment(OF_RESULTS),
        routes=_environment(OF_ROUTES),
        device=device_name(device),
        unhealthy=_health(device) if device.type == "cuda" else (),
        free_gib=_free_gib(),
    )


def hash_of_code() -> str:
    """Return the hash of every source file of the packages, by its path in them."""
    found = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        for place in sorted([] if spec is None else spec.submodule_search_locations or []):
            for path in sorted(Path(place).rglob("*.py")):
                found.update(f"{package}/{path.relative_to(place)}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        with contextlib.suppress(Exception):  # another backend
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _environment(beginnings: tuple[str, ...]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(beginnings) and not name.endswith(OF_PLACES)
    }


def _free_gib() -> dict[str, float]:
    found = {}
    for name, place in {
        "temporary files": Path(tempfile.gettempdir()),
        "the data cache": cache_dir(),
    }.items():
        existing = next(each for each in (place, *place.parents) if each.exists())
        found[name] = shutil.disk_usage(existing).free / GIB
    with contextlib.suppress(OSError, ValueError, IndexError):
        found["memory"] = (
            int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024 / GIB
        )
    return found


def _health(device: torch.device) -> tuple[str, ...]:
    """Return what nvidia-smi says against a GPU; nothing where it is missing, or does not know a field."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    query.append(f"--id={_bus_id(device)}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    values = [value.strip() for value in done.stdout.split(",")]
    return tuple(
        f"{what} ({value})"
        for what, value in zip(SMI.values(), values, strict=False)
        if value.lower() not in FINE
    )


def _bus_id(device: torch.device) -> str:
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
