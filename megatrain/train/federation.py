"""Runs that train apart and meet from time to time: federated averaging and DiLoCo.

A server is a run directory whose checkpoints are rounds: the weights from which the workers go on, and the outer
optimizer's state. Its manifest names the worker checkpoints from which a round was made. A worker is a run with
`checkpoint.adopt=SERVER`: it starts from the newest round, and when it is resumed at a checkpoint that has entered a
newer one, it takes up that round's weights and keeps its own optimizer.
"""

from pathlib import Path
from typing import Any

from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.train.adopt import adopted, describe_base
from megatrain.train.config import Config
from megatrain.train.imported import take_up_weights
from megatrain.train.state import TrainState

WORKERS = "workers"
"""Key of a round's manifest: run id of a worker -> step and tokens of its checkpoint, and its directory."""
ROUND = "round"
"""Key of a worker's manifest: the round from which its weights come (run id of the server, step, digest)."""


def is_round(manifest: Manifest) -> bool:
    """Return whether a checkpoint is a round of a server."""
    return WORKERS in manifest.info


def note_round(state: TrainState, source: VerifiedCheckpoint) -> None:
    """Note in `state` that its weights come from `source`, if that is a round."""
    if is_round(source.manifest):
        state.round = describe_base(source)


def take_up_round(
    cfg: Config, checkpointer: Checkpointer, state: TrainState, found: VerifiedCheckpoint
) -> VerifiedCheckpoint | None:
    """Let a worker that was resumed from `found` go on from the newest round, if `found` has entered it.

    All processes call this together. Returns the round; None if the run goes on from its own weights.

    Raises:
        UserError: the server is gone, or has other tensors.
        DamagedCheckpointError: its newest round is damaged.
    """
    state.round = dict(found.manifest.info.get(ROUND, {}))
    if not state.round or cfg.checkpoint.adopt is None:
        return None
    server, step = adopted(cfg, checkpointer)
    newest = server.latest()
    if newest is None or step is not None:
        return None
    entered: dict[str, Any] = newest.manifest.info.get(WORKERS, {}).get(cfg.run.id, {})
    if entered.get("step") != found.step or describe_base(newest) == state.round:
        return None
    source = take_up_weights(server, state, step=newest.step)
    note_round(state, source)
    return source


def newest_of(run: Path, cfg: Config) -> VerifiedCheckpoint:
    """Return the newest checkpoint of a run, every hash checked.

    Raises:
        UserError: it has none.
        DamagedCheckpointError: all are damaged.
    """
    found = Checkpointer(run / "checkpoints", cfg.checkpoint, moves_damaged=False).latest()
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    return found
