"""Muon on matrices and AdamW on the other parameters, as one optimizer.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon);
sizes of updates and weight decay after Moonlight (arXiv 2502.16982, section 2.2).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megatrain.optim.config import MuonConfig
from megatrain.parallel.shards import local_part, part_like, whole_tensor
from megatrain_kernels import orthogonalize


def update_scale(shape: torch.Size, scaling: str) -> float:
    """Factor on the orthogonal update of a matrix `(..., out, in)`: see `MuonConfig.scaling`."""
    out_size, in_size = shape[-2:]
    if scaling == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_size, in_size))
    return math.sqrt(max(1.0, out_size / in_size))


class Muon(Optimizer):
    """Groups with `orthogonal` go by Muon (state: `momentum_buffer`), the others by AdamW.

    m = momentum · m + (1 - momentum) · gradient; the update is made orthogonal from m, or with Nesterov's step from
    momentum · m + (1 - momentum) · gradient. Stacked matrices `(experts, out, in)` are taken one by one.
    """

    def __init__(self, groups: list[dict[str, Any]], cfg: MuonConfig) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        self.cfg = cfg

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. Ranks that share a matrix must call this together."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not group["orthogonal"]:
                self._adamw(held, group)
                continue
            for parameter in held:
                self._muon(parameter, lr=group["lr"], decay=group["weight_decay"])

    def _muon(self, parameter: nn.Parameter, *, lr: float, decay: float) -> None:
        buffer, gradient = self.state[parameter]["momentum_buffer"], parameter.grad
        assert gradient is not None
        buffer.lerp_(gradient, 1 - self.cfg.momentum)
        wanted = gradient.lerp(buffer, self.cfg.momentum) if self.cfg.nesterov else buffer
        stacked = wanted.ndim - 2  # a matrix must be whole, a stack of them need not be
        made = orthogonalize(whole_tensor(wanted, first=stacked), steps=self.cfg.ns_steps)
        direction = part_like(made, wanted, first=stacked)
        weight = local_part(parameter)
        weight.mul_(1 - lr * decay)
        weight.add_(direction, alpha=-lr * update_scale(parameter.shape, self.cfg.scaling))

    def _adamw(self, held: list[nn.Parameter], group: dict[str, Any]) -> None:
        def states(key: str) -> list[Tensor]:
            return [local_part(self.state[p][key]) for p in held]

        adamw(
            [local_part(p) for p in held],
            [local_part(p.grad) for p in held if p.grad is not None],
            states("exp_avg"),
            states("exp_avg_sq"),
            [],
            states("step"),
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            eps=self.cfg.eps,
        )
