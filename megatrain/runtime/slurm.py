"""Tasks that srun has started as the processes of one run, without a launcher in between."""

import os
import re
from collections.abc import Mapping

from megatrain.config.errors import UserError

STEP_TASKS = "SLURM_STEP_NUM_TASKS"
"""Environment variable that only srun sets, for its own tasks: a batch script has the others, too."""
FIRST_PORT, PORTS = 20000, 12000
"""Ports for the meeting of a job's processes, below those that the kernel hands out."""


def name_task() -> None:
    """Say in this process's environment which of the run's processes it is, if it is one of several tasks of srun.

    A launcher that has done so already, or the user, wins.

    Raises:
        UserError: SLURM's variables are incomplete.
    """
    if "WORLD_SIZE" not in os.environ and os.environ.get(STEP_TASKS, "1") != "1":
        for name, value in task_variables(os.environ).items():
            os.environ.setdefault(name, value)


def task_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would set for a task of a step, from the variables of srun.

    Raises:
        UserError: one of them is missing.
    """
    try:
        node = int(environment["SLURM_NODEID"])
        job = int(environment["SLURM_JOB_ID"]) * 8 + int(environment.get("SLURM_RESTART_COUNT", 0))
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment[STEP_TASKS],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(FIRST_PORT + job % PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"srun started {environment.get(STEP_TASKS)} tasks, but its variables are incomplete "
            f"({type(error).__name__}: {error}). Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT, or WORLD_SIZE=1 for a run in each task."
        ) from None


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node, from SLURM's `2(x3),1`."""
    found = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found


def first_host(text: str) -> str:
    """Return the first name of a SLURM node list such as `gpu[07-09,12],login1`."""
    first = re.split(r",(?![^\[]*\])", text)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
