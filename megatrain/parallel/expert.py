"""Expert parallelism: each rank of the ep axis holds an equal share of the experts, and tokens travel to them and back.

The all-to-all of GShard (arXiv 2006.16668, section 3.2) without capacity limits: ranks first exchange the numbers of
rows, then exactly those rows, so that nothing is dropped or padded (as in MegaBlocks, arXiv 2211.15841). A rank that
receives no rows still takes part in every collective.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import replace_seam
from megatrain.nn.moe import Experts
from megatrain.parallel.collectives import Group, exchange, exchange_rows
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.sharding import local_view, shard_parameter
from megatrain_kernels import permute, unpermute, unsort


def expert_parallel(model: Decoder, plan: Plan, mesh: Mesh, cfg: ParallelConfig) -> None:
    """Shard the experts of `model` (on the meta device) in place over the ep axis.

    Rank r holds experts r · n to (r + 1) · n - 1 of the model, n = n_experts / ep, and each rank routes its own tokens.
    Shared experts are unchanged. Call this before tensor parallelism, which skips these experts.
    """
    group = mesh.ep.get_group()
    for _, block in model.blocks():
        if block.moe is None:
            continue
        experts = block.moe.experts
        for name, _ in list(experts.named_parameters()):
            shard_parameter(experts, name, mesh.ep, Shard(0))
        replace_seam(experts, "parameter_view", local_view)
        n_here = block.moe.router.cfg.n_experts // cfg.ep
        replace_seam(block.moe, "dispatch", partial(_dispatch, group, n_here))


@torch.compiler.disable  # the numbers of rows are known on the host only
def _dispatch(
    group: Group, n_here: int, tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts
) -> Tensor:
    """Do as `nn.moe.dispatch`, for experts of which this rank holds `n_here`."""
    rows, permutation = permute(tokens, indices, n_here * group.size())
    sent = permutation.group_sizes.view(-1, n_here)  # (rank, expert there)
    received = exchange(sent, group)  # (rank, expert here)
    # The one transfer to the host in a layer: it must know how much memory the rows need before they can be sent.
    sent_rows, received_rows = torch.stack([sent.sum(1), received.sum(1)]).tolist()
    arrived = exchange_rows(rows, sent_rows, received_rows, group)  # rank by rank, inside by expert
    numbers = torch.arange(n_here, device=rows.device).expand_as(received).flatten()
    chosen = numbers.repeat_interleave(received.flatten(), output_size=len(arrived))
    arrived, local = permute(arrived, chosen.unsqueeze(1), n_here)
    answers = unsort(experts(arrived, local.group_sizes), local)
    return unpermute(exchange_rows(answers, received_rows, sent_rows, group), permutation, weights)
