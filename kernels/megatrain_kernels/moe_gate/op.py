"""The gate of a mixture of experts: from the router's logits to experts and weights, one kernel on a GPU."""

from torch import Tensor

from megatrain_kernels.backend import choose, preferred
from megatrain_kernels.moe_gate.reference import GateRule, gate_reference
from megatrain_kernels.moe_gate.registered import gate_op, takes_triton


def moe_gate(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    scores: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    n_groups: int = 1,
    top_groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of each token and the factors on what they return (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Args:
        logits: `(tokens, n_experts)`. bias: `(n_experts,)`, takes part in the choice only; no gradient.
        top_k: experts of each token.
        scores: of an expert: "softmax" over all of them, or its own "sigmoid".
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        n_groups: groups of neighbouring experts; it divides n_experts.
        top_groups: groups that a token may use: those with the largest sums of their two best scores.
        backend: "auto" takes the Triton kernel on a GPU (float32, groups of powers of two), and PyTorch elsewhere.

    Returns:
        Indices `(tokens, top_k)` int64, the best first (of equal ones any); weights `(tokens, top_k)`; scores of all
        experts `(tokens, n_experts)`. Both have gradients.

    Raises:
        ValueError: no backend of that name, other scores, or "triton" where it cannot run.
    """
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores={scores!r}: must be softmax or sigmoid")
    backend = preferred(backend)
    choose(backend, ("torch", "triton", "reference"))
    rule = GateRule(top_k, scores, normalize, scale, n_groups, top_groups)
    if backend == "triton" and not takes_triton(logits, n_groups):
        raise ValueError(
            "backend='triton' needs a CUDA device, float32, and groups of experts that are powers of two; "
            f"got {logits.device.type}, {logits.dtype}, {logits.shape[-1]} experts in {n_groups}"
        )
    if backend == "triton" or (backend == "auto" and takes_triton(logits, n_groups, compiled=True)):
        weights, found, indices = gate_op(logits, bias, *rule, backend)
        return indices, weights, found
    return gate_reference(logits, bias, rule)
