"""Arithmetic of a layout: the processes it needs, where each stands, and why one is illegal. No process is needed."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

from megatrain.config.errors import UserError
from megatrain.config.schema import Problem, nearest_divisors
from megatrain.nn.config import DecoderConfig
from megatrain.parallel.config import MULTI_STAGE, SPLIT_BACKWARD, V_SHAPED, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the mesh, slowest first: ranks that differ in tp only are neighbours."""
FLOAT8_GROUP = 128  # tokens or channels that share a scale in fp8


def world_size(cfg: ParallelConfig) -> int:
    """Processes of the layout; `cfg.dp_shard` is known."""
    return math.prod(getattr(cfg, axis) for axis in AXES)


def describe(cfg: ParallelConfig) -> str:
    """The degrees that are not 1, as a user writes them; empty for one process."""
    return " ".join(f"{axis}={getattr(cfg, axis)}" for axis in (*AXES, "ep") if getattr(cfg, axis) != 1)


def require_processes(cfg: ParallelConfig, started: int) -> None:
    """Refuse another number of processes than the layout has ranks.

    Raises:
        UserError: `started` is not it.
    """
    needed = world_size(cfg)
    if started != needed:
        layout = describe(cfg) or "every degree 1"
        raise UserError(
            f"{started} process{'es' * (started > 1)} started, but the layout ({layout}) has {needed}. Start {needed}, "
            "change a degree, or let parallel.dp_shard=-1 fill what the other degrees leave."
        )


def data_ranks(cfg: ParallelConfig) -> int:
    """Groups of ranks that read different rows of a batch."""
    return cfg.dp_replicate * cfg.dp_shard


def fill(cfg: ParallelConfig, processes: int) -> ParallelConfig:
    """`cfg` with `dp_shard` = -1 replaced by what the other axes leave of `processes` (1 if they do not divide it)."""
    if cfg.dp_shard != -1:
        return cfg
    others = world_size(dataclasses.replace(cfg, dp_shard=1))
    return dataclasses.replace(cfg, dp_shard=max(1, processes // others))


def stage_rank(stage: int, cfg: ParallelConfig) -> int:
    """Which of the pipeline's ranks has `stage`: round and round, or down and up again in the V-shaped schedules."""
    if cfg.pp_schedule in V_SHAPED:
        return min(stage, 2 * cfg.pp - 1 - stage)
    return stage % cfg.pp


def problems(
    cfg: ParallelConfig, model: DecoderConfig, seq_len: int, rows: int, micro_batch: int
) -> Iterator[Problem]:
    """The rules that a layout breaks for `model` on sequences of `seq_len` tokens.

    Args:
        rows: sequences of the global batch. micro_batch: sequences computed at once.
    """
    yield from _divisions(cfg, model, seq_len)
    if cfg.pp > 1:
        yield from _pipeline(cfg, model, rows // max(1, data_ranks(cfg) * micro_batch))
    if cfg.pp == 1 and cfg.pp_split:
        yield Problem("parallel.pp_split", cfg.pp_split, "stages belong to parallel.pp > 1", ((),))
    if cfg.ep > 1:
        yield from _experts(cfg, model)


def _divisions(cfg: ParallelConfig, model: DecoderConfig, seq_len: int) -> Iterator[Problem]:
    """Sizes that an axis must divide."""
    heads = {"model.n_heads": model.n_heads, "model.n_kv_heads": model.kv_heads}
    sizes = {"tp": {**heads, "model.ffn_size": model.ffn_size, "model.vocab_size": model.vocab_size}}
    if model.experts is not None and cfg.ep == 1:
        sizes["tp"]["the experts' ffn_size"] = model.expert_ffn_size
    elif model.experts is not None and model.experts.n_shared_experts:
        sizes["tp"]["the shared experts' ffn_size"] = model.experts.n_shared_experts * model.expert_ffn_size
    if cfg.cp_kind == "ulysses":
        heads = {f"{name} / tp": size // cfg.tp for name, size in heads.items()}
        sizes["cp"] = {**heads, "seq_len / 2": seq_len // 2}
    else:
        sizes["cp"] = {"seq_len / 2": seq_len // 2 if seq_len % 2 == 0 else 1}
    for axis, parts in sizes.items():
        degree = getattr(cfg, axis)
        broken = [f"{name} ({size})" for name, size in parts.items() if size % degree]
        if broken:
            common = math.gcd(*parts.values())
            legal = nearest_divisors(common, degree)
            yield Problem(f"parallel.{axis}", degree, f"must divide {' and '.join(broken)}", legal)
    if seq_len // cfg.cp % cfg.tp:
        rule = f"sequence parallelism cuts the {seq_len // cfg.cp} tokens of a rank, so it must divide them"
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(seq_len // cfg.cp, cfg.tp))


def _experts(cfg: ParallelConfig, model: DecoderConfig) -> Iterator[Problem]:
    if model.experts is None:
        yield Problem("parallel.ep", cfg.ep, "the model has no experts to cut", (1,))
        return
    ranks = cfg.dp_shard * cfg.cp * cfg.tp
    parts = {"parallel.dp_shard · cp · tp": ranks, "moe.n_experts": model.experts.n_experts}
    broken = [f"{name} ({size})" for name, size in parts.items() if size % cfg.ep]
    if broken:
        legal = nearest_divisors(math.gcd(*parts.values()), cfg.ep)
        yield Problem("parallel.ep", cfg.ep, f"must divide {' and '.join(broken)}", legal)
    if cfg.activation_checkpointing == "selective":
        rule = (
            "selective recomputation does not bear that experts' weights are gathered inside a block (ep > 1)"
        )
        yield Problem(
            "parallel.activation_checkpointing", cfg.activation_checkpointing, rule, ("none", "full")
        )


def _pipeline(cfg: ParallelConfig, model: DecoderConfig, micro_batches: int) -> Iterator[Problem]:
    if cfg.stages > model.n_layers:
        rule = f"{cfg.stages} stages need as many layers, and the model has {model.n_layers}"
        yield Problem("parallel.pp", cfg.pp, rule, (max(1, model.n_layers * cfg.pp // cfg.stages),))
    if cfg.pp_split:
        firsts = (0, *cfg.pp_split, model.n_layers)
        if len(firsts) != cfg.stages + 1 or any(a >= b for a, b in pairwise(firsts)):
            rule = f"must be {cfg.stages - 1} rising numbers between 0 and model.n_layers ({model.n_layers})"
            yield Problem("parallel.pp_split", cfg.pp_split, rule)
    if cfg.pp_schedule in SPLIT_BACKWARD and cfg.zero_stage == 3:
        rule = f"{cfg.pp_schedule} computes weights' gradients later, when ZeRO stage 3 has freed the weights"
        yield Problem("parallel.zero_stage", cfg.zero_stage, rule, (1, 2))
    if cfg.pp_schedule in SPLIT_BACKWARD and cfg.tp > 1:
        rule = (
            f"{cfg.pp_schedule} computes weights' gradients apart, which collectives between them do not bear"
        )
        yield Problem("parallel.tp", cfg.tp, rule, (1,))
    needed = 2 * cfg.pp if cfg.pp_schedule == "dualpipe_v" else cfg.pp
    if cfg.pp_schedule in MULTI_STAGE and (micro_batches < needed or micro_batches % cfg.pp):
        rule = f"{cfg.pp_schedule} needs a multiple of pp and at least {needed} micro-batches, not {micro_batches}"
        yield Problem("parallel.pp_schedule", cfg.pp_schedule, rule, ("1f1b", "gpipe"))


def float8_problems(
    cfg: ParallelConfig, model: DecoderConfig, seq_len: int, scaling: str
) -> Iterator[Problem]:
    """The rules that linear layers in fp8 break: no scale may depend on how the work is cut."""
    if scaling == "tensor":
        rule = (
            "cuts tokens or weights that share a scale under train.fp8_scaling=tensor (block and row bear it)"
        )
        for axis in ("dp_replicate", "dp_shard", "cp", "tp"):
            if getattr(cfg, axis) > 1:
                yield Problem(f"parallel.{axis}", getattr(cfg, axis), rule, (1,))
    if scaling == "row" and cfg.tp > 1:
        rule = "cuts rows that share a scale under train.fp8_scaling=row (block bears it)"
        yield Problem("parallel.tp", cfg.tp, rule, (1,))
    if scaling == "block":
        yield from _blocks(cfg, model, seq_len)


def _blocks(cfg: ParallelConfig, model: DecoderConfig, seq_len: int) -> Iterator[Problem]:
    """Groups of tokens and of channels must lie whole on a rank."""
    unit = FLOAT8_GROUP * (2 * cfg.cp if cfg.cp > 1 else 1)
    if seq_len % unit:
        rule = f"must be a multiple of {unit}: train.fp8_scaling=block groups {FLOAT8_GROUP} tokens of one sequence"
        below = seq_len // unit * unit
        yield Problem("seq_len", seq_len, rule, (below, below + unit)[below == 0 :])
    if cfg.tp == 1:
        return
    mla = model.mla
    widths = {
        "queries": model.n_heads * model.qk_head_dim,
        "values": model.n_heads * model.v_head_dim,
        "keys": model.kv_heads * model.qk_head_dim
        if mla is None
        else model.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        "model.ffn_size": model.ffn_size,
    }
    if model.experts is not None and model.experts.n_shared_experts:
        widths["the shared experts"] = model.experts.n_shared_experts * model.expert_ffn_size
    broken = [f"{name} ({width})" for name, width in widths.items() if width % (FLOAT8_GROUP * cfg.tp)]
    if broken:
        rule = (
            f"must leave whole groups of {FLOAT8_GROUP} channels (train.fp8_scaling=block) in the parts of "
            + " and ".join(broken)
        )
        whole = math.gcd(*widths.values()) // FLOAT8_GROUP
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(max(1, whole), cfg.tp))
