"""Arithmetic of a layout: how many processes it needs, where each stands, and why one is illegal.

No process and no torch is needed: a login node checks the layout of 4,096 ranks.
"""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

from megatrain.config.errors import UserError
from megatrain.config.schema import Problem, nearest_divisors
from megatrain.nn.contract import Plan, Role
from megatrain.parallel.config import MULTI_STAGE, SPLIT_BACKWARD, V_SHAPED, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the mesh, slowest first: ranks that differ in tp only are neighbours."""
FLOAT8_GROUP = 128  # tokens or channels that share a scale in fp8


def world_size(cfg: ParallelConfig) -> int:
    """Return the number of processes of the layout, whose `dp_shard` is known."""
    return math.prod(getattr(cfg, axis) for axis in AXES)


def layout_summary(cfg: ParallelConfig, *, options: bool = False) -> str:
    """Return the degrees that are not 1, as a user writes them; empty for one process.

    Args:
        options: also those of ZeRO stage, pipeline schedule and context parallelism that are not the defaults.
    """
    plain = ParallelConfig()
    names = (*AXES, "ep", *(("zero_stage", "pp_schedule", "cp_kind") if options else ()))
    changed = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(plain, name)}
    return " ".join(f"{name}={value}" for name, value in changed.items())


def require_processes(cfg: ParallelConfig, started: int) -> None:
    """Refuse another number of processes than the layout has ranks.

    Raises:
        UserError: `started` differs from the layout's number of ranks.
    """
    needed = world_size(cfg)
    if started != needed:
        layout = layout_summary(cfg) or "every degree 1"
        raise UserError(
            f"{started} process{'es' * (started > 1)} started, but the layout ({layout}) has {needed}. Start {needed}, "
            "change a degree, or let parallel.dp_shard=-1 fill what the other degrees leave."
        )


def data_ranks(cfg: ParallelConfig) -> int:
    """Return the number of groups of ranks that read different rows of a batch."""
    return cfg.dp_replicate * cfg.dp_shard


def fill(cfg: ParallelConfig, processes: int) -> ParallelConfig:
    """Replace `dp_shard` = -1 by what the other axes leave of `processes` (1 if they do not divide it)."""
    if cfg.dp_shard != -1:
        return cfg
    others = world_size(dataclasses.replace(cfg, dp_shard=1))
    return dataclasses.replace(cfg, dp_shard=max(1, processes // others))


def stage_rank(stage: int, cfg: ParallelConfig) -> int:
    """Return the pipeline rank of `stage`: round robin, or down and up again in the V-shaped schedules."""
    if cfg.pp_schedule in V_SHAPED:
        return min(stage, 2 * cfg.pp - 1 - stage)
    return stage % cfg.pp


def problems(cfg: ParallelConfig, plan: Plan, seq_len: int, rows: int, micro_batch: int) -> Iterator[Problem]:
    """Report the rules that a layout breaks for a model on sequences of `seq_len` tokens.

    Args:
        plan: the model's weights.
        rows: sequences of the global batch.
        micro_batch: sequences that a rank computes at once.
    """
    yield from _divisions(cfg, plan, seq_len)
    if cfg.pp > 1:
        yield from _pipeline(cfg, len(plan.blocks), rows // max(1, data_ranks(cfg) * micro_batch))
    if cfg.pp == 1 and cfg.pp_split:
        yield Problem(
            "parallel.pp_split", cfg.pp_split, "only a pipeline (parallel.pp > 1) has stages to split", ((),)
        )
    if cfg.ep > 1:
        yield from _experts(cfg, plan)


def _divisions(cfg: ParallelConfig, plan: Plan, seq_len: int) -> Iterator[Problem]:
    """Check the sizes that an axis must divide."""
    sharded = [w for w in plan.weights.values() if w.size_key and not (cfg.ep > 1 and w.role & Role.EXPERT)]
    heads = {w.size_key: w.units for name, w in plan.weights.items() if w.size_key and ".attn." in name}
    sizes = {"tp": {w.size_key: w.units for w in sharded}}
    if cfg.cp_kind == "ulysses":
        sizes["cp"] = {f"{name} / tp": size // cfg.tp for name, size in heads.items()}
        sizes["cp"]["seq_len / 2"] = seq_len // 2
    else:
        sizes["cp"] = {"seq_len / 2": seq_len // 2 if seq_len % 2 == 0 else 1}
    for axis, parts in sizes.items():
        degree = getattr(cfg, axis)
        broken = [f"{name} ({size})" for name, size in parts.items() if size % degree]
        if broken:
            legal = nearest_divisors(math.gcd(*parts.values()), degree)
            yield Problem(f"parallel.{axis}", degree, f"must divide {' and '.join(broken)}", legal)
    tokens = seq_len // cfg.cp
    if tokens % cfg.tp:
        rule = f"must divide the {tokens} tokens of a rank, which sequence parallelism shards"
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(tokens, cfg.tp))


def _experts(cfg: ParallelConfig, plan: Plan) -> Iterator[Problem]:
    """Check the rules of expert parallelism."""
    stacks = [w for w in plan.weights.values() if w.role & Role.EXPERT]
    if not stacks:
        yield Problem("parallel.ep", cfg.ep, "the model has no experts to shard", (1,))
        return
    ranks = cfg.dp_shard * cfg.cp * cfg.tp
    parts = {"parallel.dp_shard · cp · tp": ranks, "model.experts.n_experts": stacks[0].shape[0]}
    broken = [f"{name} ({size})" for name, size in parts.items() if size % cfg.ep]
    if broken:
        legal = nearest_divisors(math.gcd(*parts.values()), cfg.ep)
        yield Problem("parallel.ep", cfg.ep, f"must divide {' and '.join(broken)}", legal)
    if cfg.activation_checkpointing == "selective":
        rule = "selective activation checkpointing is not supported with expert parallelism (ep > 1)"
        yield Problem(
            "parallel.activation_checkpointing", cfg.activation_checkpointing, rule, ("none", "full")
        )


def _pipeline(cfg: ParallelConfig, n_layers: int, micro_batches: int) -> Iterator[Problem]:
    """Check the rules of pipeline parallelism."""
    if cfg.stages > n_layers:
        rule = f"{cfg.stages} stages need at least as many layers, and the model has {n_layers}"
        yield Problem("parallel.pp", cfg.pp, rule, (max(1, n_layers * cfg.pp // cfg.stages),))
    if cfg.pp_split:
        firsts = (0, *cfg.pp_split, n_layers)
        if len(firsts) != cfg.stages + 1 or any(a >= b for a, b in pairwise(firsts)):
            rule = f"must be {cfg.stages - 1} increasing numbers between 0 and model.n_layers ({n_layers})"
            yield Problem("parallel.pp_split", cfg.pp_split, rule)
    if cfg.pp_schedule in SPLIT_BACKWARD and cfg.zero_stage == 3:
        rule = (
            f"{cfg.pp_schedule} runs the weight-gradient pass later, when ZeRO stage 3 has freed the weights"
        )
        yield Problem("parallel.zero_stage", cfg.zero_stage, rule, (1, 2))
    if cfg.pp_schedule in SPLIT_BACKWARD and cfg.tp > 1:
        rule = f"{cfg.pp_schedule} runs the weight-gradient pass separately, which is incompatible with tp collectives"
        yield Problem("parallel.tp", cfg.tp, rule, (1,))
    needed = 2 * cfg.pp if cfg.pp_schedule == "dualpipe_v" else cfg.pp
    if cfg.pp_schedule in MULTI_STAGE and (micro_batches < needed or micro_batches % cfg.pp):
        rule = f"{cfg.pp_schedule} needs a multiple of pp and at least {needed} micro-batches, not {micro_batches}"
        yield Problem("parallel.pp_schedule", cfg.pp_schedule, rule, ("1f1b", "gpipe"))


def float8_problems(cfg: ParallelConfig, plan: Plan, seq_len: int, scaling: str) -> Iterator[Problem]:
    """Report the rules that linear layers in fp8 break: no scale may depend on how the work is sharded."""
    if scaling == "tensor":
        rule = "splits tokens or weights that share a scale under train.fp8_scaling=tensor; block and row allow it"
        for axis in ("dp_replicate", "dp_shard", "cp", "tp"):
            if getattr(cfg, axis) > 1:
                yield Problem(f"parallel.{axis}", getattr(cfg, axis), rule, (1,))
    if scaling == "row" and cfg.tp > 1:
        rule = "splits rows that share a scale under train.fp8_scaling=row; block allows it"
        yield Problem("parallel.tp", cfg.tp, rule, (1,))
    if scaling == "block":
        yield from _blocks(cfg, plan, seq_len)


def _blocks(cfg: ParallelConfig, plan: Plan, seq_len: int) -> Iterator[Problem]:
    """Check that groups of tokens and of channels lie whole on a rank."""
    unit = FLOAT8_GROUP * (2 * cfg.cp if cfg.cp > 1 else 1)
    if seq_len % unit:
        rule = f"must be a multiple of {unit}: train.fp8_scaling=block groups {FLOAT8_GROUP} tokens of one sequence"
        below = seq_len // unit * unit
        yield Problem("seq_len", seq_len, rule, (below, below + unit)[below == 0 :])
    if cfg.tp == 1:
        return
    not_linear = Role.EXPERT | Role.VOCABULARY
    widths = {
        name.rpartition("layers.")[2].partition(".")[2]: w.sharded_size
        for name, w in plan.weights.items()
        if w.size_key and not w.role & not_linear
    }
    broken = [f"{name} ({width})" for name, width in widths.items() if width % (FLOAT8_GROUP * cfg.tp)]
    if broken:
        rule = (
            f"must leave whole groups of {FLOAT8_GROUP} channels (train.fp8_scaling=block) in the shards of "
            + " and ".join(broken)
        )
        whole = math.gcd(*widths.values()) // FLOAT8_GROUP
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(max(1, whole), cfg.tp))
