"""The process that measures. It appends what it does to a file, line by line, so that nothing is lost with it.

A line is a JSON object with one key: `machine` (facts), `begin` (a step starts: part, index, about), `row`, `end` (of
a step: part) or `cut` (a part is not whole: part, why).
"""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.peers import installed
from benchmarks.gpu.steps import Row, Setting, Step, first_line
from benchmarks.machine import describe_machine

DEVICE_IS_LOST = 70  # exit code: an error that a CUDA process does not recover from


class Journal:
    """The file that the supervisor reads."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a")

    def write(self, **line: Any) -> None:
        """Append one line, at once."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """Return a command's first line; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def facts(setting: Setting) -> Row:
    """Return what the figures depend on."""
    device = setting.device
    on_gpu = device.type == "cuda"
    return describe_machine() | {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peers": installed(),
        "system": platform.platform(),
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "small": setting.small,
    }


def steps_of(part: str, setting: Setting) -> list[Step]:
    """Return the steps of the module of that name, imported now: an error there costs its part only."""
    found: list[Step] = import_module(f"benchmarks.gpu.{part}").steps(setting)
    return found


def claim(claims: Path, part: str, number: int) -> bool:
    """Return whether the step is this process's to do: nobody has claimed it before."""
    try:
        (claims / f"{part}-{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run_part(part: str, deadline: float, setting: Setting, journal: Journal, claims: Path) -> None:
    """Run the part's steps that nobody else has claimed, until its deadline.

    Raises:
        SystemExit: the device is of no more use to this process, or nobody reads the journal any more.
    """
    parent = os.getppid()
    try:
        steps = steps_of(part, setting)
    except Exception as error:
        journal.write(cut={"part": part, "why": first_line(error)})
        return
    for number, step in enumerate(steps):
        if time.time() > deadline:
            return
        if os.getppid() != parent:
            raise SystemExit(0)
        if not claim(claims, part, number):
            continue
        journal.write(begin={"part": part, "index": number, "about": step.about})
        if not run_step(step, part, journal, setting.device):
            raise SystemExit(DEVICE_IS_LOST)
        journal.write(end={"part": part})


def run_step(step: Step, part: str, journal: Journal, device: torch.device) -> bool:
    """Write the step's rows, or one with its error; return whether the device still works in this process."""
    try:
        for row in step.run():
            journal.write(row={"part": step.about.get("part", part), "error": None, **row})
    except Exception as error:  # whatever a kernel does wrong costs its own row only
        journal.write(row={"part": part, **step.about, "error": first_line(error)})
        return _device_works(device)
    return True


def _device_works(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Run the parts, each until its deadline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--claims", type=Path, required=True, help="folder with a file for each step begun")
    parser.add_argument(
        "--deadlines", type=json.loads, required=True, help="JSON: part -> seconds since 1970"
    )
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own log lines: not on the user's terminal
    setting = Setting(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), options.small)
    if setting.device.type == "cuda":
        # What torch.compile finds fastest while other processes use the GPU must not be kept for the timing.
        import_module("torch._inductor.config").autotune_local_cache = False
    journal = Journal(options.journal)
    journal.write(machine=facts(setting))
    for part, deadline in options.deadlines.items():
        run_part(part, deadline, setting, journal, options.claims)


if __name__ == "__main__":
    main()
