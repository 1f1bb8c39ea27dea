"""Activation checkpointing: activations are recomputed in the backward pass instead of kept (arXiv 1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import replace_seam
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh

SAVED = frozenset(
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
"""Operators that are expensive to recompute: selective activation checkpointing saves their outputs."""


def checkpoint_activations(model: Decoder, plan: Plan, mesh: Mesh | None, cfg: ParallelConfig) -> None:
    """Apply `cfg.activation_checkpointing` to each block; gradients are unchanged."""
    if cfg.activation_checkpointing == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if cfg.activation_checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    run = _run_checkpointed(options)
    for _, block in model.blocks():
        replace_seam(block, "run", run)


def _run_checkpointed(options: dict[str, Any]) -> Callable[..., Tensor]:
    # A function defined here, not a partial of `checkpoint`: torch.compile skips frames of torch itself, and
    # would silently compile nothing.
    def run(body: Callable[..., Tensor], *args: Any) -> Tensor:
        out: Tensor = checkpoint(body, *args, **options)
        return out

    return run


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
