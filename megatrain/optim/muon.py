"""Muon on matrices and AdamW on the other parameters, as one optimizer.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon);
sizes of updates and weight decay after Moonlight (arXiv 2502.16982, section 2.2).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.optim import adamw
from megatrain.optim.config import MuonConfig, StateFormat
from megatrain.optim.rule import OptimizerRule, Updater
from megatrain.optim.step import update
from megatrain.parallel.sharding import Split
from megatrain.parallel.shards import full_tensor, local_tensor, shard_like, sharding_of
from megatrain_kernels import orthogonalize

# Matrices of one shape are orthogonalized together, up to this many elements: small ones alone do not fill a device;
# large ones are gathered in full, so only so many at a time.
TOGETHER = 2**24


def update_scale(shape: torch.Size, scaling: str) -> float:
    """Return the factor on the orthogonal update of a matrix `(..., out, in)`: see `MuonConfig.scaling`."""
    out_size, in_size = shape[-2:]
    if scaling == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_size, in_size))
    return math.sqrt(max(1.0, out_size / in_size))


class Muon(Updater):
    """Muon for groups with `use_muon` (state: `momentum_buffer`), AdamW for the others.

    m = momentum · m + (1 - momentum) · gradient; the update is made orthogonal from m, or with Nesterov's step from
    momentum · m + (1 - momentum) · gradient. Stacked matrices `(experts, out, in)` are orthogonalized separately.
    """

    def update_group(self, group: dict[str, Any], clip: Tensor | None) -> None:
        """Update the parameters of one group. Ranks that share a matrix must call this together."""
        if not group["use_muon"]:
            update(self, group, adamw.how(group, self.cfg), clip)
            return
        held = [
            (p, split)
            for p, split in zip(group["params"], group["splits"], strict=True)
            if p.grad is not None
        ]
        if clip is not None:
            torch._foreach_mul_([local_tensor(p.grad) for p, _ in held], clip)
        for split, alike in _of_one_shape(held):
            self._muon(alike, split, lr=group["lr"], decay=group["weight_decay"])

    def _muon(self, alike: list[nn.Parameter], split: Split | None, *, lr: float, decay: float) -> None:
        wanted = [self._momentum(parameter) for parameter in alike]
        stacked = alike[0].ndim - 2  # a matrix must be full, a stack may stay sharded
        full = torch.stack([full_tensor(update, split, first=stacked) for update in wanted])
        made = orthogonalize(full, steps=self.cfg.ns_steps)
        weights = [local_tensor(parameter) for parameter in alike]
        directions = [
            shard_like(full, update, split, first=stacked) for full, update in zip(made, wanted, strict=True)
        ]
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, directions, alpha=-lr * update_scale(alike[0].shape, self.cfg.scaling))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Return the update before it is orthogonalized, sharded as the parameter is."""
        buffer, gradient = self.state[parameter]["momentum_buffer"], parameter.grad
        assert gradient is not None
        buffer.lerp_(gradient, 1 - self.cfg.momentum)
        return gradient.lerp(buffer, self.cfg.momentum) if self.cfg.nesterov else buffer


def _of_one_shape(
    parameters: list[tuple[nn.Parameter, Split | None]],
) -> Iterator[tuple[Split | None, list[nn.Parameter]]]:
    """Group `parameters` by shape and sharding, in the same order on all ranks, up to `TOGETHER` elements a group."""
    alike: dict[tuple[torch.Size, Hashable, Hashable], list[tuple[nn.Parameter, Split | None]]] = defaultdict(
        list
    )
    for parameter, split in parameters:
        # Not `split` itself: two parameters may be split alike on one rank and not on another.
        uneven = None if split is None else (split.dim, split.unit)
        alike[parameter.shape, sharding_of(parameter), uneven].append((parameter, split))
    for (shape, _, _), found in alike.items():
        count = max(1, TOGETHER // max(1, shape.numel()))
        for start in range(0, len(found), count):
            yield found[start][1], [parameter for parameter, _ in found[start : start + count]]


def initial_state(
    parameter: nn.Parameter, group: dict[str, Any], states: StateFormat, cfg: MuonConfig
) -> dict[str, Tensor]:
    """Return a zero momentum buffer for Muon's matrices, AdamW's state for the rest."""
    if group["use_muon"]:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return adamw.initial_state(parameter, group, states, cfg)


RULE = OptimizerRule(Muon, initial_state)
