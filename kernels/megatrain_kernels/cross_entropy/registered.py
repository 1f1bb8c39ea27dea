"""Losses of rows of logits with their gradient: Triton or PyTorch, and as a PyTorch operator.

The operator is opaque to torch.compile and knows its shapes without data.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d

from megatrain_kernels.backend import interpreting, triton_runs_on, try_triton
from megatrain_kernels.cross_entropy import rows
from megatrain_kernels.cross_entropy.options import LossOptions

KNOWN = (torch.float16, torch.bfloat16, torch.float32)


def takes_triton(logits: Tensor, *, compiled: bool = False) -> bool:
    """Can the kernels take logits of this type and device? `compiled`: the interpreter does not count."""
    here = triton_runs_on(logits) or (not compiled and logits.device.type == "cpu" and interpreting())
    return here and logits.dtype in KNOWN


def check_triton(x: Tensor) -> None:
    """Raises ValueError where somebody asked for kernels that cannot run."""
    if not takes_triton(x):
        raise ValueError(
            "backend='triton' needs a CUDA device and float16, bfloat16 or float32; "
            f"got {x.device.type}, {x.dtype}"
        )


def _run(name: str, backend: str, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`name` of the Triton module, or of `rows`, which has the same functions."""
    made: Tensor | None = None
    if backend != "torch" and takes_triton(logits, compiled=backend != "triton"):
        # By name: the module needs triton, which a CPU machine may lack.
        launch = getattr(import_module("megatrain_kernels.cross_entropy.triton"), name)
        kind = ("cross_entropy", name, logits.dtype)
        made = try_triton(kind, partial(launch, logits, *args, **kwargs), backend=backend)
    return getattr(rows, name)(logits, *args, **kwargs) if made is None else made


def _over_group(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Log-sum-exp and target logit over all shards, `(2, rows)`: one maximum and one sum are exchanged."""
    own_top, own_sum, picked = parts
    top = own_top.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    both = torch.stack([own_sum * (own_top - top).exp(), picked])
    dist.all_reduce(both, group=group)
    both[0].log_().add_(top)
    return both


def row_losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, gradient: Tensor | None, backend: str
) -> Tensor:
    """`rows.losses`, on the device's fastest path, of a vocabulary that `options.group` may share."""
    whole = None
    if options.group is not None:
        whole = _over_group(_run("partials", backend, logits, targets, options), options.group)
    return _run("losses", backend, logits, targets, options, whole=whole, gradient=gradient)


def named_group(name: str | None) -> dist.ProcessGroup | None:
    """The group of that name: an operator takes no group as its argument."""
    resolve: Any = distributed_c10d._resolve_process_group
    return None if name is None else resolve(name)


@torch.library.custom_op("megatrain::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    wants_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses `(rows,)` of logits `(rows, columns)` and the gradient of their sum (no elements if it is not wanted)."""
    options = LossOptions(ignore_index, z_loss, softcap, named_group(group))
    gradient = logits.new_empty(logits.shape if wants_gradient else 0)
    losses = row_losses(
        logits, targets, options, gradient=gradient if wants_gradient else None, backend=backend
    )
    return losses, gradient


@cross_entropy_op.register_fake
def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    *_, wants_gradient, _ = args
    return logits.new_empty(logits.shape[0], dtype=wide), logits.new_empty(
        logits.shape if wants_gradient else 0
    )
