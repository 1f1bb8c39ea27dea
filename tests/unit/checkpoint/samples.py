"""Small checkpoints of every kind of tensor."""

from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer


def make_tensors(seed: int) -> dict[str, Tensor]:
    """Each dtype and shape that a training state has, and those that are easily lost: no dimension, no element."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0.w": torch.randn(64, 96, generator=draw),
        "model.layers.0.bf16": torch.randn(33, 7, generator=draw).bfloat16(),
        "model.transposed": torch.randn(12, 20, generator=draw).T,
        "model.slice": torch.randn(10, 10, generator=draw)[2:5, 1:9],
        "model.nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "model.double": torch.randn(5, generator=draw, dtype=torch.float64),
        "model.empty": torch.empty(0, 3),
        "optim.step": torch.tensor(float(seed)),
        "optim.count": torch.randint(-(2**62), 2**62, (17,), generator=draw),
        "optim.mask": torch.randint(0, 2, (9,), generator=draw).bool(),
        "optim.scalar": torch.tensor(seed, dtype=torch.int64),
    }


def bits(tensor: Tensor) -> bytes:
    """Dtype, shape and every bit, so that NaN equals NaN and -0 is not 0."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw


def all_bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def targets_for(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same kind, filled with something else."""
    return {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}


def two_checkpoints(directory: Path, *, verify: bool = True) -> Checkpointer:
    """Steps 100 and 200 of a run, of different values."""
    checkpointer = Checkpointer(directory, CheckpointConfig(keep=0, verify=verify))
    for step in (100, 200):
        checkpointer.save(step, make_tensors(step), {"step": step, "tokens": 7 * step}, {"seed": 1})
    return checkpointer
