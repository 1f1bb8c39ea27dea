"""Checks of a machine's hardware and software: one function per part, each of which returns rows.

A row's state is `ok`, `missing` (a feature can't be used; the row says which and how to get it) or `broken`
(nothing can be trained).
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatrain.runtime.packages import how_to_install
from megatrain.runtime.paths import cache_dir

GIB = 2**30
MIN_FREE_GIB = 2
"""Free space in GiB below which the checkpoints and data cache of a small run may not fit."""
REQUIRED = ("torch", "numpy", "safetensors", "hydra", "omegaconf", "yaml")
FEATURES = (
    ("wandb", "logging to Weights & Biases (log.wandb)"),
    ("tensorboard", "TensorBoard event files (log.tensorboard=true)"),
    ("rich", "the live display (log.display=live)"),
    ("tokenizers", "trained BPE and Hugging Face tokenizers (data.tokenizer.kind=bpe, huggingface)"),
    ("tiktoken", "tiktoken vocabularies (data.tokenizer.kind=tiktoken)"),
    ("pyarrow", "Parquet data (data.path=*.parquet)"),
    ("s3fs", "data and checkpoints in S3 (data.path=s3://..., checkpoint.durable=s3://...)"),
    ("triton", "the Triton kernels on a GPU"),
    ("pydantic", "the JSON schema of the config (--cfg schema)"),
    ("deepspeed", "engine=deepspeed"),
    ("accelerate", "engine=accelerate"),
    ("fastapi", "megatrain serve"),
    ("uvicorn", "megatrain serve"),
    ("prometheus_client", "megatrain serve"),
    ("transformers", "comparisons with Hugging Face models (make test, make bench)"),
)
"""Importable names of optional packages, and what they are for."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")
"""Instruction sets that determine the speed of bf16 and fp32 (the last two: Arm)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fact about the machine."""

    name: str
    value: str
    state: Literal["ok", "missing", "broken"] = "ok"
    fix: str = ""
    """How to fix it; empty if there is nothing to fix."""


def versions() -> list[Row]:
    """Check Python and the required packages by importing them."""
    rows = [
        Row("python", f"{platform.python_version()} ({sys.executable})"),
        Row("system", platform.platform()),
    ]
    for name in REQUIRED:
        package = {"hydra": "hydra-core", "yaml": "pyyaml"}.get(name, name)
        try:
            import_module(name)
            rows.append(Row(name, version(package)))
        except Exception as error:  # a broken installation may raise anything
            rows.append(Row(name, f"{type(error).__name__}: {error}", "broken", how_to_install(package)))
    return rows


def cpu() -> list[Row]:
    """Find the CPU's model, the cores that this process may use, and instruction sets."""
    info = _read("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = {
        word for line in info.splitlines() if line.startswith(("flags", "Features")) for word in line.split()
    }
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [Row("model", models[0] if models else platform.processor() or platform.machine())]
    rows.append(Row("cores", f"{usable} usable of {os.cpu_count()}"))
    if info:
        rows.append(
            Row("instructions", ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "baseline only")
        )
    return rows


def cuda() -> list[Row]:
    """Find the GPUs that PyTorch can use, and the reason if it can't use those present."""
    import torch

    if torch.cuda.is_available():
        rows = [Row("cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")]
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            text = f"{found.name}, {found.total_memory / GIB:.0f} GiB, capability {found.major}.{found.minor}"
            rows.append(Row(f"gpu {index}", text))
        return rows
    listing = _first_line(["nvidia-smi", "-L"])
    if not listing:
        return [Row("gpu", "none; runs use the CPU")]
    built = torch.version.cuda or "no CUDA"
    fix = "install a PyTorch build for the CUDA version of this driver, see https://pytorch.org/get-started"
    return [Row("gpu", f"{listing}, but this PyTorch build ({built}) can't use it", "missing", fix)]


def memory() -> list[Row]:
    """Find main memory and shared memory, in GiB."""
    amounts = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        amounts[name] = int(rest.split()[0]) * 1024 / GIB
    rows = []
    if "MemTotal" in amounts:
        rows.append(
            Row("memory", f"{amounts['MemAvailable']:.1f} GiB available of {amounts['MemTotal']:.1f}")
        )
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows.append(Row("memory limit", f"{int(limit) / GIB:.1f} GiB (cgroup)"))
    if os.path.isdir("/dev/shm"):
        rows.append(Row("/dev/shm", f"{shutil.disk_usage('/dev/shm').free / GIB:.1f} GiB free"))
    return rows


def compiler() -> list[Row]:
    """Check the C++ compiler by compiling a program, and find Python's headers and ninja, for torch.compile."""
    use = "parallel.compile=true"
    rows = []
    name = os.environ.get("CXX") or next(
        (each for each in ("c++", "g++", "clang++") if shutil.which(each)), None
    )
    if name is None:
        rows.append(Row("c++", f"none; needed for {use}", "missing", "install one, e.g. apt install g++"))
    else:
        error = _compile_error(name)
        label = _first_line([name, "--version"]) or name
        rows.append(
            Row("c++", f"{label}: {error}", "missing", f"repair it for {use}") if error else Row("c++", label)
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        rows.append(Row("python headers", str(header.parent)))
    else:
        rows.append(
            Row("python headers", f"none; needed for {use}", "missing", "e.g. apt install python3-dev")
        )
    ninja = shutil.which("ninja")
    fix = "" if ninja else how_to_install("ninja")
    value = ninja or "none; needed to build C++ extensions"
    rows.append(Row("ninja", value, "ok" if ninja else "missing", fix))
    return rows


def network() -> list[Row]:
    """Find network interfaces with their addresses, InfiniBand, and whether this host's name resolves to it."""
    rows = []
    for _, name in socket.if_nameindex():
        state = _read(f"/sys/class/net/{name}/operstate").strip() or "unknown"
        rows.append(
            Row(name, f"{_address_of(name) or 'no IPv4 address'} ({'up' if name == 'lo' else state})")
        )
    infiniband = Path("/sys/class/infiniband")
    if infiniband.is_dir():
        rows.append(
            Row("infiniband", ", ".join(sorted(each.name for each in infiniband.iterdir())) or "none")
        )
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as probe:
            probe.bind((address, 0))
        rows.append(Row("host name", f"{host} is {address}"))
    except OSError as error:
        fix = (
            f"add '127.0.0.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to one of the interfaces above"
        )
        rows.append(
            Row("host name", f"{host}: {error}; needed for runs with several processes", "missing", fix)
        )
    return rows


def paths() -> list[Row]:
    """Check the directories that a run writes to by writing a file."""
    places = {
        "runs": (Path("runs").absolute(), "set run.dir=DIR to a writable directory"),
        "data cache": (
            cache_dir(),
            "set MEGATRAIN_CACHE or data.cache_dir to a writable directory",
        ),
        "temporary": (Path(tempfile.gettempdir()), "set TMPDIR to a writable directory"),
    }
    rows = []
    for name, (path, fix) in places.items():
        error = _write_error(path)
        free = shutil.disk_usage(_existing(path)).free / GIB
        if error:
            rows.append(Row(name, f"{path}: {error}", "broken", fix))
        elif free < MIN_FREE_GIB:
            rows.append(Row(name, f"{path}: only {free:.1f} GiB free", "broken", fix))
        else:
            rows.append(Row(name, f"{path}, {free:.0f} GiB free"))
    return rows


def features() -> list[Row]:
    """Find optional packages: what each is for, and how to get those that are missing."""
    rows = []
    for name, purpose in FEATURES:
        if find_spec(name) is None:
            rows.append(Row(name, f"not installed; needed for {purpose}", "missing", how_to_install(name)))
            continue
        try:
            rows.append(Row(name, f"{version(name)}; for {purpose}"))
        except PackageNotFoundError:
            rows.append(Row(name, f"unknown version; for {purpose}"))
    return rows


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(command: list[str]) -> str:
    """Return the first line that a command prints; empty if it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


def _compile_error(name: str) -> str:
    """Return the error of compiling a small program; empty if it succeeds."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n")
        command = [*name.split(), str(source), "-o", str(source.with_suffix(""))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        return (done.stderr.splitlines() or ["it failed"])[0] if done.returncode else ""


def _address_of(interface: str) -> str:
    """Return the interface's IPv4 address; empty if it has none, or off Linux."""
    try:
        import fcntl

        request = interface.encode()[:15].ljust(256, b"\0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
    except (ImportError, OSError):
        return ""


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _write_error(path: Path) -> str:
    """Return the error of writing at `path` (created if missing, and removed again); empty if it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""
