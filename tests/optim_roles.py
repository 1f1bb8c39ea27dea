"""Roles of the parameters that the optimizers' tests make up."""

from collections import defaultdict

from megatrain.nn.contract import Role

ROLES = defaultdict(
    lambda: Role.REPLICATED,
    {
        "embed.weight": Role.VOCABULARY | Role.EMBEDDING,
        "pos_embed.weight": Role.EMBEDDING,
        "head.weight": Role.VOCABULARY | Role.HEAD,
    },
)
