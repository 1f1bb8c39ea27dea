"""`megatrain launch`: start a run on one machine or many, and check beforehand what can be refused without them."""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatrain.cli.actions import run_action
from megatrain.cli.compose import Source, compose
from megatrain.cli.conf import shipped_dir
from megatrain.cli.job import run_job
from megatrain.cli.launch_flags import flags_of, read_cluster
from megatrain.cli.options import Options, parse_options
from megatrain.cli.sweep import plan_sweep
from megatrain.config.errors import UserError
from megatrain.launch import k8s, slurm, ssh, torchrun
from megatrain.launch.check import require_runnable, warnings
from megatrain.launch.config import CLUSTERS, K8sCluster, SlurmCluster, SshCluster, TorchrunCluster
from megatrain.launch.slurm import JobOptions, Planned
from megatrain.launch.templates import new_folder
from megatrain.train.config import Config
from megatrain.train.files import run_directory


@dataclass(frozen=True, slots=True)
class Request:
    """A command line, parsed and checked."""

    flags: Namespace
    options: Options
    cluster: object
    runs: list[Planned]
    cfg: Config
    """Config of the run, or of the first one of a sweep."""
    directory: Path
    """Directory of the run, or the one above those of a sweep."""


def run(argv: list[str]) -> int:
    """Start a run where the first word says; return the exit code of the run, or 0 once it is queued."""
    return run_action("launch", {kind: partial(_launch, kind) for kind in CLUSTERS}, argv)


def _launch(kind: str, argv: list[str]) -> int:
    flags, given, words = flags_of(kind, argv)
    options = parse_options("launch", words)
    if options.cfg:
        return run_job("launch", words, lambda cfg: 0)
    source = Source(options.config_dir, options.config_name)
    if kind == "slurm" and (flags.status or flags.cancel):
        return _look(flags, options, source)
    request = _request(kind, flags, given, options, source)
    for warning in warnings(request.cfg):
        print(f"launch: {warning}", file=sys.stderr)
    starters: dict[str, Callable[[Request], int]] = {
        "local": _local, "torchrun": _torchrun, "slurm": _slurm, "k8s": _k8s, "ssh": _ssh,
    }  # fmt: skip
    return starters[kind](request)


def _request(
    kind: str, flags: Namespace, given: dict[str, object], options: Options, source: Source
) -> Request:
    """Compose and check the runs and the cluster.

    Raises:
        UserError: one of them can't run.
    """
    if options.multirun and kind != "slurm":
        raise UserError("launch: only SLURM queues the jobs of a sweep (--multirun); start them one by one.")
    if kind == "slurm" and options.multirun and flags.chain > 1:
        raise UserError(
            "launch: --chain is for one run; the jobs of a sweep (--multirun) requeue themselves."
        )
    if options.multirun:
        jobs = plan_sweep(options.overrides, source)
        configs = [(job.overrides, job.cfg) for job in jobs]
    else:
        configs = [(options.overrides, compose(options.overrides, source))]
    cluster = read_cluster(kind, flags.cluster, given, options.config_dir)
    for _, cfg in configs:
        if kind != "local":
            require_runnable(cfg, cluster)
    cfg = configs[0][1]
    directory = run_directory(cfg)
    before = [] if options.config_name == "config" else ["--config-name", options.config_name]
    if options.config_dir is not None:
        before += ["--config-dir", str(Path(options.config_dir).expanduser().resolve())]
    return Request(
        flags=flags,
        options=options,
        cluster=cluster,
        runs=[Planned(str(run_directory(cfg)), (*before, *lines)) for lines, cfg in configs],
        cfg=cfg,
        directory=directory.parent if options.multirun else directory,
    )


def _launchers(*parts: str) -> Path:
    """Return a file of `launchers/`, which lies beside `conf/` in a checkout and in an installation."""
    return shipped_dir().with_name("launchers").joinpath(*parts)


def _local(request: Request) -> int:
    from megatrain.cli.train import run as train

    words = list(request.runs[0].overrides)
    if request.flags.dry_run:
        print(f"megatrain train {' '.join(words)}")
        return 0
    return train(words)


def _torchrun(request: Request) -> int:
    cluster = request.cluster
    assert isinstance(cluster, TorchrunCluster)
    template = _launchers("torchrun", "node.sh")
    script = torchrun.node_script(template, cluster, request.cfg.run.name, request.runs[0].overrides)
    rank = 0 if cluster.nodes == 1 and cluster.node_rank is None else cluster.node_rank
    if request.flags.dry_run or rank is None:
        print(script, end="")
        return 0
    return torchrun.run_node(script, rank, request.directory)


def _ssh(request: Request) -> int:
    cluster = request.cluster
    assert isinstance(cluster, SshCluster)
    template = _launchers("torchrun", "node.sh")
    script = torchrun.node_script(template, cluster, request.cfg.run.name, request.runs[0].overrides)
    if request.flags.dry_run:
        print(script, end="")
        return 0
    commands = ssh.commands(cluster, _launchers("ssh", "guard.sh"), script)
    return ssh.run_hosts(commands, request.directory, cluster.grace_s, ssh.print_line)


def _k8s(request: Request) -> int:
    cluster = request.cluster
    assert isinstance(cluster, K8sCluster)
    template = _launchers("k8s", "jobset.yaml")
    text = k8s.manifest(template, cluster, request.cfg.run.name, request.runs[0].overrides)
    if request.flags.dry_run:
        print(text, end="")
        return 0
    path = new_folder(request.directory) / "jobset.yaml"
    path.write_text(text)
    print(f"Written: {path}. Start it: kubectl apply --filename {path}")
    return 0


def _slurm(request: Request) -> int:
    cluster, flags = request.cluster, request.flags
    assert isinstance(cluster, SlurmCluster)
    options = JobOptions(
        name=request.directory.name if len(request.runs) > 1 else request.cfg.run.name,
        is_chain=flags.chain > 1,
        at_once=flags.array,
    )

    def write(folder: Path) -> str:
        return slurm.script(_launchers("slurm", "train.sbatch"), cluster, request.runs, folder, options)

    if flags.dry_run:
        print(write(request.directory / "launch" / "1"), end="")
        return 0
    folder, jobs = slurm.submit(request.directory, write, flags.chain)
    print(f"Submitted as job {', '.join(jobs)}: {folder / slurm.SCRIPT}", flush=True)
    if flags.detach or len(request.runs) > 1:
        return 0
    try:
        return slurm.follow(request.directory, folder, jobs, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print("\nThe job goes on; with the same overrides, --status says how it is, and --cancel ends it.")
        return 0


def _look(flags: Namespace, options: Options, source: Source) -> int:
    """Say how the jobs of a run are, or end them."""
    if options.multirun:
        directory = run_directory(plan_sweep(options.overrides, source)[0].cfg).parent
    else:
        directory = run_directory(compose(options.overrides, source))
    if flags.cancel:
        ended = slurm.cancel(directory)
        print(f"Asked to save and end: job {', '.join(ended)}." if ended else "No job is left to cancel.")
        return 0
    jobs, record = slurm.status(directory)
    for job in jobs:
        print(f"job {job.id}: {job.state} {job.reason}".rstrip())
    print(f"run {directory}: {record or 'has not begun'}")
    return 0
