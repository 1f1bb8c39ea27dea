"""Sweeps: the jobs against a plain product, their names, and their processes."""

import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from megatrain.cli.compose import Source, compose
from megatrain.cli.sweep import _run_process, plan_sweep
from megatrain.config.errors import UserError


def test_jobs_are_the_product_in_order() -> None:
    jobs = plan_sweep(["optim.lr=1e-3,2e-3", "train.seed=range(3)", "train.steps=500"], Source())
    expected = list(itertools.product([1e-3, 2e-3], range(3), [500]))
    assert [(job.cfg.optim.lr, job.cfg.train.seed, job.cfg.train.steps) for job in jobs] == expected


def test_names_tell_jobs_apart() -> None:
    jobs = plan_sweep(["run.name=base", "optim=adamw,sgd", "train.stop_at=5,null"], Source())
    assert [job.cfg.run.name for job in jobs] == [
        "base/0-optim=adamw,stop_at=5",
        "base/1-optim=adamw,stop_at=null",
        "base/2-optim=sgd,stop_at=5",
        "base/3-optim=sgd,stop_at=null",
    ]
    assert [compose(job.overrides) for job in jobs] == [job.cfg for job in jobs]


def test_a_name_that_is_swept_is_kept() -> None:
    assert [job.cfg.run.name for job in plan_sweep(["run.name=a,b"], Source())] == ["a", "b"]


@pytest.mark.parametrize(
    "override", ["data.path='/a b/../c*.txt',x", "train.allow_changes=[a,b],[]", "run.dir=a/b,.."]
)
def test_names_are_legal_whatever_is_swept(override: str) -> None:
    jobs = plan_sweep([override], Source())
    assert len({job.cfg.run.name for job in jobs}) == 2


def test_glob_and_choice_are_hydras() -> None:
    jobs = plan_sweep(["schedule=glob(*,exclude=c*)", "train.seed=choice(4,7)"], Source())
    assert [(job.cfg.schedule.kind, job.cfg.train.seed) for job in jobs] == [
        ("linear", 4), ("linear", 7), ("wsd", 4), ("wsd", 7),
    ]  # fmt: skip


def test_nothing_swept_is_one_job() -> None:
    (job,) = plan_sweep(["train.seed=3"], Source())
    assert (job.cfg.train.seed, job.cfg.run.name) == (3, "default/0-job")


def test_every_job_is_checked_before_the_first_starts() -> None:
    with pytest.raises(UserError) as caught:
        plan_sweep(["train.seed=0,-1", "optim.lr=1,x", "train.stepz=3"], Source())
    assert str(caught.value).splitlines() == [
        "no job was started:",
        "  train.stepz=3: there is no such key. Nearest legal: train.steps. (job 0, 1, 2, 3)",
        "  optim.lr=x: must be a number. (job 1, 3)",
        "  train.seed=-1: must be at least 0. Nearest legal: 0. (job 2, 3)",
    ]


def test_intervals_are_refused() -> None:
    with pytest.raises(UserError, match="can't be run"):
        plan_sweep(["optim.lr=interval(0,1)"], Source())


def test_a_job_is_a_process_with_its_own_exit_code() -> None:
    assert [_run_process([sys.executable, "-c", f"raise SystemExit({code})"]) for code in (0, 3, 75)] == [
        0,
        3,
        75,
    ]


def test_sigterm_reaches_the_job_and_leaves_the_sweep_alive(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = f"""
import pathlib, signal, time
def stop(number, frame):
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""

    def ask_to_stop() -> None:
        while not started.exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask_to_stop, daemon=True).start()
    assert _run_process([sys.executable, "-c", child]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
