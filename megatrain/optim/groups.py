"""Which parameters are decayed, and which are Muon's: rules on names and shapes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatrain.optim.config import MuonConfig, OptimConfig

EMBEDDINGS = ("embed.weight", "pos_embed.weight")
HEAD = "head.weight"


def is_decayed(name: str, parameter: nn.Parameter, cfg: OptimConfig) -> bool:
    """Matrices are decayed; vectors (norms, biases) never; embeddings if the config says so."""
    if name in EMBEDDINGS and not cfg.decay_embeddings:
        return False
    return parameter.ndim >= 2


def is_orthogonalized(name: str, parameter: nn.Parameter, cfg: OptimConfig) -> bool:
    """Muon takes the matrices between embedding and head, stacked ones `(experts, out, in)` too."""
    return isinstance(cfg, MuonConfig) and parameter.ndim >= 2 and name not in (*EMBEDDINGS, HEAD)


def parameter_groups(parameters: Mapping[str, nn.Parameter], cfg: OptimConfig) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each in the order given.

    A group's keys: `params`; `weight_decay`; `lr_ratio`, its learning rate as a share of the config's; and
    `orthogonal`, whether Muon's rule is its rule.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        orthogonal, decayed = is_orthogonalized(name, parameter, cfg), is_decayed(name, parameter, cfg)
        ratio = cfg.adamw_lr_ratio if isinstance(cfg, MuonConfig) and not orthogonal else 1.0
        decay = cfg.weight_decay if decayed else 0.0
        empty = {"params": [], "weight_decay": decay, "lr_ratio": ratio, "orthogonal": orthogonal}
        groups.setdefault((orthogonal, decayed), empty)["params"].append(parameter)
    return list(groups.values())
