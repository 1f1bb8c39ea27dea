"""A run of some steps in any engine, which takes up the checkpoint in a directory and saves one at its end."""

from dataclasses import dataclass
from pathlib import Path

import torch
from resharding import joined_processes
from torch import distributed as dist
from torch import nn

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.store import TokenSource
from megatrain.parallel.mesh import make_mesh
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.parity import Arrays, full_arrays, validation_loss
from megatrain.train.step import train_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Course:
    """What a run computed; `tensors` are all of its last checkpoint, in full, on the first rank."""

    losses: list[float]
    norms: list[float]
    digests: list[str]
    eval_loss: float
    tensors: Arrays


def course(cfg: Config, store: TokenSource, steps: int, directory: Path | None = None) -> Course:
    """Train `steps` more steps on this rank of the default process group, or alone."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    processes = joined_processes() if size > 1 else None
    mesh = make_mesh(cfg.parallel, CPU) if size > 1 else None
    state = build_state(cfg, CPU, mesh)
    checkpointer = None if directory is None else Checkpointer(directory, CheckpointConfig(), processes)
    if checkpointer is not None and (found := checkpointer.load(tensors := state.tensors())):
        state.restore(found.state, tensors)
    loader = build_loader(cfg, store, mesh)
    losses, norms, digests = [], [], []
    for _ in range(steps):
        batch = loader.step_batch(state.step)
        loss, norm, _ = train_step(state, batch, cfg, lr=cfg.optim.lr).read()
        losses.append(loss)
        norms.append(norm)
        digests.append(batch.digest)
    eval_loss = validation_loss(state, cfg, store)
    if checkpointer is not None:
        checkpointer.save(state.step, state.tensors(), state.metadata())
    arrays = full_arrays(state.tensors(), {})
    state.close()
    return Course(losses, norms, digests, eval_loss, arrays)


def prepared_without_help(cfg: Config, shards: bool) -> str:
    """What the check says of a model that Accelerate prepared as its defaults have it, on two ranks of a CPU."""
    from megatrain.engines import accelerate  # an optional package

    model = nn.Linear(4, 4)
    plugin = accelerate._fsdp2(cfg.parallel, torch.float32) if shards else None
    # Sharded: on a CPU, as asked for. Otherwise: as `Accelerator()` does it.
    accelerator = accelerate.Accelerator(cpu=shards, fsdp_plugin=plugin)
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    try:
        accelerate._check(accelerator, prepared, ranks=2, shards=shards)
    except UserError as error:
        return str(error)
    return ""
