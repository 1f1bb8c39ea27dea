"""Products of uneven groups of rows, each with its own matrix, written out."""

import torch
from torch import Tensor


def grouped_gemm_reference(x: Tensor, weights: Tensor, group_sizes: Tensor) -> Tensor:
    """Return x_g weights_gᵀ for each group g of consecutive rows, computed in float32 at least, in x's type.

    x `(tokens, in)`, weights `(groups, out, in)`, group_sizes `(groups,)` summing to tokens; `(tokens, out)`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(compute).split(group_sizes.tolist())
    # Empty groups stay in, so that their weights get gradients, of zero.
    parts = [rows @ weight.T for rows, weight in zip(groups, weights.to(compute), strict=True)]
    return torch.cat(parts).to(x.dtype)


def permute_reference(tokens: Tensor, indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Repeat each row of `tokens` `(tokens, size)` for each of its experts (`indices` `(tokens, k)`), expert by expert.

    Returns:
        Rows `(tokens · k, size)`, in the order of tokens inside an expert, and each expert's number of rows.
    """
    rows, sizes = [], []
    for expert in range(n_experts):
        chosen, _ = (indices == expert).nonzero(as_tuple=True)
        rows.append(tokens[chosen])
        sizes.append(len(chosen))
    return torch.cat(rows), torch.tensor(sizes, device=indices.device)
