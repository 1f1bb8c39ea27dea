"""Kills a save at every point, and says what is left. Started as a process of its own by the test.

Each attempt runs in a fork. It is killed, by SIGKILL, just before its n-th act on the disk: a write, a sync, or
anything that changes a name (those are seen by an audit hook, so the code under test is as it is).
Prints one line of JSON: for each n the newest good step, whether its content is right, and the names left.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from torch import Tensor
from unit.checkpoint.samples import all_bits, make_tensors, targets_for

from megatrain.checkpoint import files
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer

WRITES = 12  # torch writes a tensor in about forty small pieces: one act for so many of them
NAME_ACTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
TENSORS = ("model.layers.0.w", "optim.step", "optim.count")


def few_tensors(step: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in make_tensors(step).items() if name in TENSORS}


class Killer:
    """Counts acts, and kills this process before the n-th; so many `writes` are one act."""

    def __init__(self, n: int, *, writes: int = WRITES, name_acts: tuple[str, ...] = NAME_ACTS) -> None:
        self.left = n
        self.writes = 0
        self.writes_an_act = writes
        self.name_acts = name_acts

    def act(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in self.name_acts or creates:
            self.act()

    def install(self) -> None:
        fsync, write = os.fsync, files.HashingWriter.write

        def counted_fsync(descriptor: int) -> None:
            self.act()
            fsync(descriptor)

        def counted_write(writer: files.HashingWriter, data: object) -> int:
            self.writes += 1
            if self.writes % self.writes_an_act == 0:
                self.act()
            return write(writer, data)

        sys.addaudithook(self.audit)
        os.fsync = counted_fsync
        files.HashingWriter.write = counted_write  # type: ignore[method-assign]


def save(directory: Path, step: int, *, keep: int) -> None:
    Checkpointer(directory, CheckpointConfig(keep=keep)).save(step, few_tensors(step), {"step": step})


def attempt(directory: Path, n: int) -> bool:
    """Save step 300 (keeping one checkpoint) in a fork that is killed before its n-th act; True if it was killed."""
    child = os.fork()
    if child == 0:
        Killer(n).install()
        save(directory, 300, keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def main(folder: Path) -> None:
    save(folder / "before", 100, keep=0)
    save(folder / "before", 200, keep=0)
    report, n, killed = [], 0, True
    while killed:
        n += 1
        directory = folder / "run"
        shutil.copytree(folder / "before", directory)
        killed = attempt(directory, n)
        names = sorted(name.rstrip("0123456789abcdef") for name in os.listdir(directory))
        checkpointer = Checkpointer(directory, CheckpointConfig())
        found = checkpointer.load(loaded := targets_for(few_tensors(1)))
        assert found is not None
        right = all_bits(loaded) == all_bits(few_tensors(found.step)) and not found.warnings
        checkpointer.remove_leftovers()
        save(directory, 300, keep=1)  # life goes on
        after = sorted(os.listdir(directory))
        report.append({"n": n, "step": found.step, "right": right, "left": names, "after": after})
        shutil.rmtree(directory)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
