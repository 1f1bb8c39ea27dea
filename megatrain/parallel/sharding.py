"""A model's sharding plan as data: which parameter plays which role when matrices are cut over the tp axis."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch.distributed.tensor import Placement, Replicate, Shard

Role = Literal[
    "columns", "rows", "row_bias", "expert_columns", "expert_rows", "experts", "vocabulary", "shared"
]
"""columns: a linear layer's outputs are cut (and its bias). rows: its inputs are cut, so ranks' results are summed.
row_bias: the bias of such a layer, added once. expert_*: the same of stacked experts. experts: the stack is cut
(expert parallelism). vocabulary: rows of a table of tokens are cut. shared: whole on every rank, each of which uses
it for its own part of the tokens, heads or sums."""

PLACEMENTS: Mapping[Role, Placement] = {
    "columns": Shard(0),
    "rows": Shard(1),
    "row_bias": Replicate(),
    "expert_columns": Shard(1),
    "expert_rows": Shard(2),
    "experts": Shard(0),
    "vocabulary": Shard(0),
    "shared": Replicate(),
}

DECODER_PLAN: Mapping[str, Role] = {
    r"embed\.weight|head\.weight": "vocabulary",
    r"pos_embed\.weight|(layers\.\d+\.(attn_|mlp_))?norm\.(weight|bias)": "shared",
    r"layers\.\d+\.attn\.(w[qkv]|wq_up|wkv_up)\.(weight|bias)": "columns",
    r"layers\.\d+\.attn\.(q|k|kv)_norm\.weight": "shared",
    r"layers\.\d+\.attn\.(wq_down|wkv_down|wk_rope)\.weight": "shared",
    r"layers\.\d+\.(attn\.wo|mlp\.down)\.weight": "rows",
    r"layers\.\d+\.(attn\.wo|mlp\.down)\.bias": "row_bias",
    r"layers\.\d+\.mlp\.(gate|up)\.(weight|bias)": "columns",
    r"layers\.\d+\.moe\.router\.weight": "shared",
    r"layers\.\d+\.moe\.experts\.(gate|up)": "expert_columns",
    r"layers\.\d+\.moe\.experts\.down": "expert_rows",
    r"layers\.\d+\.moe\.shared\.(gate|up)\.weight": "columns",
    r"layers\.\d+\.moe\.shared\.down\.weight": "rows",
}
"""Pattern of canonical names -> role, for every decoder of `megatrain.models`."""


def roles_of(names: Iterable[str], plan: Mapping[str, Role]) -> dict[str, Role]:
    """The role of each parameter.

    Raises:
        ValueError: a parameter has no role, or two.
    """
    found: dict[str, Role] = {}
    for name in names:
        fitting = [role for pattern, role in plan.items() if re.fullmatch(pattern, name)]
        if len(fitting) != 1:
            raise ValueError(f"{name}: {len(fitting)} rules of the sharding plan fit it; there must be one")
        found[name] = fitting[0]
    return found
