"""Faults, each at a random moment of a small run: what is done, and what must then be true.

A run with a fault is started again until it ends. Its weights and its record are then those of the undisturbed run, bit
for bit, unless the fault must change them; no checkpoint is lost; events.jsonl and status.json say what happened.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from faults.jobs import Attempt, Job
from workplace import final_weights, stable

from megatrain.checkpoint.inspect import require_whole
from megatrain.checkpoint.retention import committed_steps, step_name

STEPS = 24
ALONE_S = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WrongError(AssertionError):
    """What must be true after a fault is not."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise WrongError(what)


@dataclass
class Scene:
    """A run that will be disturbed, and the run of the same layout that is not."""

    job: Job
    whole: Job
    draw: random.Random
    codes: list[int]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.job.directory / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.job.directory / "status.json").read_text())
        return found

    def moment(self) -> int:
        """A number of rows, not at the very end."""
        return self.draw.randint(1, STEPS - 4)

    def pause(self) -> None:
        """Let a random part of a step or a save pass."""
        time.sleep(self.draw.uniform(0, 0.05))

    def victim(self, attempt: Attempt) -> int:
        return self.draw.choice(attempt.ranks).pid

    def require_whole_checkpoints(self, before: list[int]) -> None:
        """All that are there are whole, and the newest is not older than before."""
        directory = self.job.directory / "checkpoints"
        steps = committed_steps(directory)
        require(not (directory / "quarantine").exists(), "a checkpoint was put aside")
        require(max(steps, default=0) >= max(before, default=0), f"checkpoints {before} became {steps}")
        for step in steps:
            require_whole(directory / step_name(step), progress=lambda name, share: None)

    def finish(self, *overrides: str) -> None:
        """Start again until the run ends, and compare it with the undisturbed one."""
        for _ in range(3):
            attempt = self.job.start(*overrides)
            self.codes.append(attempt.ended())
            if self.codes[-1] == 0:
                break
        require(self.codes[-1] == 0, f"exit codes {self.codes}: {self.job_output()}")
        self.compare()

    def compare(self) -> None:
        weights = [
            final_weights(job.directory, job.folder / f"{job.name}.pt") for job in (self.job, self.whole)
        ]
        require(weights[0] == weights[1], "the final weights differ")
        rows = [
            stable([json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()])
            for job in (self.job, self.whole)
        ]
        require(rows[0] == rows[1], "the records differ")

    def job_output(self) -> str:
        path = self.job.folder / f"{self.job.name}.out"
        return path.read_text()[-2000:] if path.exists() else ""


def _checkpoints(scene: Scene) -> list[int]:
    return committed_steps(scene.job.directory / "checkpoints")


def _ended_in_time(scene: Scene, attempt: Attempt) -> int:
    began = time.monotonic()
    code = attempt.ended()
    require(time.monotonic() - began < ALONE_S, "the others did not end in time")
    scene.codes.append(code)
    return code


def kill(scene: Scene) -> None:
    """SIGKILL to one rank, or all."""
    attempt = scene.job.start()
    if scene.job.reach(attempt, scene.moment()):
        scene.pause()
        before = _checkpoints(scene)
        for rank in attempt.ranks if scene.draw.random() < 0.3 else [scene.draw.choice(attempt.ranks)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        _ended_in_time(scene, attempt)
        scene.require_whole_checkpoints(before)
    else:
        attempt.ended()
    scene.finish()


def stop(scene: Scene) -> None:
    """SIGSTOP to one rank: the others give up in time, and say so."""
    if scene.job.size == 1:
        return kill(scene)
    attempt = scene.job.start("resilience.timeout_s=4")
    require(scene.job.reach(attempt, scene.moment()), f"it ended early: {scene.job_output()}")
    scene.pause()
    before = _checkpoints(scene)
    os.kill(scene.victim(attempt), signal.SIGSTOP)
    code = _ended_in_time(scene, attempt)
    require(code not in (0, 75), f"exit code {code}")
    scene.require_whole_checkpoints(before)
    return scene.finish()


def ask(scene: Scene) -> None:
    """A signal that asks to stop, to one rank."""
    number = scene.draw.choice(SIGNALS)
    attempt = scene.job.start()
    reached = scene.job.reach(attempt, scene.moment())
    scene.pause()
    with contextlib.suppress(ProcessLookupError):
        os.kill(scene.victim(attempt), number)
    code = _ended_in_time(scene, attempt)
    if reached and code != 0:
        require(code == 75, f"exit code {code} after {number.name}: {scene.job_output()}")
        require(scene.status()["state"] == "stopped", f"status {scene.status()}")
        require(scene.events("stop")[-1]["step"] == _checkpoints(scene)[-1], "the last step was not saved")
    scene.finish()


def ask_early(scene: Scene) -> None:
    """The same while the run starts."""
    number = scene.draw.choice(SIGNALS)
    attempt = scene.job.start()
    limit = time.monotonic() + ALONE_S
    while not attempt.output.exists() and time.monotonic() < limit:
        time.sleep(0.01)  # the process begins, which nothing announces
    time.sleep(scene.draw.uniform(0, 2))
    with contextlib.suppress(ProcessLookupError):
        os.kill(scene.victim(attempt), number)
    code = _ended_in_time(scene, attempt)
    require(code in (0, 75), f"exit code {code} after {number.name}: {scene.job_output()}")
    scene.finish()


def _plant_nan(step: int, victim: int, rank: int) -> None:
    from megatrain.train import step as module

    real = module.accumulate_gradients

    def planted(state: Any, batch: Any, cfg: Any, **options: Any) -> Any:
        loss = real(state, batch, cfg, **options)
        if rank == victim and batch.step == step:
            gradient = next(p.grad for p in state.weights.parameters.values() if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).view(-1)[:1] = float("nan")
        return loss

    module.accumulate_gradients = planted


def nan(scene: Scene) -> None:
    """A gradient that is not a number, on one rank: all skip that step, and it stands in the ledger."""
    step, victim = scene.moment(), scene.draw.randrange(scene.job.size)
    attempt = scene.job.start(plant=partial(_plant_nan, step, victim))
    scene.codes.append(attempt.ended())
    require(scene.codes[-1] == 0, f"exit codes {scene.codes}: {scene.job_output()}")
    skipped = scene.events("step_skipped")
    require([each["step"] for each in skipped] == [step + 1], f"skipped: {skipped}")
    require(len(skipped[0]["samples"]) == 4, "the samples are not named")


def _plant_flip(step: int, rank: int) -> None:
    if rank != 1:
        return
    import torch

    from megatrain.train import loop as module

    real = module.train_step

    def planted(state: Any, *args: Any, **options: Any) -> Any:
        stats = real(state, *args, **options)
        if state.step == step:
            weight = next(iter(state.weights.parameters.values())).detach()
            local = getattr(weight, "_local_tensor", weight)
            local.view(-1)[:1].view(torch.int32).bitwise_xor_(
                1 << 12
            )  # the next steps may round a lower bit away
        return stats

    module.train_step = planted


def flip(scene: Scene) -> None:
    """A flipped bit in one replica's weight: found at the next comparison; the checkpoint before it is good."""
    if "dp_replicate=2" not in scene.job.layout:
        return nan(scene)
    step = 3 * scene.draw.randint(1, 6) + scene.draw.randint(1, 2)
    attempt = scene.job.start("resilience.compare_replicas_every=3", plant=partial(_plant_flip, step))
    code = _ended_in_time(scene, attempt)
    require(code == 1, f"exit code {code}: {scene.job_output()}")
    (event,) = scene.events("replicas_differ")
    require(event["step"] == -(-step // 3) * 3, f"found at {event['step']}, planted after {step}")
    require(event["ranks"] == [0, 1], f"ranks {event['ranks']}")
    return scene.finish()


def full_disk(scene: Scene) -> None:
    """No space for checkpoints from some moment on."""
    runs = scene.job.folder / "runs"
    runs.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(runs)], capture_output=True, check=False
    )
    if mounted.returncode:
        return kill(scene)
    try:
        attempt = scene.job.start()
        if scene.job.reach(attempt, scene.moment()):
            before = _checkpoints(scene)
            with contextlib.suppress(OSError), (runs / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            _ended_in_time(scene, attempt)
            scene.require_whole_checkpoints(before)
            (runs / "filler").unlink()
        else:
            attempt.ended()
        scene.finish()
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=False, capture_output=True)
    return None


def _plant_slow(step: int, victim: int, seconds: float, rank: int) -> None:
    from megatrain.data.loader import Loader

    real = Loader.step_batch

    def planted(loader: Any, number: int) -> Any:
        if rank == victim and number >= step:
            time.sleep(seconds)
        return real(loader, number)

    Loader.step_batch = planted  # type: ignore[method-assign]


def slow(scene: Scene) -> None:
    """A rank whose loader is slow changes nothing."""
    plant = partial(_plant_slow, scene.moment(), scene.draw.randrange(scene.job.size), 0.05)
    scene.codes.append(scene.job.start(plant=plant).ended())
    require(scene.codes[-1] == 0, f"exit codes {scene.codes}: {scene.job_output()}")
    scene.compare()


def _plant_loader_error(step: int, victim: int, rank: int) -> None:
    from megatrain.data.loader import Loader

    real = Loader.step_batch

    def planted(loader: Any, number: int) -> Any:
        if rank == victim and number == step:
            raise RuntimeError("planted in the loader")
        return real(loader, number)

    Loader.step_batch = planted  # type: ignore[method-assign]


def loader_error(scene: Scene) -> None:
    """An exception in a rank's loader ends all."""
    plant = partial(_plant_loader_error, scene.moment(), scene.draw.randrange(scene.job.size))
    attempt = scene.job.start(plant=plant)
    code = attempt.ended()
    scene.codes.append(code)
    require(code not in (0, 75), f"exit code {code}")
    logs = [*(scene.job.directory / "logs").glob("rank-*.log"), attempt.output]
    require(any("planted in the loader" in path.read_text() for path in logs), "the error is nowhere")
    require(scene.status()["state"] == "failed", f"status {scene.status()}")
    scene.finish()


def removed(scene: Scene) -> None:
    """The run directory is removed while it trains."""
    attempt = scene.job.start()
    if scene.job.reach(attempt, scene.moment()):
        scene.pause()
        os.rename(scene.job.directory, scene.job.folder / "removed")
        code = _ended_in_time(scene, attempt)
        require(code == 2 or (code > 2 and scene.job.size > 1) or code == 1, f"exit code {code}")
        require(not (scene.job.directory / "checkpoints").exists(), "something was written anew")
        shutil.rmtree(scene.job.directory, ignore_errors=True)
    else:
        attempt.ended()
    scene.finish()


def late_writer(scene: Scene) -> None:
    """A run is stopped, its directory removed, another started there; then the first goes on."""
    first = scene.job.start()
    if not scene.job.reach(first, scene.moment()):
        first.ended()
        return scene.finish()
    for rank in first.ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    shutil.rmtree(scene.job.directory)
    second = scene.job.start()
    scene.job.reach(second, scene.moment())
    for rank in first.ranks:
        os.kill(rank.pid, signal.SIGCONT)
    scene.codes += [second.ended(), first.ended()]
    require(scene.codes[0] == 0, f"exit codes {scene.codes}: {scene.job_output()}")
    require(scene.codes[1] != 0, "the late writer ended as if it were right")
    return scene.compare()


def twice(scene: Scene) -> None:
    """Two jobs are started together in one directory: one is refused, the other trains."""
    attempts = [scene.job.start(), scene.job.start()]
    codes = sorted(attempt.ended() for attempt in attempts)
    require(codes[0] == 0 and codes[1] in (0, 1, 2), f"exit codes {codes}: {scene.job_output()}")
    scene.codes += codes
    scene.compare()


KINDS: dict[str, Callable[[Scene], None]] = {
    each.__name__: each
    for each in (
        kill,
        stop,
        ask,
        ask_early,
        nan,
        flip,
        full_disk,
        slow,
        loader_error,
        removed,
        late_writer,
        twice,
    )
}


def moments(draw: random.Random, count: int, layouts: list[str]) -> Iterator[tuple[str, str, int]]:
    """Yield `count` faults: kind, layout and a seed of its own; every kind as often as any other."""
    kinds = list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        layout = "dp_replicate=2" if kind == "flip" else draw.choice(layouts)
        yield kind, layout, draw.randrange(1 << 30)
