"""Low-rank adapters beside frozen linear layers (LoRA, Hu et al., arXiv 2106.09685)."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatrain.nn.attention import SequenceInfo
from megatrain.nn.contract import Plan, Role, Weight
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.layout import share_of
from megatrain.parallel.lora_config import LoRAConfig, adapted_names
from megatrain.runtime.rng import keeps, stream_key

DOWN, UP = "adapter.down", "adapter.up"
"""Names of an adapter's two products within its layer: LoRA's A and B."""


class Adapter(nn.Module):
    """scale · up(down(dropout(x))), `(..., in)` to `(..., out)`, which a linear layer adds to its own product."""

    SEAMS = ("first_input",)

    def __init__(self, down: Weight, up: Weight, cfg: LoRAConfig, key: int) -> None:
        super().__init__()
        self.down, self.up = Linear(down), Linear(up)
        self.scale = cfg.alpha / cfg.rank
        self.dropout, self.key, self.in_size = cfg.dropout, key, down.shape[1]
        self.first_input = 0
        """Number of the first of this rank's inputs in the full layer."""
        self.token_numbers: Tensor | None = None
        """`(batch, seq)`: the tokens of the present pass, where there is dropout."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(self._dropped(x))) * self.scale
        return out

    def _dropped(self, x: Tensor) -> Tensor:
        if self.token_numbers is None:
            return x
        inputs = torch.arange(self.first_input, self.first_input + x.shape[-1], device=x.device)
        counters = self.token_numbers.unsqueeze(-1) * self.in_size + inputs
        return x * keeps(counters, self.key, self.dropout) / (1 - self.dropout)


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


def add_adapters(model: Decoder, plan: Plan, cfg: LoRAConfig, *, seed: int = 0) -> None:
    """Give the linear layers of `model` their adapters, and freeze all other parameters.

    Args:
        plan: what `with_adapters` returned. The adapters' parameters are not initialized.
        seed: of the run, from which dropout is drawn.
    """
    if not cfg.rank:
        return
    model.requires_grad_(False)
    if model.classifier is not None:  # in full: the source may have none, or one for other labels
        model.classifier.requires_grad_(True)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear) and f"{name}.{DOWN}" in plan.weights:
            down, up = (plan.weights[f"{name}.{part}"] for part in (DOWN, UP))
            key = stream_key(seed, f"{name}.dropout")
            replace_seam(layer, "adapter", Adapter(down, up, cfg, key))
    if cfg.dropout:
        for _, block in model.blocks():
            replace_seam(
                block, "begin", partial(_tell, [m for m in block.modules() if isinstance(m, Adapter)])
            )


def _tell(adapters: list[Adapter], sequence: SequenceInfo) -> None:
    """Tell the adapters of a block which tokens come: in a pass that recomputes activations, the same ones again."""
    for adapter in adapters:
        adapter.token_numbers = sequence.token_numbers


def shard_inputs(adapter: Adapter, weight: Weight, ranks: int, rank: int) -> None:
    """Let `adapter`, whose first product has `weight`, draw for the inputs that tensor parallelism gives to `rank`."""
    if weight.role & Role.ROW:
        replace_seam(adapter, "first_input", share_of(weight.units, ranks, rank).start * weight.unit)
