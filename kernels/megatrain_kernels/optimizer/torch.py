"""PyTorch's path of a group's update: its own fused and multi-tensor functions where states are in full.

States in 16 or 8 bits are updated by the definition, in tiles that stay in a CPU's cache.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatrain_kernels.blocks import BLOCK_ELEMENTS
from megatrain_kernels.dynamic_map import BLOCK
from megatrain_kernels.optimizer.reference import Place, Update, as_rows, update_tile


def update_group(
    group: Mapping[str, list[Tensor]], how: Update, places: Sequence[Place], clip: Tensor | None
) -> None:
    """Update all parameters in place; see `optimizer_step` for the arguments."""
    dtype = group["weight"][0].dtype
    is_wide = dtype in (torch.float32, torch.float64) and group["gradient"][0].dtype == dtype
    if how.states != "full" or how.stochastic or not is_wide:
        _update_in_tiles(group, how, places, clip)
        return
    if clip is not None:
        torch._foreach_mul_(group["gradient"], clip)
    FUSED[how.rule](group, how)
    if how.copies:
        torch._foreach_copy_(group["copy"], group["weight"])


def _update_in_tiles(
    group: Mapping[str, list[Tensor]], how: Update, places: Sequence[Place], clip: Tensor | None
) -> None:
    if how.is_counted:
        torch._foreach_add_(group["step"], 1)
    for n, place in enumerate(places):
        parameter = {name: group[name][n] for name in group}
        views = as_rows(parameter, place)
        rows = len(views["weight"])
        width = min(place.columns, BLOCK_ELEMENTS // BLOCK * BLOCK)
        height = max(1, BLOCK_ELEMENTS // max(1, width))
        for top in range(0, rows, height):
            for left in range(0, place.columns, width):
                tile = range(top, min(rows, top + height)), range(left, min(place.columns, left + width))
                update_tile(views, parameter.get("step"), how, place, *tile, clip)


def _adamw(group: Mapping[str, list[Tensor]], how: Update) -> None:
    torch._foreach_add_(group["step"], 1)
    torch._fused_adamw_(
        group["weight"],
        group["gradient"],
        group["exp_avg"],
        group["exp_avg_sq"],
        [],
        group["step"],
        lr=how.lr,
        beta1=how.beta1,
        beta2=how.beta2,
        weight_decay=how.weight_decay,
        eps=how.eps,
        amsgrad=False,
        maximize=False,
    )


def _lion(group: Mapping[str, list[Tensor]], how: Update) -> None:
    weights, gradients, averages = group["weight"], group["gradient"], group["exp_avg"]
    updates = torch._foreach_lerp(averages, gradients, 1 - how.beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(weights, 1 - how.lr * how.weight_decay)
    torch._foreach_add_(weights, updates, alpha=-how.lr)
    torch._foreach_lerp_(averages, gradients, 1 - how.beta2)


def _sgd(group: Mapping[str, list[Tensor]], how: Update) -> None:
    torch._fused_sgd_(
        group["weight"],
        group["gradient"],
        group.get("momentum_buffer", []),
        weight_decay=how.weight_decay,
        momentum=how.beta1,
        lr=how.lr,
        dampening=0.0,
        nesterov=how.nesterov,
        maximize=False,
        is_first_step=False,
    )


FUSED = {"adamw": _adamw, "lion": _lion, "sgd": _sgd}
