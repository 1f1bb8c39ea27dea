"""The one DeviceMesh of a run and the groups that are made from it."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import AXES


@dataclass(frozen=True)
class Mesh:
    """The mesh of all ranks, and the axes that techniques work over."""

    cfg: ParallelConfig
    whole: DeviceMesh
    data: DeviceMesh
    """`(replicate, shard)`: gradients are summed over both, and states are cut over the second, which takes in cp."""
    experts: DeviceMesh | None
    """`(replicate, shard, ep)` if there are ranks of expert parallelism: the same of experts' parameters. Ranks that
    differ in dp_shard, cp or tp hold other experts (the nearest, on `ep`) or share the same ones."""

    @property
    def tp(self) -> DeviceMesh | None:
        return self.whole["tp"] if self.cfg.tp > 1 else None

    @property
    def cp(self) -> DeviceMesh | None:
        return self.whole["cp"] if self.cfg.cp > 1 else None

    @property
    def pp(self) -> DeviceMesh | None:
        return self.whole["pp"] if self.cfg.pp > 1 else None

    def coordinate(self, axis: str) -> int:
        """This rank's place on `axis`."""
        return int(self.whole.get_local_rank(axis))

    @property
    def data_rank(self) -> int:
        """Which rows of a batch this rank reads."""
        return self.coordinate("dp_replicate") * self.cfg.dp_shard + self.coordinate("dp_shard")


def make_mesh(cfg: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh of `cfg`, whose ep divides dp_shard · cp · tp, over the ranks of the default process group.

    ZeRO stage 0 cuts nothing, so all ranks that read different data are replicas.
    """
    sizes = tuple(getattr(cfg, axis) for axis in AXES)
    whole = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    experts = _regrouped(whole, cfg, "ep", cfg.ep) if cfg.ep > 1 else None
    return Mesh(cfg, whole, _regrouped(whole, cfg, "tp", cfg.tp), experts)


def _regrouped(whole: DeviceMesh, cfg: ParallelConfig, inner: str, size: int) -> DeviceMesh:
    """The same ranks as `(pp, replicate, shard, inner)`, the last of `size`."""
    summed = whole.size() // (cfg.pp * size)
    replicas = summed if cfg.zero_stage == 0 else cfg.dp_replicate
    split = (cfg.pp, replicas, summed // replicas, size)
    names = ("pp", "replicate", "shard", inner)
    return DeviceMesh(whole.device_type, whole.mesh.reshape(split), mesh_dim_names=names)
