"""Parameter groups: which parameters are decayed, and which use Muon, by role and shape."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatrain.nn.contract import Role
from megatrain.optim.config import OptimizerConfig, is_hidden_matrix


def is_decayed(role: Role, parameter: nn.Parameter, cfg: OptimizerConfig) -> bool:
    """Tell whether weight decay applies: to matrices, never to vectors, to embeddings if the config says so."""
    if role & Role.EMBEDDING and not cfg.decay_embeddings:
        return False
    return parameter.ndim >= 2


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], roles: Mapping[str, Role], cfg: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer, each in the order given.

    A group's keys: `params`; `weight_decay`; `lr_ratio`, its learning rate as a share of the config's; and `use_muon`,
    true for the hidden matrices if the optimizer has a rule of its own for them.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        use_muon = cfg.splits_hidden_matrices and is_hidden_matrix(roles[name], parameter.ndim)
        decayed = is_decayed(roles[name], parameter, cfg)
        empty = {
            "params": [],
            "weight_decay": cfg.weight_decay if decayed else 0.0,
            "lr_ratio": cfg.lr_ratio(hidden_matrix=use_muon),
            "use_muon": use_muon,
        }
        groups.setdefault((use_muon, decayed), empty)["params"].append(parameter)
    return list(groups.values())
