"""Rules of parallel layouts: number of processes, pipeline placement, and why a layout is illegal.

Neither torch nor the processes are needed: a login node can check a layout of 4,096 ranks.
"""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

from megatrain.config.errors import UserError
from megatrain.config.schema import Problem, divisors, nearest_divisors, shown
from megatrain.nn.contract import Plan, Role, Weight
from megatrain.parallel.config import MULTI_STAGE, V_SHAPED, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh axes from outermost to innermost: ranks that differ only in tp are adjacent."""
FLOAT8_GROUP = 128  # tokens or channels that share a scale in fp8


def world_size(cfg: ParallelConfig) -> int:
    """Return the number of processes of the layout, whose `dp_shard` is known."""
    return math.prod(getattr(cfg, axis) for axis in AXES)


def layout_summary(cfg: ParallelConfig, *, options: bool = False) -> str:
    """Return the degrees that are not 1, as a user writes them; empty if all are 1.

    Args:
        options: include the other options, too, that are not the defaults.
    """
    plain = ParallelConfig()
    degrees = (*AXES, "ep")
    others = (field.name for field in dataclasses.fields(cfg) if field.name not in degrees)
    names = (*degrees, *(others if options else ()))
    changed = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(plain, name)}
    return " ".join(f"{name}={shown(value)}" for name, value in changed.items())


def require_processes(cfg: ParallelConfig, started: int) -> None:
    """Refuse a number of processes other than the layout's number of ranks.

    Raises:
        UserError: `started` differs from the layout's number of ranks.
    """
    needed = world_size(cfg)
    if started != needed:
        layout = layout_summary(cfg) or "every degree 1"
        raise UserError(
            f"{started} process{'es' * (started > 1)} started, but the layout ({layout}) needs {needed}. "
            f"Start {needed}, change a degree, or set parallel.dp_shard=-1 to use all that the other degrees leave."
        )


def data_ranks(cfg: ParallelConfig) -> int:
    """Return the number of data-parallel ranks, which read different rows of a batch."""
    return cfg.dp_replicate * cfg.dp_shard


def fill(cfg: ParallelConfig, processes: int) -> ParallelConfig:
    """Replace `dp_shard` = -1 by `processes` divided by the other degrees (1 if they do not divide it)."""
    if cfg.dp_shard != -1:
        return cfg
    others = world_size(dataclasses.replace(cfg, dp_shard=1))
    return dataclasses.replace(cfg, dp_shard=max(1, processes // others))


def stage_rank(stage: int, cfg: ParallelConfig) -> int:
    """Return the pipeline rank of `stage`: round robin, or down and up again in the V-shaped schedules."""
    if cfg.pp_schedule in V_SHAPED:
        return min(stage, 2 * cfg.pp - 1 - stage)
    return stage % cfg.pp


def share_of(units: int, ranks: int, rank: int) -> range:
    """Return which of `units` a rank holds: they are distributed over `ranks` in order, as evenly as they can be."""
    start = rank * (units // ranks) + min(rank, units % ranks)
    return range(start, start + units // ranks + (rank < units % ranks))


def shards_heads(weight: Weight, ranks: int) -> bool:
    """Tell whether a column-parallel weight is sharded over `ranks` tensor-parallel ranks.

    Key and value heads that several query heads share are not where `ranks` does not divide them, nor where there are
    fewer of them than ranks: then each rank holds them all, and computes those that its query heads need.
    """
    return weight.serves == 1 or weight.units % ranks == 0


def needed_heads(weight: Weight, ranks: int, rank: int) -> list[int]:
    """Return which key and value heads of a replicated `weight` the query heads of `rank` need, one for each group.

    Attention wants every key head to serve equally many query heads: where the rank's groups differ, each query head
    gets its own copy.
    """
    queries = share_of(weight.units * weight.serves, ranks, rank)
    served = [query // weight.serves for query in queries]
    heads = sorted(set(served))
    return heads if all(served.count(head) * len(heads) == len(served) for head in heads) else served


def problems(cfg: ParallelConfig, plan: Plan, seq_len: int, rows: int, micro_batch: int) -> Iterator[Problem]:
    """Yield the problems of a layout for a model on sequences of `seq_len` tokens.

    Args:
        plan: the model's weights.
        rows: number of sequences in the global batch.
        micro_batch: number of sequences in a micro-batch of one rank.
    """
    yield from _divisions(cfg, plan, seq_len)
    if cfg.pp > 1:
        yield from _pipeline(cfg, len(plan.blocks), rows // max(1, data_ranks(cfg) * micro_batch))
    if cfg.pp == 1 and cfg.pp_split:
        yield Problem("parallel.pp_split", cfg.pp_split, "requires a pipeline (parallel.pp > 1)", ((),))
    if cfg.ep > 1:
        yield from _experts(cfg, plan)


def _divisions(cfg: ParallelConfig, plan: Plan, seq_len: int) -> Iterator[Problem]:
    """Check the sizes that an axis must divide, or not exceed."""
    parts = {"seq_len / 2": seq_len // 2 if seq_len % 2 == 0 else 1}
    if cfg.cp_kind == "ulysses":
        parts |= _heads_of_ranks(cfg, plan)
    broken = [f"{name} ({size})" for name, size in parts.items() if size % cfg.cp]
    if broken:
        legal = nearest_divisors(math.gcd(*parts.values()), cfg.cp)
        yield Problem("parallel.cp", cfg.cp, f"must divide {' and '.join(broken)}", legal)
    sharded = [w for w in plan.weights.values() if w.size_key and not (cfg.ep > 1 and w.role & Role.EXPERT)]
    units = {w.size_key: w.units for w in sharded if shards_heads(w, cfg.tp)}
    tokens = seq_len // cfg.cp
    broken = [f"{name} ({size})" for name, size in units.items() if size < cfg.tp]
    legal = tuple(degree for degree in divisors(tokens) if degree <= min(units.values(), default=1))[-1:]
    if broken:
        yield Problem("parallel.tp", cfg.tp, f"must be at most {' and '.join(broken)}", legal)
    elif tokens % cfg.tp:
        rule = f"must divide a rank's {tokens} tokens per sequence, which sequence parallelism shards"
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(tokens, cfg.tp))


def _heads_of_ranks(cfg: ParallelConfig, plan: Plan) -> dict[str, int]:
    """Return the greatest number that divides the query, and the key and value heads of every tensor-parallel rank."""
    found: dict[str, int] = {}
    for name, weight in plan.weights.items():
        if not weight.size_key or ".attn." not in name or (weight.units < cfg.tp and weight.serves == 1):
            continue  # the latter is a problem of its own
        for rank in range(cfg.tp):
            sharded = shards_heads(weight, cfg.tp)
            heads = share_of(weight.units, cfg.tp, rank) if sharded else needed_heads(weight, cfg.tp, rank)
            key = f"a tp rank's share of {weight.size_key}"
            found[key] = math.gcd(found.get(key, 0), len(heads))
    return found


def _experts(cfg: ParallelConfig, plan: Plan) -> Iterator[Problem]:
    """Check the rules of expert parallelism."""
    stacks = [w for w in plan.weights.values() if w.role & Role.EXPERT]
    if not stacks:
        yield Problem("parallel.ep", cfg.ep, "requires a model with experts (model.experts)", (1,))
        return
    ranks = cfg.dp_shard * cfg.cp * cfg.tp
    experts = stacks[0].shape[0]
    broken = [f"must divide parallel.dp_shard · cp · tp ({ranks})"] if ranks % cfg.ep else []
    broken += [f"must be at most model.experts.n_experts ({experts})"] if cfg.ep > experts else []
    if broken:
        legal = sorted(
            sorted(degree for degree in divisors(ranks) if degree <= experts), key=lambda n: abs(n - cfg.ep)
        )
        yield Problem("parallel.ep", cfg.ep, " and ".join(broken), tuple(sorted(legal[:2])))


def _pipeline(cfg: ParallelConfig, n_layers: int, micro_batches: int) -> Iterator[Problem]:
    """Check the rules of pipeline parallelism."""
    if cfg.stages > n_layers:
        rule = f"{cfg.stages} pipeline stages need at least {cfg.stages} layers, but the model has {n_layers}"
        yield Problem("parallel.pp", cfg.pp, rule, (max(1, n_layers * cfg.pp // cfg.stages),))
    if cfg.pp_split:
        firsts = (0, *cfg.pp_split, n_layers)
        if len(firsts) != cfg.stages + 1 or any(a >= b for a, b in pairwise(firsts)):
            rule = (
                f"must be {cfg.stages - 1} increasing layer indices between 0 and model.n_layers ({n_layers})"
            )
            yield Problem("parallel.pp_split", cfg.pp_split, rule)
    needed = 2 * cfg.pp if cfg.pp_schedule == "dualpipe_v" else cfg.pp
    if cfg.pp_schedule in MULTI_STAGE and (micro_batches < needed or micro_batches % cfg.pp):
        rule = f"{cfg.pp_schedule} needs at least {needed} micro-batches and a multiple of pp, not {micro_batches}"
        yield Problem("parallel.pp_schedule", cfg.pp_schedule, rule, ("1f1b", "gpipe"))


def keeps_float8_codes(cfg: ParallelConfig) -> bool:
    """Tell whether weights quantized to fp8 are kept over a step's micro-batches.

    Not where a rank keeps no whole weights either (ZeRO-3), nor where a compiler would have to see that they are kept.
    """
    return not cfg.compile and (cfg.dp_shard == 1 or cfg.zero_stage < 3)


def float8_problems(cfg: ParallelConfig, plan: Plan, seq_len: int, scaling: str) -> Iterator[Problem]:
    """Yield the problems of linear layers in fp8: scales must not depend on how the work is sharded."""
    if scaling == "tensor":
        rule = "must be 1: it splits tokens or weights that share a scale in train.fp8_scaling=tensor; use row or block"
        for axis in ("dp_replicate", "dp_shard", "cp", "tp"):
            if getattr(cfg, axis) > 1:
                yield Problem(f"parallel.{axis}", getattr(cfg, axis), rule, (1,))
    if scaling == "row" and cfg.tp > 1:
        rule = "must be 1: it splits rows that share a scale in train.fp8_scaling=row; use block"
        yield Problem("parallel.tp", cfg.tp, rule, (1,))
    if scaling == "block":
        yield from _blocks(cfg, plan, seq_len)


def group_problems(cfg: ParallelConfig, plan: Plan, group: int) -> Iterator[Problem]:
    """Yield the problems of linear layers that round their weights in groups of inputs (`train.qat`)."""
    if any(weight.is_stacked for weight in plan.weights.values()):
        yield Problem("train.qat", "int4", "is not supported for a model with experts", ("none",))
        return
    products = {name: weight for block in plan.blocks for name, weight in block.items() if weight.is_product}
    ranks = {name: cfg.tp if weight.role & Role.ROW else 1 for name, weight in products.items()}
    sizes = {name: weight.shape[-1] for name, weight in products.items()}
    broken = [f"{name} ({size})" for name, size in sizes.items() if size % (group * ranks[name])]
    if group % 2 or broken:
        shards = " in each of their tp shards" if cfg.tp > 1 else ""
        rule = f"must be even, and divide the inputs of {', '.join(broken) or 'every layer'}{shards}"
        common = math.gcd(*(max(1, size // ranks[name]) for name, size in sizes.items()))
        yield Problem("train.qat_group", group, rule, nearest_divisors(common, group))


def _blocks(cfg: ParallelConfig, plan: Plan, seq_len: int) -> Iterator[Problem]:
    """Check that no group of tokens or channels is split between ranks."""
    unit = FLOAT8_GROUP * (2 * cfg.cp if cfg.cp > 1 else 1)
    if seq_len % unit:
        rule = f"must be a multiple of {unit}: train.fp8_scaling=block groups {FLOAT8_GROUP} tokens of a sequence"
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
            f"must leave full groups of {FLOAT8_GROUP} channels (train.fp8_scaling=block) in the shards of "
            + " and ".join(broken)
        )
        groups = math.gcd(*widths.values()) // FLOAT8_GROUP
        yield Problem("parallel.tp", cfg.tp, rule, nearest_divisors(max(1, groups), cfg.tp))
