"""The router's gate of a mixture of experts: the public function and its PyTorch operators."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import (
    Kernel,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.router.cases import SUITE
from megatrain_kernels.router.reference import GateRule, gate_backward_reference, gate_reference

LARGEST = 4096  # experts: a program holds all scores of a token


@torch.library.custom_op("megatrain::moe_gate", mutates_args=())
def gate_op(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scores: str,
    normalize: bool,
    scale: float,
    n_groups: int,
    top_groups: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, scores and indices of `moe_gate`."""
    rule = GateRule(top_k, scores, normalize, scale, n_groups, top_groups)
    made: tuple[Tensor, Tensor, Tensor] | None = run_triton(
        MOE_GATE, path, "gate", logits, bias, rule, kind=rule
    )
    indices, weights, found = gate_reference(logits, bias, rule) if made is None else made
    return weights, found, indices


@gate_op.register_fake
def _fake(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    chosen = (logits.shape[0], top_k)
    weights, scores = logits.new_empty(chosen), logits.new_empty(logits.shape)
    return weights, scores, logits.new_empty(chosen, dtype=torch.int64)


@torch.library.custom_op("megatrain::moe_gate_backward", mutates_args=())
def gate_backward_op(
    indices: Tensor,
    scores: Tensor,
    grad_weights: Tensor,
    grad_scores: Tensor,
    activation: str,
    normalize: bool,
    scale: float,
    path: str,
) -> Tensor:
    """Return the gradient of the logits."""
    # The choice is made, so groups no longer matter.
    rule = GateRule(indices.shape[1], activation, normalize, scale, n_groups=1, top_groups=1)
    tensors = (indices, scores, grad_weights, grad_scores)
    made: Tensor | None = run_triton(MOE_GATE, path, "gate_backward", *tensors, rule, kind=rule)
    return gate_backward_reference(*tensors, rule) if made is None else made


@gate_backward_op.register_fake
def _fake_backward(indices: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, _, *ctx.options, _, _, ctx.path = inputs
    _, scores, indices = output
    ctx.save_for_backward(indices, scores)
    ctx.mark_non_differentiable(indices)


def _differentiate(ctx: Any, grad_weights: Tensor, grad_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grad = gate_backward_op(*ctx.saved_tensors, grad_weights, grad_scores, *ctx.options, ctx.path)
    return grad, *(None for _ in range(8))


gate_op.register_autograd(_differentiate, setup_context=_setup_context)


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
    """Choose each token's experts, and the weights of what they return (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

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
        ValueError: shapes, types, devices or options that do not fit, or no backend of that name.
    """
    rule = GateRule(top_k, scores, normalize, scale, n_groups, top_groups)
    _check(logits, bias, rule)
    path = select(MOE_GATE, backend, logits, n_groups)
    if path in ("reference", "torch"):  # PyTorch has no faster way than the definition
        return gate_reference(logits, bias, rule)
    weights, found, indices = gate_op(logits, bias, *rule, path)
    return indices, weights, found


def _check(logits: Tensor, bias: Tensor | None, rule: GateRule) -> None:
    if rule.scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores={rule.scores!r}: must be softmax or sigmoid")
    sizes = logits.ndim == 2 and (bias is None or bias.shape == logits.shape[1:])
    require(sizes, "logits must be (tokens, n_experts) and bias (n_experts,)", logits=logits, bias=bias)
    require_floating(logits=logits, bias=bias)
    require_one_device(logits=logits, bias=bias)
    experts = logits.shape[1]
    if rule.n_groups < 1 or experts % rule.n_groups or (rule.n_groups > 1 and experts < 2 * rule.n_groups):
        raise ValueError(
            f"n_groups={rule.n_groups}: must divide the {experts} experts into groups of 2 or more"
        )
    if not 1 <= rule.top_groups <= rule.n_groups:
        raise ValueError(f"top_groups={rule.top_groups}: must be 1 to n_groups={rule.n_groups}")
    usable = experts // rule.n_groups * rule.top_groups
    if not 1 <= rule.top_k <= usable:
        raise ValueError(f"top_k={rule.top_k}: must be 1 to {usable}, the experts that a token may use")


def _unsupported(logits: Tensor, n_groups: int) -> str | None:
    experts = logits.shape[-1]
    if n_groups > 1 and not (_power_of_two(n_groups) and _power_of_two(experts // n_groups)):
        return f"groups of experts that are powers of two; got {experts} experts in {n_groups}"
    if experts > LARGEST:
        return f"at most {LARGEST} experts; got {experts}"
    return wrong_dtype(logits, torch.float32)


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


MOE_GATE = register(
    Kernel(function=moe_gate, reference=gate_reference, suite=SUITE, unsupported=_unsupported)
)
