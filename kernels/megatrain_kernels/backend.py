"""What the machine offers: Triton, its interpreter, and tensor cores."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result  # torch.compile cannot trace the queries, here and below
def interpreting() -> bool:
    """Return whether Triton runs its kernels on the CPU, in Python (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and has_triton()


@cache
def cuda_capability(index: int) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; (0, 0) under ROCm."""
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def _compiles_for(index: int) -> bool:
    return has_triton() and (torch.version.hip is not None or cuda_capability(index) >= (8, 0))


def triton_runs_on(x: Tensor) -> bool:
    """Return whether a compiled Triton kernel can take x; the interpreter does not count."""
    return x.is_cuda and _compiles_for(x.device.index or 0)


@torch.compiler.assume_constant_result
def _has_fp8(index: int) -> bool:
    return cuda_capability(index) >= (8, 9)


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device has tensor cores for fp8 in the formats e4m3 and e5m2."""
    return device.type == "cuda" and _has_fp8(device.index or 0)
