"""The DeviceMesh of a run and the process groups derived from it."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import AXES


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
    sizes = tuple(getattr(cfg, axis) for axis in AXES)
    whole = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    experts = _regrouped(whole, cfg, "ep", cfg.ep) if cfg.ep > 1 else None
    return Mesh(cfg, whole, _regrouped(whole, cfg, "tp", cfg.tp), experts)


def _regrouped(whole: DeviceMesh, cfg: ParallelConfig, inner: str, size: int) -> DeviceMesh:
    """Arrange the same ranks as `(pp, replicate, shard, inner)`, the last of `size`."""
    summed = whole.size() // (cfg.pp * size)
    replicas = summed if cfg.zero_stage == 0 else cfg.dp_replicate
    split = (cfg.pp, replicas, summed // replicas, size)
    names = ("pp", "replicate", "shard", inner)
    return DeviceMesh(whole.device_type, whole.mesh.reshape(split), mesh_dim_names=names)
