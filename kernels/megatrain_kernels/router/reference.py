"""The router's gate of a mixture of experts, written out: which experts take a token, and with which weights."""

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 1e-20  # added to sums of scores: sigmoids may all be 0


class GateRule(NamedTuple):
    """The options of one call, as `moe_gate` documents them."""

    top_k: int
    scores: str
    normalize: bool
    scale: float
    n_groups: int
    top_groups: int


def choose_experts(scores: Tensor, rule: GateRule) -> Tensor:
    """Return the best experts `(tokens, top_k)` inside the best groups, which have the largest sums of two scores."""
    if rule.n_groups > 1:
        grouped = scores.unflatten(-1, (rule.n_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(rule.top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores.topk(rule.top_k, -1).indices


def gate_reference(logits: Tensor, bias: Tensor | None, rule: GateRule) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, weights and scores of `moe_gate`, differentiable by PyTorch."""
    scores = logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(-1)
    indices = choose_experts(scores.detach() if bias is None else scores.detach() + bias, rule)
    weights = scores.gather(1, indices)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALL)
    return indices, weights * rule.scale, scores


def gate_backward_reference(
    indices: Tensor, scores: Tensor, grad_weights: Tensor, grad_scores: Tensor, rule: GateRule
) -> Tensor:
    """Return the gradient of the logits `(tokens, n_experts)` in closed form, for where PyTorch records nothing."""
    grad_picked = rule.scale * grad_weights
    if rule.normalize:  # w_i = scale · s_i / S: dw_i/ds_j = scale · (δ_ij - s_i / S) / S
        picked = scores.gather(1, indices)
        total = picked.sum(-1, keepdim=True) + SMALL
        grad_picked = (grad_picked - (grad_picked * picked).sum(-1, keepdim=True) / total) / total
    grad = grad_scores.scatter_add(1, indices, grad_picked)
    if rule.scores == "sigmoid":
        return grad * scores * (1 - scores)
    return scores * (grad - (grad * scores).sum(-1, keepdim=True))
