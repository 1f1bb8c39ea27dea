"""A training step of ranks of 1,024, on torch's fake process groups: what is sent, how much, and in which order.

A fake group sends nothing and answers each rank with its own tensors, so any rank can be run alone: with real tensors,
through the code that trains.
"""

from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import pytest
import torch
from layouts import EXPERTS, STORE
from probes import fake_ranks, in_new_processes
from torch import distributed as dist

from megatrain.observe.communication import Traffic, axes_of_groups, listening
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import AXES, world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.parallel.sharding import tensor_placement
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

LAYOUT = ParallelConfig(pp=4, dp_replicate=2, dp_shard=16, cp=2, tp=4, ep=4)
RANKS = world_size(LAYOUT)
MICRO_BATCHES = 4
CFG = replace(
    EXPERTS,
    train=replace(EXPERTS.train, precision="bf16"),
    parallel=LAYOUT,
    global_batch_size=MICRO_BATCHES * LAYOUT.dp_replicate * LAYOUT.dp_shard,
)
MODEL = CFG.model
CPU = torch.device("cpu")
BF16, FP32 = 2, 4

Sent = tuple[str, str, int]
"""Axis, collective, bytes."""


def rank_of(**coordinate: int) -> int:
    rank = 0
    for axis in AXES:
        rank = rank * getattr(LAYOUT, axis) + coordinate[axis]
    return rank


MIDDLE = {"pp": 1, "dp_replicate": 0, "dp_shard": 3, "cp": 0, "tp": 1}
NEIGHBORS = [{**MIDDLE, axis: MIDDLE[axis] + 1} for axis in AXES]
LAST = {axis: getattr(LAYOUT, axis) - 1 for axis in AXES}
CHOSEN = {rank_of(**each) for each in (dict.fromkeys(AXES, 0), MIDDLE, *NEIGHBORS, LAST)}


@dataclass(frozen=True)
class Step:
    """What one rank sends in a step."""

    sent: list[Sent]
    groups: dict[str, tuple[int, ...]]
    """Axis -> ranks of the group that this rank communicates with."""
    parameters: list[str]


def step_of(rank: int, cfg: Config) -> Step:
    """Take a step as `rank`."""
    with fake_ranks(rank, RANKS):
        return _step(cfg)


def _step(cfg: Config) -> Step:
    mesh = make_mesh(cfg.parallel, CPU)
    state, loader = build_state(cfg, CPU, mesh), build_loader(cfg, STORE, mesh)
    axes = axes_of_groups(mesh)
    sent: list[Sent] = []
    heard = Traffic.add

    def add(self: Traffic, axis: str, collective: str, size: int) -> None:
        sent.append((axis, collective, size))
        heard(self, axis, collective, size)

    with mock.patch.object(Traffic, "add", add), listening(axes):
        train_step(state, loader.step_batch(0), cfg, lr=1e-3)
    groups = {
        axes[group.group_name]: tuple(dist.get_process_group_ranks(group))
        for group in dist.distributed_c10d._world.pg_map
        if group.group_name in axes
    }
    return Step(sent, groups, list(state.weights.parameters))


@pytest.fixture(scope="module")
def steps(workers: WorkerPool) -> dict[int, Step]:
    """Of the chosen ranks, by rank."""
    return dict(zip(CHOSEN, in_new_processes(step_of, CHOSEN, [CFG] * len(CHOSEN)), strict=True))


def test_groups_are_few_and_have_the_right_ranks(steps: dict[int, Step]) -> None:
    step = steps[rank_of(**MIDDLE)]
    shards = LAYOUT.dp_shard * LAYOUT.cp
    sizes = {
        "all ranks": RANKS,
        "pp": LAYOUT.pp,
        "dp_replicate": LAYOUT.dp_replicate,
        "dp_shard x cp": shards,
        "cp": LAYOUT.cp,
        "tp": LAYOUT.tp,
        "ep": LAYOUT.ep,
        "replicas of experts": LAYOUT.dp_replicate,
        "shards of experts": shards * LAYOUT.tp // LAYOUT.ep,
    }
    assert {axis: len(ranks) for axis, ranks in step.groups.items()} == sizes
    for axis in ("pp", "cp", "tp", "dp_replicate"):
        along = [rank_of(**(MIDDLE | {axis: place})) for place in range(getattr(LAYOUT, axis))]
        assert list(step.groups[axis]) == along


def test_ranks_of_a_group_send_the_same_in_the_same_order(steps: dict[int, Step]) -> None:
    """Else they would wait for each other without end. A pipeline's ranks speak in pairs: what one sends, one gets."""
    compared = set()
    for first, one in steps.items():
        for second, other in steps.items():
            for axis in one.groups.keys() & other.groups.keys():
                if first < second and axis != "pp" and one.groups[axis] == other.groups[axis]:
                    assert on(one, axis) == on(other, axis), (first, second, axis)
                    compared.add(axis)
    assert compared == {*steps[0].groups} - {"pp"}
    before, after = (steps[rank_of(**(MIDDLE | {"pp": place}))] for place in (1, 2))
    for here, there in (("send", "receive"), ("receive", "send")):
        assert transfers(before, here) == transfers(after, there) == [hidden_bytes() // LAYOUT.tp] * 8


def on(step: Step, axis: str) -> list[Sent]:
    return [each for each in step.sent if each[0] == axis]


def transfers(step: Step, collective: str) -> list[int]:
    return [size for axis, kind, size in step.sent if (axis, kind) == ("pp", collective)]


def hidden_bytes() -> int:
    """Of the activations of one micro-batch between blocks, on a rank of cp, in bf16."""
    return CFG.resolved_micro_batch_size * CFG.seq_len // LAYOUT.cp * MODEL.hidden_size * BF16


@cache
def local_shapes() -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Whether the ranks of tp have copies of a parameter, and its shape on one of them, before FSDP."""
    state = build_state(replace(CFG, parallel=ParallelConfig()), CPU)
    weights, found = state.parallel.plan.weight_of, {}
    for name, parameter in state.weights.parameters.items():
        shape, placement = list(parameter.shape), tensor_placement(weights[name], parameter.ndim, LAYOUT.tp)
        is_copied = placement.is_replicate() and ".experts." not in name
        if ".experts." in name:
            shape[0] //= LAYOUT.ep
        elif not is_copied:
            shape[placement.dim] //= LAYOUT.tp  # type: ignore[attr-defined]
        found[name] = is_copied, tuple(shape)
    return found


def replicated_here(names: list[str], ranks: int) -> int:
    """Elements of parameters with copies on the ranks of tp that the middle rank has after FSDP."""
    index, total = MIDDLE["dp_shard"] * LAYOUT.cp + MIDDLE["cp"], 0
    for is_copied, (rows, *rest) in map(local_shapes().__getitem__, names):
        each = -(-rows // ranks)
        total += is_copied * max(0, min(each, rows - index * each)) * int(torch.Size(rest).numel())
    return total


def gathered(names: list[str], ranks: int) -> int:
    """Elements of parameters as FSDP gathers them: rows are padded to what the ranks divide."""
    total = 0
    for name in names:
        rows, *rest = local_shapes()[name][1]
        if ".experts." in name and rows % ranks and rest[0] % ranks == 0:
            rows, rest = rest[0], [rows, *rest[1:]]
        total += -(-rows // ranks) * ranks * int(torch.Size(rest).numel())
    return total


def test_a_middle_stage_sends_what_the_formulas_say(steps: dict[int, Step]) -> None:
    """The formulas of docs/layouts.md, with bytes. The stage has one block, with experts."""
    step, m = steps[rank_of(**MIDDLE)], MICRO_BATCHES
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for axis, kind, size in step.sent:
        calls, total = found.get((axis, kind), (0, 0))
        found[axis, kind] = (calls + 1, total + size)
    experts = [name for name in step.parameters if ".experts." in name]
    others = [name for name in step.parameters if ".experts." not in name]
    shards, same = LAYOUT.dp_shard * LAYOUT.cp, LAYOUT.dp_shard * LAYOUT.cp * LAYOUT.tp // LAYOUT.ep
    dense, moe = gathered(others, shards), gathered(experts, same)
    tokens = hidden_bytes()
    moe_cfg = MODEL.experts
    assert moe_cfg is not None
    rows = tokens // LAYOUT.tp * moe_cfg.top_k
    kv = CFG.resolved_micro_batch_size * CFG.seq_len * 2 * MODEL.kv_heads * MODEL.head_dim // LAYOUT.tp * BF16
    assert {key: found.pop(key) for key in list(found) if key[0] in ("pp", "ep", "all ranks")} == {
        ("pp", "send"): (2 * m, 2 * m * tokens // LAYOUT.tp),
        ("pp", "receive"): (2 * m, 2 * m * tokens // LAYOUT.tp),
        ("ep", "all_to_all"): (5 * m, m * (4 * rows + 8 * moe_cfg.n_experts)),
        ("all ranks", "all_reduce"): (2, 3 * 8 + MODEL.n_layers * moe_cfg.n_experts * 8),
    }
    sums = 2 * CFG.resolved_micro_batch_size * moe_cfg.n_experts * FP32  # scores and counts of sequences
    assert found == {
        ("dp_shard x cp", "all_gather"): (2 * m, 2 * m * BF16 * dense),
        ("dp_shard x cp", "reduce_scatter"): (m, m * FP32 * dense),
        ("dp_replicate", "all_reduce"): (1, FP32 * dense // shards),
        ("shards of experts", "all_gather"): (2 * m, 2 * m * BF16 * moe),
        ("shards of experts", "reduce_scatter"): (m, m * FP32 * moe),
        ("replicas of experts", "all_reduce"): (1, FP32 * moe // same),
        ("cp", "all_gather"): (m, m * kv),
        ("cp", "reduce_scatter"): (m, m * kv),
        ("cp", "all_reduce"): (2 * m, m * sums),
        ("tp", "all_gather"): (4 * m, 4 * m * tokens),
        ("tp", "reduce_scatter"): (4 * m, 4 * m * tokens),
        ("tp", "all_reduce"): (2 * m + 1, m * sums + FP32 * replicated_here(others, shards)),
    }
