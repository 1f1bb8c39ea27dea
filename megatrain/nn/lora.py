"""Low-rank adapters beside frozen linear layers (LoRA, Hu et al., arXiv 2106.09685)."""

from dataclasses import replace

from torch import Tensor, nn

from megatrain.nn.contract import Plan, Role, Weight
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.nn.lora_config import LoRAConfig, adapted_names

DOWN, UP = "adapter.down", "adapter.up"
"""Names of an adapter's two products within its layer: LoRA's A and B."""


class Adapter(nn.Module):
    """scale · up(down(x)), `(..., in)` to `(..., out)`, which a linear layer adds to its own product."""

    def __init__(self, down: Weight, up: Weight, scale: float) -> None:
        super().__init__()
        self.down, self.up = Linear(down), Linear(up)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x)) * self.scale
        return out


def adapter_weights(weight: Weight, rank: int) -> dict[str, Weight]:
    """Return the two weights of an adapter of `weight`, by their names within its layer.

    They are sharded as it is: of a column-parallel product the outputs, of a row-parallel one the inputs. The other
    weight is replicated, with a partial gradient on each rank.
    """
    out_size, in_size = weight.shape
    shared = {"unit": weight.unit, "size_key": weight.size_key, "serves": weight.serves}
    inside, outside = ({}, shared) if weight.role & Role.COLUMN else (shared, {})
    if not weight.role & (Role.COLUMN | Role.ROW):
        inside = outside = {}
    down = Weight((rank, in_size), Role.ADAPTER_DOWN | (weight.role & Role.ROW), **inside)  # type: ignore[arg-type]
    up = Weight((out_size, rank), Role.ADAPTER_UP | (weight.role & Role.COLUMN), **outside)  # type: ignore[arg-type]
    return {DOWN: down, UP: up}


def with_adapters(plan: Plan, cfg: LoRAConfig) -> Plan:
    """Return the plan of the model with its adapters; `plan` itself if there are none."""
    if not cfg.rank:
        return plan
    blocks = [
        {
            f"{name}.{part}": each
            for name in adapted_names(block, cfg.targets)
            for part, each in adapter_weights(block[name], cfg.rank).items()
        }
        for block in plan.blocks
    ]
    added = (dict(block) | more for block, more in zip(plan.blocks, blocks, strict=True))
    return replace(plan, blocks=tuple(added))


def add_adapters(model: Decoder, plan: Plan, cfg: LoRAConfig) -> None:
    """Give the linear layers of `model` their adapters, and freeze all other parameters.

    Args:
        plan: what `with_adapters` returned. The adapters' parameters are not initialized.
    """
    if not cfg.rank:
        return
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear) and f"{name}.{DOWN}" in plan.weights:
            down, up = (plan.weights[f"{name}.{part}"] for part in (DOWN, UP))
            replace_seam(layer, "adapter", Adapter(down, up, cfg.alpha / cfg.rank))
