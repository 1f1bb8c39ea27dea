"""Choice of the engine: its options, and the layouts and precisions that each one runs. Needs no torch."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, config
from megatrain.parallel.config import ParallelConfig
from megatrain.runtime.packages import require_package

EngineName = Literal["native", "deepspeed", "accelerate"]
UNSHARDED_AXES = ("pp", "cp", "tp", "ep")
"""Axes that only the native engine has."""


@config
class DeepSpeedConfig:
    """Options of `engine=deepspeed`."""

    offload_optimizer: bool = False
    """Keep optimizer state and master weights in main memory, and update them on the CPU (ZeRO-Offload, arXiv
    2101.06840). Requires zero_stage 1 to 3."""


def zero_stage(parallel: ParallelConfig, deepspeed: DeepSpeedConfig) -> int:
    """Return the ZeRO stage that DeepSpeed runs: 0 where there is nothing to shard and nothing to offload."""
    return parallel.zero_stage if parallel.dp_shard != 1 or deepspeed.offload_optimizer else 0


def is_fsdp(parallel: ParallelConfig) -> bool:
    """Tell whether `engine=accelerate` shards (FSDP2) or replicates (DDP)."""
    return parallel.dp_shard != 1 and parallel.zero_stage > 0


def legal_precisions(
    engine: EngineName, parallel: ParallelConfig, deepspeed: DeepSpeedConfig
) -> tuple[str, ...]:
    """Return the values of `train.precision` that the engine computes in, its default first; native has them all."""
    if engine == "deepspeed":
        return ("fp32", "bf16") if zero_stage(parallel, deepspeed) > 0 else ("fp32",)
    if engine == "accelerate":
        return ("fp32", "bf16", "fp64") if is_fsdp(parallel) else ("fp32", "fp64")
    return ("fp32", "bf16", "fp8", "fp64")


def engine_problems(
    engine: EngineName,
    parallel: ParallelConfig,
    deepspeed: DeepSpeedConfig,
    *,
    precision: str,
    optimizer: str,
    ema_decay: float | None,
) -> Iterator[Problem]:
    """Yield what the engine cannot run; all but the engine are other keys of the same config."""
    if deepspeed.offload_optimizer and engine != "deepspeed":
        yield Problem("deepspeed.offload_optimizer", True, "requires engine=deepspeed", (False,))
    if engine == "native":
        return
    yield from _layout_problems(engine, parallel)
    legal = legal_precisions(engine, parallel, deepspeed)
    if precision not in ("auto", *legal):
        yield Problem("train.precision", precision, f"is not supported by engine={engine} here", legal)
    if engine == "accelerate":
        if is_fsdp(parallel) and parallel.zero_stage == 1:
            rule = "engine=accelerate shards by FSDP2, which is ZeRO-2 or ZeRO-3, or replicates (0)"
            yield Problem("parallel.zero_stage", 1, rule, (0, 2, 3))
        return
    if deepspeed.offload_optimizer and parallel.zero_stage == 0:
        rule = "must be at least 1 with deepspeed.offload_optimizer=true"
        yield Problem("parallel.zero_stage", 0, rule, (1, 2, 3))
    if zero_stage(parallel, deepspeed) > 0:
        rule = "is not supported by engine=deepspeed from zero_stage 1 on"
        if optimizer == "muon":
            chosen = f"{rule}, whose shards are cut through matrices; choose optim=adamw, sgd or lion"
            yield Problem("optim.kind", optimizer, chosen)
        if ema_decay is not None:
            yield Problem("train.ema_decay", ema_decay, rule, (None,))


def _layout_problems(engine: EngineName, parallel: ParallelConfig) -> Iterator[Problem]:
    """Refuse every axis but those of data parallelism, and hybrids of these."""
    for axis in UNSHARDED_AXES:
        degree = getattr(parallel, axis)
        if degree > 1:
            rule = f"must be 1: engine={engine} runs data parallelism only (dp_replicate, dp_shard)"
            yield Problem(f"parallel.{axis}", degree, rule, (1,))
    if parallel.dp_replicate > 1 and parallel.dp_shard != 1 and parallel.zero_stage > 0:
        rule = f"must be 1 beside dp_shard: engine={engine} shards over all ranks, or over none"
        yield Problem("parallel.dp_replicate", parallel.dp_replicate, rule, (1,))
    if parallel.compile:
        yield Problem("parallel.compile", True, f"is not supported by engine={engine}", (False,))


def require_engine(engine: EngineName) -> None:
    """Refuse an engine whose package is missing.

    Raises:
        UserError: it can't be imported; says how to install it.
    """
    if engine != "native":
        require_package(engine, f"engine={engine}")
