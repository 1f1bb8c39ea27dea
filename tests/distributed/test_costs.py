"""What a layout costs is what the theory says: collectives of a step, and bytes that a rank holds.

The formulas are those of ZeRO (arXiv 1910.02054, section 5), of sequence parallelism (arXiv 2205.05198, section 4.2)
and of Ulysses (arXiv 2309.14509, section 3); `docs/layouts.md` has them as tables.
"""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from layouts import CFG, EXPERTS, STORE
from probes import (
    Traffic,
    bytes_held,
    bytes_in_pipeline,
    bytes_kept,
    bytes_of_states,
    in_new_processes,
    profiled_traffic,
    traffic,
    traffic_of_first_ranks,
)

from megatrain.data.config import DataConfig
from megatrain.models.flops import n_params
from megatrain.models.llama3.config import Llama3Config
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import data_ranks, world_size
from megatrain.parallel.sharding import tensor_placement
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_state
from megatrain.train.config import Config

LAYERS = CFG.model.n_layers
GROUPS = LAYERS + 1
"""What ZeRO gathers and reduces at once: each block, and the rest."""


def in_layout(layout: dict[str, Any], precision: str = "fp64") -> Config:
    """A dense model, but for layouts with `ep`."""
    base = EXPERTS if "ep" in layout else CFG
    train = replace(CFG.train, precision=precision)
    return replace(base, train=train, parallel=ParallelConfig(**layout))


def expected(cfg: ParallelConfig, micro_batches: int) -> Traffic:
    """Collectives of one rank (of the pipeline's first) in one step with `micro_batches`."""
    found: Traffic = {}

    def add(name: str, ranks: int, calls: int) -> None:
        if ranks > 1 and calls:
            found[name, ranks] = found.get((name, ranks), 0) + calls

    m, blocks, stage = micro_batches, LAYERS // cfg.pp, cfg.zero_stage
    groups = blocks + 1
    copies, cut = cfg.dp_replicate, cfg.dp_shard * cfg.cp
    if stage == 0:
        copies, cut = copies * cut, 1
    add("all_gather", cut, groups * (2 * m if stage == 3 else 1))  # forward and backward, or once a step
    add("reduce_scatter", cut, groups * (m if stage >= 2 else 1))
    add("all_reduce", copies, groups)
    # Sequence parallelism: two each way in a block, one in the embedding, one (forward only) before the loss.
    add("all_gather", cfg.tp, m * (4 * blocks + 1 + (cfg.pp == 1)))
    add("reduce_scatter", cfg.tp, m * (4 * blocks + 1))
    # Gradients of what all tp ranks replicate, at once. (The loss's three are inside an operator, unheard.)
    add("all_reduce", cfg.tp, 1)
    if cfg.cp_kind == "all_gather":
        add("all_gather", cfg.cp, m * blocks)
        add("reduce_scatter", cfg.cp, m * blocks)
    elif cfg.cp_kind == "ring":
        for name in ("send", "recv"):
            add(name, min(cfg.cp, 2), 2 * m * blocks * (cfg.cp - 1))
    else:
        add("all_to_all", cfg.cp, 8 * m * blocks)  # q, k, v and the output, both ways
    for name in ("send", "recv"):
        add(name, min(cfg.pp, 2), m)
    add("all_reduce", world_size(cfg), 1)  # loss, norm and whether to stop
    if cfg.ep > 1:
        layers = blocks - 1  # the first one is dense
        share = cfg.dp_shard * cfg.cp * cfg.tp // cfg.ep  # ranks with the same experts
        add("all_gather", share, layers * (2 * m if stage == 3 else 1))
        add("reduce_scatter", share, layers * (m if stage >= 2 else 1))
        add("all_reduce", copies, layers)
        add("all_to_all", cfg.ep, 5 * m * layers)  # counts; tokens and answers, both ways
        for axis in (cfg.cp, cfg.tp):
            add("all_reduce", axis, 2 * m * layers)  # scores and counts of whole sequences
        add("all_reduce", world_size(cfg), 1)  # loads of the experts
    return found


@pytest.mark.parametrize(
    "layout",
    [
        *[{"dp_shard": 4, "zero_stage": stage} for stage in range(4)],
        *[{"dp_replicate": 2, "dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3)],
        {"tp": 2},
        *[{"cp": 2, "cp_kind": kind} for kind in ("all_gather", "ring", "ulysses")],
        pytest.param({"cp": 4, "cp_kind": "ring", "zero_stage": 1}, marks=pytest.mark.slow),
        {"dp_shard": 2, "tp": 2},
        {"pp": 2, "pp_schedule": "1f1b"},
        *[{"pp": 2, "dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3)],
        {"pp": 2, "dp_replicate": 2, "zero_stage": 2},
        {"dp_shard": 4, "ep": 2},
        {"cp": 2, "tp": 2, "ep": 2, "zero_stage": 1},
    ],
    ids=str,
)
def test_a_step_sends_what_the_theory_says(workers: WorkerPool, layout: dict[str, Any]) -> None:
    cfg = in_layout(layout)
    parallel = cfg.parallel
    micro_batches = cfg.global_batch_size // data_ranks(parallel)
    heard = workers.run(traffic, world_size(parallel), cfg, STORE)
    wanted = expected(parallel, micro_batches)
    if parallel.pp > 1:  # its ranks hold one group each that counts in `GROUPS`; on one rank nothing is cut
        assert heard[0] == wanted
    else:
        assert all(each == wanted for each in heard)


@pytest.mark.slow
def test_every_pair_of_axes_sends_what_the_theory_says(workers: WorkerPool) -> None:
    """On fake groups, which are as good for counting, and much cheaper. What ep needs to be legal stands beside it."""
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    pairs = [dict.fromkeys(pair, 2) for pair in combinations(axes, 2)]
    layouts = [pair if pair.keys() & {"dp_shard", "cp", "tp"} else pair | {"dp_shard": 2} for pair in pairs]
    layouts = [layout if "ep" in layout else layout | {"zero_stage": 2} for layout in layouts]
    cfgs = [in_layout(layout) for layout in layouts]
    (heard,) = in_new_processes(traffic_of_first_ranks, [cfgs], [STORE])
    for layout, cfg, found in zip(layouts, cfgs, heard, strict=True):
        micro_batches = cfg.global_batch_size // data_ranks(cfg.parallel)
        assert found == expected(cfg.parallel, micro_batches), layout


def test_weights_are_gathered_once_more_for_gradients_that_are_computed_apart(workers: WorkerPool) -> None:
    """Four stages of a block each, down and up again; the first and the last have one group more."""
    cfg = in_layout({"pp": 2, "dp_shard": 2, "pp_schedule": "zbv"})
    m = cfg.global_batch_size // 2
    heard = workers.run(traffic, 4, cfg, STORE)
    # The first rank has stages 0 and 3. Nothing comes before stage 0, so its backward pass is not split.
    for first in heard[:2]:
        assert (first["all_gather", 2], first["reduce_scatter", 2]) == (2 * m * 2 + 3 * m * 2, m * 4)
    for second in heard[2:]:
        assert (second["all_gather", 2], second["reduce_scatter", 2]) == (3 * m * 2, m * 2)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp_shard": 2, "tp": 2}, marks=pytest.mark.slow),
        {"pp": 2, "pp_schedule": "1f1b"},
    ],
    ids=str,
)
def test_bench_reports_what_a_step_sends_by_axis(workers: WorkerPool, layout: dict[str, Any]) -> None:
    cfg = in_layout(layout)
    parallel = cfg.parallel
    micro_batches = cfg.global_batch_size // data_ranks(parallel)
    wanted = expected(parallel, micro_batches)
    if parallel.tp > 1:  # the profile hears those inside the loss's operator too
        wanted["all_reduce", parallel.tp] += 3 * micro_batches
    reported = workers.run(profiled_traffic, world_size(parallel), cfg, STORE)[0]
    sizes = {
        "tp": parallel.tp,
        "dp_shard": parallel.dp_shard,
        "pp": parallel.pp,
        "all ranks": world_size(parallel),
    }
    found: Traffic = {}
    for talk in reported:
        key = (talk.collective.replace("receive", "recv"), sizes[talk.axis])
        found[key] = found.get(key, 0) + int(talk.calls)
        assert talk.seconds > 0
    assert found == wanted
    if parallel.dp_shard > 1:
        calls = {(talk.axis, talk.collective): talk for talk in reported}
        assert calls["tp", "all_gather"].calls == micro_batches * (4 * LAYERS + 2)
        # Each gather's output: the rank's tp shard of the weights, twice a micro-batch, 8 bytes each.
        shard = 8 * n_params(cfg.model) / parallel.tp
        assert calls["dp_shard", "all_gather"].bytes == pytest.approx(2 * micro_batches * shard, rel=0.05)


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_holds_what_the_zero_formulas_say(workers: WorkerPool, stage: int) -> None:
    """bf16 weights (2 bytes), float32 masters and moments (12), float32 gradients (4), between micro-batches."""
    ranks = 4
    cfg = in_layout({"dp_shard": ranks, "zero_stage": stage}, "bf16")
    size = n_params(cfg.model)
    states = 8 * size / (ranks if stage >= 1 else 1)
    masters = states / 2
    gradients = 4 * size / (ranks if stage >= 2 else 1)
    weights = 0 if stage == 3 else 2 * size
    for held in workers.run(bytes_held, ranks, cfg, STORE):
        assert held["states"] == states
        formula = states + masters + gradients + weights
        assert (
            formula <= held["all"] <= formula + largest_group(cfg) * 4 + 4096
        )  # buffer of the last reduction


def test_a_rank_of_a_pipeline_holds_what_the_zero_formulas_say(workers: WorkerPool) -> None:
    """Differences between stages of ZeRO in mid-step: all else that is alive, such as activations, is the same."""
    layouts = [in_layout({"pp": 2, "dp_shard": 2, "zero_stage": stage}) for stage in (1, 2, 3)]
    buffer = 8 * largest_group(layouts[0])  # of the last reduction
    for first, second, third in zip(
        *(workers.run(bytes_in_pipeline, 4, cfg, STORE) for cfg in layouts), strict=True
    ):
        size = first[1]
        half_of_gradients, weights = first[0] - second[0], second[0] - third[0]
        assert 8 * size / 2 - buffer - 4096 <= half_of_gradients <= 8 * size / 2 + 4096
        assert 8 * size - buffer - 4096 <= weights <= 8 * size + 4096


def largest_group(cfg: Config) -> int:
    """Parameters that are reduced at once at most."""
    single = build_state(replace(cfg, parallel=ParallelConfig()), torch.device("cpu"))
    sizes: dict[str, int] = {}
    for name, parameter in single.weights.parameters.items():
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "rest"
        sizes[group] = sizes.get(group, 0) + parameter.numel()
    return max(sizes.values())


@pytest.mark.parametrize(
    ("layout", "in_flight"),
    [
        ({}, [1]),
        ({"tp": 2}, [1]),
        ({"tp": 4}, [1]),
        ({"dp_shard": 2}, [1]),
        ({"dp_shard": 2, "tp": 2}, [1]),
        ({"pp": 2, "pp_schedule": "1f1b"}, [2, 1]),
        ({"pp": 2, "pp_schedule": "gpipe"}, [8, 8]),
        ({"pp": 4, "pp_schedule": "1f1b"}, [4, 3, 2, 1]),
    ],
    ids=str,
)
def test_a_rank_keeps_the_activations_of_the_formula(
    workers: WorkerPool, layout: dict[str, Any], in_flight: list[int]
) -> None:
    """Per token and layer of a Llama, in values (arXiv 2205.05198, section 4.2, for what autograd keeps here).

    Inputs of the two norms, each sharded over the sequence; inputs of attention and feed-forward, gathered; queries,
    keys, values and attention's output, gate, up and their product, sharded over heads and columns. Beside them the
    scores, which attention keeps on a CPU, and the head: its norm's input, and the gradients of the loss's two
    operands. A stage keeps as many micro-batches as its schedule has in flight.
    """
    hidden, heads, kv, ffn, seq, vocabulary = 128, 8, 64, 352, 64, 64
    model = Llama3Config(
        n_layers=4, hidden_size=hidden, n_heads=heads, n_kv_heads=4, ffn_size=ffn, vocab_size=vocabulary
    )
    train = replace(CFG.train, precision="fp32")
    data = DataConfig(kind="synthetic")
    parallel = ParallelConfig(**layout)
    cfg = replace(CFG, model=model, data=data, train=train, seq_len=seq, parallel=parallel)
    tp, layers = parallel.tp, 4 // parallel.pp
    token = 2 * hidden / tp + 2 * hidden + (2 * hidden + 2 * kv + 3 * ffn) / tp
    block = 4 * seq * (token + heads * seq / tp)
    head = 4 * (seq * (hidden / tp + hidden) + vocabulary * hidden / tp)
    ranks = workers.run(bytes_kept, world_size(parallel), cfg, STORE) if layout else [bytes_kept(cfg, STORE)]
    per_stage = len(ranks) // parallel.pp
    for rank, kept in enumerate(ranks):
        stage = rank // per_stage
        formula = in_flight[stage] * (layers * block + head * (stage == parallel.pp - 1))
        assert formula <= kept <= 1.015 * formula  # and the statistics of norms, positions, targets


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"pp": 2},
        {"dp_shard": 2, "cp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"pp": 2, "dp_shard": 2, "tp": 2},
        {"dp_shard": 2, "tp": 2, "ep": 2},
    ],
    ids=str,
)
def test_all_ranks_together_hold_each_state_once(workers: WorkerPool, layout: dict[str, Any]) -> None:
    """But for replicas, and what tensor parallelism shares (norms): a copy on each of its ranks."""
    cfg = in_layout(layout)
    names = build_state(replace(cfg, parallel=ParallelConfig()), torch.device("cpu"))
    weights = names.parallel.plan.weight_of
    replicated = sum(
        p.numel()
        for name, p in names.weights.parameters.items()
        if tensor_placement(weights[name], p.ndim, cfg.parallel.tp).is_replicate()
    )
    size = n_params(cfg.model) + (cfg.parallel.tp - 1) * replicated
    held = workers.run(bytes_of_states, world_size(cfg.parallel), cfg)
    assert sum(held) == 16 * size * cfg.parallel.dp_replicate
