"""Activation checkpointing: activations are recomputed in the backward pass instead of kept (arXiv 1604.06174)."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
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
        # Torch's contexts count every operator, and find others in the second forward pass if weights are gathered
        # inside of a block (experts have an FSDP group of their own). Torch.compile understands no others.
        torchs = partial(create_selective_checkpoint_contexts, _policy)
        options["context_fn"] = torchs if cfg.ep == 1 else _keep_and_replay
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


class _Keep(TorchDispatchMode):
    """Keeps the outputs of the operators in `SAVED`, in order."""

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if operation.name() in SAVED:
            # Detached: the tensor itself would get a graph that holds on to this list.
            self.kept[operation].append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _Replay(TorchDispatchMode):
    """Returns the kept outputs in the same order, each once, and runs every other operator."""

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.name() in SAVED:
            return self.kept[operation].pop(0)
        return operation(*args, **(kwargs or {}))


def _keep_and_replay() -> tuple[_Keep, _Replay]:
    """Return the contexts of the first and of the second forward pass of one checkpointed region."""
    kept: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(kept), _Replay(kept)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
