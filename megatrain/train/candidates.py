"""Layouts for `megatrain verify` to try: the user's own, and lists of others."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatrain.config.load import rule_problems
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import AXES, layout_summary, world_size
from megatrain.train.config import Config

PROCESSES = 8
"""Largest number of processes of a layout that is tried, unless the user allows more."""

ONE_AXIS: tuple[dict[str, Any], ...] = (
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"tp": 2},
    {"cp": 2},
    {"pp": 2},
)
ONE_AXIS_OF_EXPERTS: tuple[dict[str, Any], ...] = ({"dp_shard": 2, "ep": 2},)
OTHERS: tuple[dict[str, Any], ...] = (
    *({"dp_shard": 2, "zero_stage": stage} for stage in (0, 1, 2)),
    *({"cp": 2, "cp_kind": kind} for kind in ("ring", "ulysses")),
    {"pp": 2, "pp_schedule": "gpipe"},
    {"pp": 2, "pp_schedule": "interleaved_1f1b"},
    *(
        {"pp": 2, "pp_schedule": schedule, "zero_stage": 2}
        for schedule in ("interleaved_zero_bubble", "zbv", "dualpipe_v")
    ),
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_shard": 2, "tp": 2},
    {"dp_shard": 2, "cp": 2, "zero_stage": 1},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2},
    {"pp": 2, "cp": 2, "cp_kind": "ring"},
    {"cp": 2, "tp": 2},
)
OTHERS_OF_EXPERTS: tuple[dict[str, Any], ...] = (
    {"tp": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"dp_shard": 4, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 1},
    {"dp_shard": 2, "tp": 2, "ep": 4},
    {"pp": 2, "dp_shard": 2, "ep": 2},
)
LISTS = ("all", "axes", "mine")
"""Names of lists: all of these layouts, one for each axis, none; the user's own comes first in each of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout to try, or the reason why it is not tried."""

    layout: ParallelConfig
    asked: bool = False
    """Whether the user asked for this very layout."""
    note: str = ""
    """What the user should know about it, for the table."""
    reason: str = ""
    """Why it is not tried; empty if it is."""

    @property
    def label(self) -> str:
        return layout_summary(self.layout, options=True)


def candidates(
    asked: Iterable[ParallelConfig], name: str, cfg: Config, processes: int = PROCESSES
) -> list[Candidate]:
    """Return the layouts to try, each once: those asked for and those of the list `name` that fit the model's kind.

    A layout of more than `processes` processes is not tried; one with smaller degrees is, in addition.
    """
    found: dict[ParallelConfig, Candidate] = {}
    for layout in asked:
        for each in _asked(layout, cfg, processes):
            found.setdefault(each.layout, each)
    has_experts = cfg.model.experts is not None
    lists = {
        "axes": (*ONE_AXIS, *(ONE_AXIS_OF_EXPERTS if has_experts else ())),
        "mine": (),
    }
    lists["all"] = (*lists["axes"], *OTHERS, *(OTHERS_OF_EXPERTS if has_experts else ()))
    for degrees in lists[name]:
        layout = ParallelConfig(**degrees)
        found.setdefault(layout, Candidate(layout))
    return list(found.values())


def _asked(layout: ParallelConfig, cfg: Config, processes: int) -> Iterator[Candidate]:
    """Yield the layout that the user asks for, and a smaller one if it has too many processes."""
    note = ""
    if layout.dp_shard == -1:
        layout = _filled(layout, cfg, processes)
        note = f"dp_shard=-1 is tried as dp_shard={layout.dp_shard}"
    needed = world_size(layout)
    if needed <= processes:
        yield Candidate(layout, asked=True, note=note)
        return
    reason = f"it has {needed} processes, and --processes allows {processes}"
    smaller = reduced(layout, processes)
    legal = world_size(smaller) > 1 and not any(True for _ in rule_problems(replace(cfg, parallel=smaller)))
    if legal:
        reason += "; a layout with smaller degrees is tried below"
    yield Candidate(layout, asked=True, reason=reason)
    if legal:
        yield Candidate(smaller, note=f"smaller degrees in place of {layout_summary(layout)}")


def _filled(layout: ParallelConfig, cfg: Config, processes: int) -> ParallelConfig:
    """Return `layout` with its smallest legal dp_shard of at least 2, or 1 if none is legal on so few processes."""
    for degree in range(2, processes + 1):
        filled = replace(layout, dp_shard=degree)
        if world_size(filled) > processes:
            break
        if not any(True for _ in rule_problems(replace(cfg, parallel=filled))):
            return filled
    return replace(layout, dp_shard=1)


def reduced(layout: ParallelConfig, processes: int) -> ParallelConfig:
    """Return `layout` with its largest degrees divided until it has at most `processes` processes."""
    while world_size(layout) > processes:
        axis = max(AXES, key=lambda each: getattr(layout, each))
        degree = getattr(layout, axis)
        factor = next(n for n in range(2, degree + 1) if degree % n == 0)
        layout = replace(layout, **{axis: degree // factor})
    experts_ranks = layout.dp_shard * layout.cp * layout.tp
    return replace(layout, ep=math.gcd(layout.ep, experts_ranks), pp_split=())
