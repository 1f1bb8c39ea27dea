"""The gate as PyTorch operators, forward and backward: Triton, or PyTorch where that fails.

The operators are opaque to torch.compile and know their shapes without data.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.backend import interpreting, triton_runs_on, try_triton
from megatrain_kernels.moe_gate.reference import GateRule, gate_backward_reference, gate_reference

LARGEST = 4096  # experts: a program holds all scores of a token


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def takes_triton(logits: Tensor, n_groups: int, *, compiled: bool = False) -> bool:
    """Can the kernels take these? `compiled`: the interpreter does not count."""
    here = triton_runs_on(logits) or (not compiled and logits.device.type == "cpu" and interpreting())
    grouped = n_groups == 1 or (_power_of_two(n_groups) and _power_of_two(logits.shape[-1] // n_groups))
    return here and grouped and logits.dtype == torch.float32 and logits.shape[-1] <= LARGEST


def _run(name: str, backend: str, *args: Any) -> Any:
    """`name` of the Triton module, or None: it failed."""
    # By name: the module needs triton, which a CPU machine may lack.
    launch = getattr(import_module("megatrain_kernels.moe_gate.triton"), name)
    rule: GateRule = args[-1]
    return try_triton(("moe_gate", name, *rule), partial(launch, *args), backend=backend)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scores and indices of `moe_gate`."""
    rule = GateRule(top_k, scores, normalize, scale, n_groups, top_groups)
    made: tuple[Tensor, Tensor, Tensor] | None = _run("gate", backend, logits, bias, rule)
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
    backend: str,
) -> Tensor:
    """The gradient of the logits."""
    rule = GateRule(
        indices.shape[1], activation, normalize, scale, 1, 1
    )  # the choice is made: groups are no matter
    tensors = (indices, scores, grad_weights, grad_scores)
    made: Tensor | None = _run("gate_backward", backend, *tensors, rule)
    return gate_backward_reference(*tensors, rule) if made is None else made


@gate_backward_op.register_fake
def _fake_backward(indices: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, _, *ctx.options, _, _, ctx.backend = inputs
    _, scores, indices = output
    ctx.save_for_backward(indices, scores)
    ctx.mark_non_differentiable(indices)


def _differentiate(ctx: Any, grad_weights: Tensor, grad_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grad = gate_backward_op(*ctx.saved_tensors, grad_weights, grad_scores, *ctx.options, ctx.backend)
    return grad, *(None for _ in range(8))


gate_op.register_autograd(_differentiate, setup_context=_setup_context)
