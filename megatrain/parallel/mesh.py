"""The DeviceMesh of a run and the process groups derived from it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import AXES, world_size


@dataclass(frozen=True)
class Mesh:
    """The mesh of all ranks, and the submeshes that techniques use. An axis of degree 1 has one rank."""

    cfg: ParallelConfig
    whole: DeviceMesh
    data: DeviceMesh
    """`(pp, replicate, shard, tp)`: FSDP reduces gradients over replicate and shard, and shards over the latter, which
    includes cp."""
    experts: DeviceMesh | None
    """`(pp, replicate, shard, ep)` with expert parallelism: the same for experts' parameters. Ranks that differ in
    dp_shard, cp or tp hold different experts (adjacent ranks, on `ep`) or replicas of the same ones."""

    @property
    def tp(self) -> DeviceMesh:
        """The tp axis, of the mesh that FSDP uses, since FSDP requires parameters sharded over the same root mesh."""
        return self.data["tp"]

    @property
    def ep(self) -> DeviceMesh:
        """The ep axis, of the mesh over which FSDP shards the experts."""
        assert self.experts is not None
        return self.experts["ep"]

    @property
    def cp(self) -> DeviceMesh:
        """The cp axis."""
        return self.whole["cp"]

    @property
    def pp(self) -> DeviceMesh:
        """The pp axis."""
        return self.whole["pp"]

    def coordinate(self, axis: str) -> int:
        """Return this rank's index on `axis`."""
        return int(self.whole.get_local_rank(axis))

    @property
    def data_rank(self) -> int:
        """Index of this rank among those that read different rows of a batch."""
        return self.coordinate("dp_replicate") * self.cfg.dp_shard + self.coordinate("dp_shard")


def make_mesh(cfg: ParallelConfig, device: torch.device) -> Mesh:
    """Make the mesh of `cfg`, whose ep divides dp_shard · cp · tp, over the ranks of the default process group.

    ZeRO stage 0 shards nothing, so all data-parallel ranks are replicas.
    """
    whole = _arranged(device, {axis: getattr(cfg, axis) for axis in AXES}, uses=("pp", "cp"))
    data = _arranged(device, _regrouped(cfg, "tp", cfg.tp), uses=("replicate", "shard", "tp"))
    experts = None
    if cfg.ep > 1:
        experts = _arranged(device, _regrouped(cfg, "ep", cfg.ep), uses=("replicate", "shard", "ep"))
    return Mesh(cfg, whole, data, experts)


def _regrouped(cfg: ParallelConfig, inner: str, size: int) -> dict[str, int]:
    """Return the sizes of the axes that arrange all ranks as `(pp, replicate, shard, inner)`, the last of `size`."""
    summed = world_size(cfg) // (cfg.pp * size)
    replicas = summed if cfg.zero_stage == 0 else cfg.dp_replicate
    return {"pp": cfg.pp, "replicate": replicas, "shard": summed // replicas, inner: size}


def _arranged(device: torch.device, sizes: dict[str, int], *, uses: tuple[str, ...]) -> DeviceMesh:
    """Arrange all ranks as `sizes` (axis -> size) says, with a process group for each axis that is used and has ranks.

    Over a thousand ranks, groups take time to connect and memory of each GPU. The others are torch's `fake` groups,
    which never send; but FSDP gathers over `shard` even if that is one rank.
    """
    unused: dict[Any, Any] = {
        axis: "fake" for axis, size in sizes.items() if axis not in uses or (size == 1 and axis != "shard")
    }
    names, shape = tuple(sizes), tuple(sizes.values())
    return init_device_mesh(device.type, shape, mesh_dim_names=names, backend_override=unused)
