"""Tensor and sequence parallelism: weight matrices, and the sequence between them, are sharded over the tp axis.

Every parameter becomes a DTensor over that axis, placed by its role, and layers compute with the local shards. A block
gathers its tokens, computes with its columns, then with its rows, and the sum of all ranks' results is scattered over
tokens again (arXiv 2205.05198, section 4.2). The vocabulary is sharded in the embedding and in the loss.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatrain.nn.block import Block
from megatrain.nn.contract import Plan, Role, Weight
from megatrain.nn.decoder import Decoder
from megatrain.nn.embed import lookup
from megatrain.nn.image import ImageClassifier
from megatrain.nn.layer import Layer, ParameterView, replace_seam
from megatrain.parallel.collectives import Group, gather_from, own_part, scatter_sum
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.context import sum_sequences_over
from megatrain.parallel.layout import needed_heads, shards_heads, share_of
from megatrain.parallel.lora import Adapter, shard_inputs
from megatrain.parallel.loss_heads import ClassParallelHead, VocabularyParallelLossHead
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.sharding import (
    local_view,
    local_view_without_bias,
    shard_parameter,
    tensor_placement,
    view_of_heads,
)

SEQ = 1  # dimension of activations `(batch, seq, hidden)`


def tensor_parallel(model: Decoder, plan: Plan, mesh: Mesh, cfg: ParallelConfig) -> None:
    """Shard `model` (on the meta device) in place over the tp axis.

    Parameters that are DTensors already (experts sharded by expert parallelism) are unchanged.
    """
    group = mesh.tp.get_group()
    for name, parameter in list(model.named_parameters()):
        if not isinstance(parameter, DTensor):
            weight = plan.weight_of[name]
            placement = tensor_placement(weight, parameter.ndim, group.size())
            shard_parameter(model, name, mesh.tp, placement, unit=weight.unit)
    for name, layer in model.named_modules():
        if isinstance(layer, Layer):
            replace_seam(layer, "parameter_view", _view(plan.weights.get(name), group))
        elif isinstance(layer, Adapter):
            shard_inputs(layer, plan.weights[f"{name}.down"], group.size(), group.rank())
    for _, block in model.blocks():
        for part in _parts_on_full_sequence(block, cfg, group):
            part.register_forward_pre_hook(partial(_gather_sequence, group))
            part.register_forward_hook(partial(_scatter_sequence, group))
    if isinstance(model, ImageClassifier):
        replace_seam(model, "own_positions", partial(own_part, dim=SEQ, group=group))
    tokens = plan.ends["embed"].shape[0] if "embed" in plan.ends else 0
    if model.embed is not None:
        replace_seam(model.embed, "lookup", partial(_vocabulary_parallel_lookup, group, tokens))
    if model.pos_embed is not None:
        replace_seam(model.pos_embed, "lookup", partial(_sequence_parallel_lookup, group))
    head: nn.Module
    if model.cfg.classifier is not None:
        head = ClassParallelHead(model.cfg.classifier, group)
    else:
        head = VocabularyParallelLossHead(model.cfg.logit_softcap, group, tokens)
    replace_seam(model, "loss_head", head)


def _view(weight: Weight | None, group: Group) -> ParameterView:
    """Return what a layer with `weight` computes with on this rank; None: several weights, or the experts' stacks."""
    if weight is None:
        return local_view
    if weight.role & Role.ROW and group.rank() > 0:
        return local_view_without_bias
    if weight.role & Role.COLUMN and not shards_heads(weight, group.size()):
        return partial(view_of_heads, needed_heads(weight, group.size(), group.rank()), weight.unit)
    return local_view


def _parts_on_full_sequence(block: Block, cfg: ParallelConfig, group: Group) -> Iterator[nn.Module]:
    """Yield the parts of a block whose products are sharded, so that every rank must see all tokens."""
    yield block.attn
    if block.mlp is not None:
        yield block.mlp
    elif block.moe is not None and cfg.ep == 1:
        yield block.moe
    elif block.moe is not None:  # each rank sends its own tokens to the experts
        sum_sequences_over(block.moe, group)
        if block.moe.shared is not None:
            yield block.moe.shared


def _gather_sequence(group: Group, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather the tokens of all ranks before a module's forward."""
    return gather_from(args[0], SEQ, group), *args[1:]


def _scatter_sequence(group: Group, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Sum the ranks' partial outputs of a module, and keep this rank's tokens."""
    return scatter_sum(output, SEQ, group)


def _vocabulary_parallel_lookup(group: Group, tokens: int, index: Tensor, weight: Tensor) -> Tensor:
    """Look up the tokens in this rank's rows of the embedding; rows of other ranks contribute zero to its partial sum.

    index `(batch, seq)`, weight `(this rank's share of all tokens, hidden)`; returns `(batch, seq / tp, hidden)`.
    """
    rows = share_of(tokens, group.size(), group.rank())
    local = index - rows.start
    is_here = (local >= 0) & (local < len(rows))
    found = lookup(local.where(is_here, 0), weight) * is_here.unsqueeze(-1)
    return scatter_sum(found, SEQ, group)


def _sequence_parallel_lookup(group: Group, index: Tensor, weight: Tensor) -> Tensor:
    """Look up this rank's shard of the positions `(..., seq)` in the full embedding."""
    return lookup(own_part(index, index.ndim - 1, group), weight)
