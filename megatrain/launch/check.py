"""What can be refused before anything is queued, on a machine without PyTorch."""

import dataclasses
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.config.load import rule_problems
from megatrain.config.schema import ConfigError
from megatrain.launch.config import Cluster
from megatrain.parallel.layout import fill, layout_summary, world_size
from megatrain.train.auto import resolve_auto, with_precision
from megatrain.train.config import Config
from megatrain.train.files import IMPORT_FILE, read_config, run_directory
from megatrain.train.resume import check_same_run


def require_runnable(cfg: Config, cluster: Cluster) -> None:
    """Refuse a run whose layout does not fit the cluster, or that can't go on in its directory.

    Raises:
        UserError: it can't run; the message says why.
    """
    require_world(cfg, cluster)
    _require_same_run(cfg, run_directory(cfg))


def require_world(cfg: Config, cluster: Cluster) -> None:
    """Refuse a layout of another number of processes than the cluster starts, or one that breaks a rule there.

    Raises:
        UserError: the message names both numbers, or the broken rules.
    """
    started = cluster.world_size
    filled = dataclasses.replace(cfg, parallel=fill(cfg.parallel, started))
    needed = world_size(filled.parallel)
    if needed != started:
        nodes = started // cluster.processes
        layout = layout_summary(cfg.parallel) or "every degree 1"
        raise UserError(
            f"{nodes} node{'s' * (nodes > 1)} with {cluster.processes} process{'es' * (cluster.processes > 1)} each "
            f"start {started}, but the layout ({layout}) needs {needed}. Set parallel.dp_shard=-1 to use all that the "
            "other degrees leave, or change a degree, --nodes or --processes-per-node. Nothing was submitted."
        )
    if broken := list(rule_problems(filled)):
        raise ConfigError(broken)


def warnings(cfg: Config) -> list[str]:
    """Return what may be a mistake, but can't be known here: the nodes may see other files than this machine."""
    given = cfg.data.path if cfg.data.kind != "synthetic" else None
    paths = (given,) if isinstance(given, str) else given or ()
    missing = [
        path
        for path in paths
        if not any(mark in path for mark in ("://", *"*?[")) and not Path(path).exists()
    ]
    return [
        f"data.path={path} does not exist on this machine; the run fails unless the nodes have it."
        for path in missing
    ]


def _require_same_run(cfg: Config, directory: Path) -> None:
    """Refuse what the first process would refuse when it finds the checkpoints that are there."""
    has_steps = any(directory.glob("checkpoints/step-*"))
    if not has_steps or (directory / IMPORT_FILE).exists():
        if cfg.train.resume == "must" and not has_steps:
            raise UserError(
                f"train.resume=must, but {directory} has no checkpoint to resume from. Nothing was submitted."
            )
        return
    if cfg.train.resume == "never":
        raise UserError(
            f"train.resume=never, but {directory} has checkpoints. Choose another run.name, or resume with "
            "train.resume=auto. Nothing was submitted."
        )
    frozen = read_config(directory)
    if cfg.train.precision == "auto":
        cfg = with_precision(cfg, frozen.train.precision)
    cfg = dataclasses.replace(cfg, micro_batch_size=frozen.micro_batch_size)
    check_same_run(resolve_auto(frozen, memory=0), resolve_auto(cfg, memory=0))
