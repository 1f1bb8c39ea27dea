"""Expert parallelism: each rank of the ep axis has an equal share of whole experts, and tokens travel to them and back.

The all-to-all of GShard (arXiv 2006.16668, section 3.2) without capacities: ranks first tell one another how many rows
come, then exchange exactly those, so that nothing is dropped and nothing padded (as MegaBlocks, arXiv 2211.15841). A
rank to which nobody sends a row takes part in every exchange all the same, with no rows.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatrain.nn.moe import Experts
from megatrain.parallel.collectives import Group, exchange, exchange_rows
from megatrain.parallel.sharding import Role
from megatrain.parallel.tensor import cut_parameters, use_local
from megatrain_kernels import permute, unpermute, unsort


def expert_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Cut the experts of the decoder `model` (on the meta device) in place over the one-dimensional `mesh`.

    Rank r has experts r · n to (r + 1) · n - 1 of the whole, n = n_experts / ranks, and each rank routes other tokens.
    Shared experts stay as they are. Comes before tensor parallelism, which leaves these experts alone.
    """
    group = mesh.get_group()
    for block in model.layers.values():
        if block.moe is not None:
            roles: dict[str, Role] = {name: "experts" for name, _ in block.moe.experts.named_parameters()}
            cut_parameters(block.moe.experts, mesh, roles)
            use_local(block.moe.experts, roles, group)
            block.moe.dispatch = partial(_dispatch, group, block.moe.router.cfg.n_experts // group.size())


@torch.compiler.disable  # how many rows go where is known on the host only
def _dispatch(
    group: Group, n_here: int, tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts
) -> Tensor:
    """As `nn.moe.dispatch`, for experts of which this rank has `n_here`."""
    rows, permutation = permute(tokens, indices, n_here * group.size())
    sent = permutation.group_sizes.view(-1, n_here)  # (rank, expert there)
    received = exchange(sent, group)  # (rank, expert here)
    sent_rows, received_rows = torch.stack([sent.sum(1), received.sum(1)]).tolist()
    arrived = exchange_rows(rows, sent_rows, received_rows, group)  # rank by rank, inside by expert
    numbers = torch.arange(n_here, device=rows.device).expand_as(received).flatten()
    chosen = numbers.repeat_interleave(received.flatten(), output_size=len(arrived))
    arrived, local = permute(arrived, chosen.unsqueeze(1), n_here)
    answers = unsort(experts(arrived, local.group_sizes), local)
    return unpermute(exchange_rows(answers, received_rows, sent_rows, group), permutation, weights)
