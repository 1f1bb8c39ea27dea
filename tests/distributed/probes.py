"""What a training step sends and what a rank holds, measured from outside of the code that is tested."""

import gc
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.data.store import TokenSource
from megatrain.observe.profile import OTHER, Communication, breakdown
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import Mesh, make_mesh
from megatrain.parallel.shards import local_tensor
from megatrain.parallel.stage import Stage
from megatrain.train import step
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.state import TrainState

T = TypeVar("T")
Traffic = dict[tuple[str, int], int]
"""(collective, number of ranks that take part) -> calls; send and recv count with the two ranks they join."""
NAMES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
}


class Listening(TorchDispatchMode):
    """Counts the collectives of a block, but for groups of one rank, in which nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            boxes = (arg for arg in args if isinstance(arg, torch.ScriptObject))
            (group,) = (box for box in boxes if "ProcessGroup" in box._type().qualified_name())
            name = NAMES[func._opname]
            ranks = 2 if name in ("send", "recv") else dist.ProcessGroup.unbox(group).size()
            if ranks > 1:
                self.heard[name, ranks] += 1
        return func(*args, **(kwargs or {}))


def traffic(cfg: Config, store: TokenSource) -> Traffic:
    """Of this rank in the second training step of `cfg` (the first one sets things up)."""
    state, batches, _ = _start(cfg, store)
    step.train_step(state, next(batches), cfg, lr=1e-3)
    with Listening() as ear:
        step.train_step(state, next(batches), cfg, lr=1e-3)
    return dict(ear.heard)


@contextmanager
def fake_ranks(rank: int, ranks: int) -> Iterator[None]:
    """Be `rank` of `ranks` on torch's fake groups, which send nothing and answer a rank with its own tensors.

    The vote of a pipeline's stages on whether all know their shapes is replaced: they do.
    """

    def yes(*_: Any, **__: Any) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    votes = {"_warmup_forward_vote": yes, "_warmup_backward_result": yes}
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with mock.patch.multiple(PipelineStage, **votes):
            yield
    finally:
        dist.destroy_process_group()


def in_new_processes(function: Callable[..., T], *columns: Iterable[Any]) -> list[T]:
    """Do as `map`, each call in a process of its own: torch keeps the meshes of earlier groups."""
    context = multiprocessing.get_context("forkserver")  # the workers' server has imported torch
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return list(pool.map(function, *columns))


def traffic_of_first_ranks(cfgs: list[Config], store: TokenSource) -> list[Traffic]:
    """Of rank 0 of each of `cfgs`, on fake groups."""
    found = []
    for cfg in cfgs:
        with fake_ranks(0, world_size(cfg.parallel)):
            found.append(traffic(cfg, store))
    return found


def profiled_traffic(cfg: Config, store: TokenSource) -> list[Communication]:
    """Of this rank in one training step, as `megatrain bench` reports it."""
    state, batches, mesh = _start(cfg, store)
    step.train_step(state, next(batches), cfg, lr=1e-3)
    found = breakdown(
        lambda: step.train_step(state, next(batches), cfg, lr=1e-3), state.parallel.models, mesh=mesh, steps=1
    )
    assert dict(found.classes).get(OTHER, 0.0) < 0.1 * found.step_time_s, found.classes
    return found.communication


def bytes_held(cfg: Config, store: TokenSource) -> dict[str, int]:
    """Of this rank, after the first of several micro-batches of a step: by the optimizer's states, and in all."""
    gc.collect()
    before = live_bytes([])
    state, batches, mesh = _start(cfg, store)
    batch = next(batches)
    parallel = state.parallel
    step.before_micro_batch(parallel.models[0], is_last=False, zero_stage=parallel.cfg.zero_stage)
    step.loss_sum(parallel, batch.micro_batches[0]).backward()
    state.weights.collect_gradients()
    batches.close()
    del batch, batches
    gc.collect()
    held = live_bytes([p.grad for p in parallel.parameters().values() if p.grad is not None])
    assert mesh is not None
    return {"states": _of_states(state), "all": held - before}


def bytes_in_pipeline(cfg: Config, store: TokenSource) -> tuple[int, int]:
    """Of this rank after the second of several backward passes of its stage, and the parameters of the whole stage."""
    state, batches, _ = _start(cfg, store)
    step.train_step(state, next(batches), cfg, lr=1e-3)
    models, own = state.parallel.models, state.parallel.parameters()
    held: list[int] = []
    backward = Stage.backward_maybe_with_nosync

    def listening(stage: Stage, *args: Any, **options: Any) -> Any:
        found = backward(stage, *args, **options)
        gathered = [p for model in models for p in model.parameters()]
        held.append(live_bytes([p.grad for p in (*own.values(), *gathered) if p.grad is not None]))
        return found

    with mock.patch.object(Stage, "backward_maybe_with_nosync", listening):
        step.train_step(state, next(batches), cfg, lr=1e-3)
    batches.close()
    return held[1], sum(p.numel() for p in own.values())


class Kept:
    """Bytes that autograd keeps for backward passes, each memory once and without the weights: now, and at most."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.now = self.most = 0
        self._models = models
        self._users: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> "Tensor | _Held":
        storage = local_tensor(tensor.detach()).untyped_storage()
        weights = {
            local_tensor(p.detach()).untyped_storage().data_ptr()
            for m in self._models
            for p in m.parameters()
        }
        if storage.data_ptr() in weights:
            return tensor
        return _Held(self, tensor, storage.data_ptr(), storage.nbytes())

    def unpack(self, held: "Tensor | _Held") -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def add(self, address: int, size: int) -> None:
        self._users[address] += 1
        self.now += size * (self._users[address] == 1)
        self.most = max(self.most, self.now)

    def remove(self, address: int, size: int) -> None:
        self._users[address] -= 1
        self.now -= size * (self._users[address] == 0)


class _Held:
    def __init__(self, kept: Kept, tensor: Tensor, address: int, size: int) -> None:
        self.kept, self.tensor, self.address, self.size = kept, tensor, address, size
        kept.add(address, size)

    def __del__(self) -> None:
        self.kept.remove(self.address, self.size)


def bytes_kept(cfg: Config, store: TokenSource) -> int:
    """The most that this rank keeps for backward passes in its second step."""
    state, batches, _ = _start(cfg, store)
    step.train_step(state, next(batches), cfg, lr=1e-3)
    kept = Kept(list(state.parallel.models))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        step.train_step(state, next(batches), cfg, lr=1e-3)
    batches.close()
    return kept.most


def bytes_of_states(cfg: Config) -> int:
    """What this rank's optimizer holds."""
    return _of_states(build_state(cfg, torch.device("cpu"), make_mesh(cfg.parallel, torch.device("cpu"))))


def _of_states(state: TrainState) -> int:
    return sum(
        local_tensor(t).nbytes
        for p in state.weights.parameters.values()
        for name, t in state.optimizer.state[p].items()
        if name != "step"
    )


def _start(cfg: Config, store: TokenSource) -> tuple[TrainState, Any, Mesh | None]:
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device) if dist.is_initialized() else None
    state = build_state(cfg, device, mesh)
    # Without batches that a thread makes ahead: they would be counted as what a rank holds.
    loader = build_loader(replace(cfg, data=replace(cfg.data, prefetch=0)), store, mesh)
    return state, loader.batches(0), mesh


def live_bytes(more: list[Tensor]) -> int:
    """Of all tensors that Python knows of, and `more`, each memory once."""
    found = {}
    # type(), not isinstance(): that would ask deprecated objects of torch, which warn
    for tensor in [*(each for each in gc.get_objects() if issubclass(type(each), Tensor)), *more]:
        part = local_tensor(tensor.detach()) if not tensor.is_meta else tensor
        if part.device.type == "cpu":
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
