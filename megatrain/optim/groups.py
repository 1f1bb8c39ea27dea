"""Which parameters are decayed: a rule on names and shapes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatrain.optim.config import OptimConfig

EMBEDDINGS = ("embed.weight", "pos_embed.weight")


def is_decayed(name: str, parameter: nn.Parameter, cfg: OptimConfig) -> bool:
    """Matrices are decayed; vectors (norms, biases) never; embeddings if the config says so."""
    if name in EMBEDDINGS and not cfg.decay_embeddings:
        return False
    return parameter.ndim >= 2


def parameter_groups(parameters: Mapping[str, nn.Parameter], cfg: OptimConfig) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer: with `cfg.weight_decay` and without, each in the order given."""
    decayed = [p for name, p in parameters.items() if is_decayed(name, p, cfg)]
    rest = [p for name, p in parameters.items() if not is_decayed(name, p, cfg)]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
