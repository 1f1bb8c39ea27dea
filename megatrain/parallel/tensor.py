"""Tensor and sequence parallelism: matrices and the sequence between them are cut over the tp axis.

Every parameter becomes a DTensor over that axis, as the sharding plan says. Modules compute on the local parts: a
layer gathers its tokens, computes with its columns, then with its rows, and the sum of all ranks' results is scattered
over tokens again (arXiv 2205.05198, section 4.2). The vocabulary is cut in the embedding and in the loss.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from megatrain.parallel.collectives import (
    Group,
    gather_from,
    gather_shared,
    own_part,
    scatter_sum,
    sum_gradients,
    sum_over,
)
from megatrain.parallel.sharding import PLACEMENTS, Role, roles_of
from megatrain_kernels import linear_cross_entropy

SEQ = 1  # dimension of activations `(batch, seq, hidden)`


def tensor_parallel(model: Any, mesh: DeviceMesh, plan: Mapping[str, Role]) -> None:
    """Cut the decoder `model` (on the meta device) in place over the one-dimensional `mesh`.

    Parameters that are DTensors, which are experts cut over another axis, stay as they are.
    """
    group = mesh.get_group()
    roles = roles_of((name for name, p in model.named_parameters() if not isinstance(p, DTensor)), plan)
    cut_parameters(model, mesh, roles)
    for index, block in model.layers.items():
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): role for name, role in roles.items() if name.startswith(prefix)}
        use_local(block, own, group)
        for part in _parts_on_whole_sequence(block, own, group):
            _on_whole_sequence(part, group)
    use_local(model, {name: role for name, role in roles.items() if not name.startswith("layers.")}, group)
    _cut_ends(model, group)


def _parts_on_whole_sequence(block: Any, roles: Mapping[str, Role], group: Group) -> Iterator[nn.Module]:
    """What of a block has matrices that are cut here, so that every rank must see all tokens."""
    yield block.attn
    if block.moe is None:
        yield block.mlp
    elif "moe.experts.gate" in roles:
        yield block.moe
    else:  # each rank sends its own tokens to the experts
        block.moe.balance.sum_further(partial(sum_over, group=group))
        if block.moe.shared is not None:
            yield block.moe.shared


def cut_parameters(model: nn.Module, mesh: DeviceMesh, roles: Mapping[str, Role]) -> None:
    """Replace the parameters that have a role by DTensors of their local parts, without values."""
    for name, role in roles.items():
        owner_name, _, leaf = name.rpartition(".")
        parameter, placement = model.get_parameter(name), PLACEMENTS[role]
        local = parameter.data
        if placement.is_shard():
            dim: int = placement.dim  # type: ignore[attr-defined]
            local = local.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
        shape, stride = parameter.shape, parameter.stride()
        cut = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
        setattr(model.get_submodule(owner_name), leaf, nn.Parameter(cut))


def use_local(module: nn.Module, roles: Mapping[str, Role], group: Group) -> None:
    """Let `module`'s forward see the local parts of those of its parameters that `roles` names."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module, roles, group):
            return inner(*args, **kwargs)

    module.forward = forward


@contextmanager
def _local_parameters(module: nn.Module, roles: Mapping[str, Role], group: Group) -> Iterator[None]:
    places = {name: _place(module, name) for name in roles}
    before: dict[str, Any] = {name: owner._parameters[leaf] for name, (owner, leaf) in places.items()}
    local: dict[str, Any] = {name: _to_local(parameter) for name, parameter in before.items()}
    shared = [name for name, role in roles.items() if role in ("shared", "row_bias")]
    if shared:
        local |= zip(shared, sum_gradients([local[name] for name in shared], group), strict=True)
    for name, role in roles.items():
        if role == "row_bias" and group.rank() > 0:
            local[name] = local[name] * 0  # it is added once, by the first rank
    for name, (owner, leaf) in places.items():
        owner._parameters[leaf] = local[name]
    try:
        yield
    finally:
        for name, (owner, leaf) in places.items():
            owner._parameters[leaf] = before[name]


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _to_local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local(grad_placements=parameter.placements)
    return local


def _on_whole_sequence(module: nn.Module, group: Group) -> None:
    """Gather the tokens before `module`'s forward, scatter the sum of the results after it."""
    inner = module.forward

    def forward(x: Tensor, *args: Any) -> Tensor:
        return scatter_sum(inner(gather_from(x, SEQ, group), *args), SEQ, group)

    module.forward = forward


def _cut_ends(model: Any, group: Group) -> None:
    """Embedding and loss over the cut vocabulary."""
    if model.embed is not None:
        model.embed.forward = partial(_embed, model.embed.forward, model.embed, group)
    if model.pos_embed is not None:
        model.pos_embed.forward = partial(_embed_positions, model.pos_embed.forward, group)
    model.loss_head.forward = partial(_loss, model.loss_head.softcap, group)


def _embed(lookup: Callable[[Tensor], Tensor], embed: Any, group: Group, index: Tensor) -> Tensor:
    """Each rank looks up the tokens of its rows; the others' are zero in its part of the sum."""
    rows = embed.weight.shape[0]
    local = index - group.rank() * rows
    here = (local >= 0) & (local < rows)
    found = lookup(local.where(here, 0)) * here.unsqueeze(-1)
    return scatter_sum(found, SEQ, group)


def _embed_positions(lookup: Callable[[Tensor], Tensor], group: Group, index: Tensor) -> Tensor:
    """Positions of this rank's part of the sequence."""
    return lookup(own_part(index, index.ndim - 1, group))


def _loss(
    softcap: float | None,
    group: Group,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """As `nn.loss.LossHead`; logits are gathered only where they are asked for."""
    hidden = gather_shared(hidden, SEQ, group)
    if targets is not None:
        return linear_cross_entropy(
            hidden, weight, targets, z_loss=z_loss, softcap=softcap, reduction="sum", tp_group=group
        )
    logits = gather_shared(linear(hidden, weight), hidden.ndim - 1, group)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
