"""Expert parallelism: each rank of the ep axis holds an equal share of the experts, and tokens travel to them and back.

The all-to-all of GShard (arXiv 2006.16668, section 3.2) without capacity limits: ranks first exchange the numbers of
rows, then exactly those rows, so that nothing is dropped or padded (as in MegaBlocks, arXiv 2211.15841). A rank that
receives no rows still takes part in every collective.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.nn.functional import pad

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import replace_seam
from megatrain.nn.moe import Experts
from megatrain.parallel.collectives import Group, exchange, exchange_rows
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import share_of
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.sharding import local_view, shard_parameter
from megatrain_kernels import permute, unpermute, unsort


def expert_parallel(model: Decoder, plan: Plan, mesh: Mesh, cfg: ParallelConfig) -> None:
    """Shard the experts of `model` (on the meta device) in place over the ep axis.

    Ranks hold experts in order, the first ones one more if ep does not divide their number, and each rank routes its
    own tokens. Shared experts are unchanged. Call this before tensor parallelism, which skips these experts.
    """
    group = mesh.ep.get_group()
    for _, block in model.blocks():
        if block.moe is None:
            continue
        experts = block.moe.experts
        for name, _ in list(experts.named_parameters()):
            shard_parameter(experts, name, mesh.ep, Shard(0))
        replace_seam(experts, "parameter_view", local_view)
        shares = [share_of(block.moe.router.cfg.n_experts, cfg.ep, rank) for rank in range(cfg.ep)]
        replace_seam(block.moe, "dispatch", partial(_dispatch, group, shares))


@torch.compiler.disable  # the numbers of rows are known on the host only
def _dispatch(
    group: Group, shares: list[range], tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts
) -> Tensor:
    """Do as `nn.moe.dispatch`, for experts of which each rank of the group holds its share."""
    rows, permutation = permute(tokens, indices, shares[-1].stop)
    n_here = len(shares[group.rank()])
    sent = _by_rank(permutation.group_sizes, shares)  # (rank, expert there)
    received = exchange(sent, group)[:, :n_here]  # (rank, expert here)
    # The one transfer to the host in a layer: it must know how much memory the rows need before they can be sent.
    sent_rows, received_rows = torch.stack([sent.sum(1), received.sum(1)]).tolist()
    arrived = exchange_rows(rows, sent_rows, received_rows, group)  # rank by rank, inside by expert
    numbers = torch.arange(n_here, device=rows.device).expand_as(received).flatten()
    chosen = numbers.repeat_interleave(received.flatten(), output_size=len(arrived))
    arrived, local = permute(arrived, chosen.unsqueeze(1), n_here)
    answers = unsort(experts(arrived, local.group_sizes), local)
    return unpermute(exchange_rows(answers, received_rows, sent_rows, group), permutation, weights)


def _by_rank(sizes: Tensor, shares: list[range]) -> Tensor:
    """Arrange the numbers of rows of all experts by the rank that holds them, `(ranks, most experts of a rank)`."""
    if len(shares[0]) == len(shares[-1]):
        return sizes.view(len(shares), -1)
    return torch.stack(
        [pad(sizes[share.start : share.stop], (0, len(shares[0]) - len(share))) for share in shares]
    )
