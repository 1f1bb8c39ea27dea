"""Activations that are made again in the backward pass instead of being kept (Chen et al., arXiv 1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "megatrain::attention",
        "megatrain::grouped_gemm",
        "megatrain::scaled_matmul",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)
"""Linear layers and fused attention are dear to repeat: selective recomputation keeps what they return."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(model: nn.Module, kind: Literal["none", "full", "selective"]) -> None:
    """Make each block of `model.layers` recompute; gradients stay the same."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    for block in layers.values():
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    # A function of ours, not a partial of `checkpoint`: torch.compile passes over frames of torch's own, and
    # would silently compile nothing.
    def run(*args: Any) -> Tensor:
        out: Tensor = checkpoint(forward, *args, **options)
        return out

    return run
