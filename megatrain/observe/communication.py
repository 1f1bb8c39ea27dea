"""Count and time the communication of a step by mesh axis: collectives and sends, their bytes, and waiting for them.

Every collective of this project, of FSDP and of torch's pipeline schedules goes through the methods of
`torch.distributed.ProcessGroup` and ends in `Work.wait`. While `listening`, these are wrapped: each call is counted,
and is a range in the profile whose name says the axis.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.profiler import record_function

from megatrain.parallel.mesh import Mesh
from megatrain.runtime.guard.seam import METHODS

PREFIX = "communication "
WAITING = "waiting for other pipeline stages"
"""Class of the time in which a pipeline rank waits for its neighbors: the bubble, and the transfer."""


@dataclass
class Traffic:
    """The communication of one process: (axis, collective) -> number of calls, and bytes of its tensors.

    A tensor is counted once, in its larger form: the output of an all-gather, the input of a reduce-scatter.
    """

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    bytes: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, axis: str, collective: str, size: int) -> None:
        """Count one call whose tensors have `size` bytes."""
        key = (axis, collective)
        self.calls[key] = self.calls.get(key, 0) + 1
        self.bytes[key] = self.bytes.get(key, 0) + size


def range_names(axis: str, collective: str) -> tuple[str, ...]:
    """Return the names of the ranges of a kind of communication: of the call, and of waiting for it."""
    call = f"{PREFIX}{axis} {collective}"
    return (
        (call, f"{WAITING}: {collective}") if axis == "pp" and collective in ("send", "receive") else (call,)
    )


def axes_of_groups(mesh: Mesh) -> dict[str, str]:
    """Return the axis that each process group of `mesh` communicates over, by the group's name."""
    cfg = mesh.cfg
    named: dict[str, str] = {}
    if dist.group.WORLD is not None:
        named[dist.group.WORLD.group_name] = "all ranks"
    shard = "dp_shard" if cfg.cp == 1 else "dp_shard x cp"
    replicas = shard if cfg.zero_stage == 0 and cfg.dp_replicate == 1 else "dp_replicate"
    meshes = [(mesh.data, {"replicate": replicas, "shard": shard, "tp": "tp"})]
    if mesh.experts is not None:
        experts = {"replicate": "replicas of experts", "shard": "shards of experts", "ep": "ep"}
        meshes.append((mesh.experts, experts))
    meshes.append((mesh.whole, {"cp": "cp", "pp": "pp"}))
    for each, names in meshes:
        for dimension, axis in names.items():
            if each[dimension].size() > 1:
                named[each.get_group(dimension).group_name] = axis
    return named


@contextmanager
def listening(axes: dict[str, str]) -> Iterator[Traffic]:
    """Count the communication of this process inside the context, and mark it in the profile.

    Args:
        axes: group name -> axis; a group that is not in it counts as `other groups`.
    """
    found = Traffic()
    group_class, work_class = dist.ProcessGroup, dist.distributed_c10d.Work
    # As they stand in the class: what getattr returns is not a method any more when it is put back.
    original = {name: vars(group_class)[name] for name in METHODS if name in vars(group_class)}
    original_wait = vars(work_class)["wait"]
    waited: dict[int, tuple[Any, str]] = {}
    """id(work) -> the work, kept so that its id stays its own, and the range of waiting for it."""

    def wait(work: Any, *args: Any, **options: Any) -> Any:
        _, name = waited.pop(id(work), (None, None))
        with nullcontext() if name is None else record_function(name):
            return original_wait(work, *args, **options)

    for name, method in original.items():
        setattr(group_class, name, _heard(METHODS[name], method, axes, found, waited))
    setattr(work_class, "wait", wait)  # noqa: B010 - not an assignment that a type checker knows
    try:
        yield found
    finally:
        setattr(work_class, "wait", original_wait)  # noqa: B010
        for name, method in original.items():
            setattr(group_class, name, method)


def _heard(
    collective: str,
    method: Callable[..., Any],
    axes: dict[str, str],
    found: Traffic,
    waited: dict[int, tuple[Any, str]],
) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **options: Any) -> Any:
        if group.size() == 1:  # nothing is sent
            return method(group, *args, **options)
        axis = axes.get(group.group_name, "other groups")
        found.add(axis, collective, max(map(_bytes, args), default=0))
        called, *waiting = range_names(axis, collective)
        with record_function(called):
            work = method(group, *args, **options)
        waited[id(work)] = (work, *(waiting or [called]))
        return work

    return call


def _bytes(argument: Any) -> int:
    """Return the bytes of the tensors in an argument: a tensor, or lists of them."""
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
