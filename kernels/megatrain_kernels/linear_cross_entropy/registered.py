"""Linear layer and cross entropy as a PyTorch operator: the logits of a few tokens at a time, never all of them.

The gradients are made in the forward pass, while a chunk's logits are at hand, and overwrite them (the idea of
Liger-Kernel, arXiv 2410.10989, section 3.2). The operator is opaque to torch.compile, knows its shapes without
data, and states its FLOPs.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.cross_entropy.options import LossOptions
from megatrain_kernels.cross_entropy.registered import named_group, row_losses

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # logits held at once; on a CPU a chunk stays in its cache
MIN_CHUNK_ROWS = 512  # each chunk adds to the whole weight gradient, which fewer rows would not pay for


@torch.library.custom_op("megatrain::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    wants_x: bool,
    wants_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of losses over the valid tokens of x `(tokens, hidden)`, and its gradients (no elements: not wanted)."""
    options = LossOptions(ignore_index, z_loss, softcap, named_group(group))
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS.get(x.device.type, 1 << 28) // weight.shape[0])
    buffer = x.new_empty(min(rows, x.shape[0]), weight.shape[0])
    grad_x = x.new_empty(x.shape if wants_x else 0)
    # Chunks are added in float32: sums of many bf16 terms would lose the small ones.
    grad_weight = x.new_zeros(weight.shape if wants_weight else 0, dtype=compute)
    total = x.new_zeros((), dtype=compute)
    for start in range(0, x.shape[0], rows):
        part, wanted = x[start : start + rows], targets[start : start + rows]
        logits = torch.mm(part, weight.T, out=buffer[: part.shape[0]])
        gradient = logits if wants_x or wants_weight else None
        total += row_losses(logits, wanted, options, gradient=gradient, backend=backend).sum()
        if wants_x:
            torch.mm(logits, weight, out=grad_x[start : start + rows])
        if not wants_weight:
            continue
        if compute == x.dtype:
            grad_weight.addmm_(logits.T, part)
        else:
            grad_weight += logits.T @ part
    if wants_x and options.group is not None:  # each rank has the part of its own columns
        dist.all_reduce(grad_x, group=options.group)
    return total, grad_x, grad_weight.to(weight.dtype)


@linear_cross_entropy_op.register_fake
def _fake(x: Tensor, weight: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_x, wants_weight, _ = args
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return (
        total,
        x.new_empty(x.shape if wants_x else 0),
        weight.new_empty(weight.shape if wants_weight else 0),
    )


@register_flop_formula(torch.ops.megatrain.linear_cross_entropy)
def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **__: Any) -> int:
    *_, wants_x, wants_weight, _ = args
    return int(2 * x[0] * x[1] * weight[0] * (1 + wants_x + wants_weight))
