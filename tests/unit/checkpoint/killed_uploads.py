"""Kills an upload at every point, and says what is left. Started as a process of its own by the test.

Each attempt runs in a fork, which uploads step 300 over another attempt at it and prunes step 100. It is killed, by
SIGKILL, just before its n-th act on the disk: a write, a sync, or anything that changes a name (those are seen by an
audit hook, so the code under test is as it is). Prints one line of JSON.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from unit.checkpoint.killed_saves import NAME_ACTS, Killer

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.files import FileRecord
from megatrain.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from megatrain.checkpoint.tier import Tier

ACTS = (*NAME_ACTS, "shutil.rmtree")


def make_checkpoint(directory: Path, step: int, letter: bytes) -> Path:
    """A checkpoint whose files hold nothing but bytes of one kind: an upload does not look into them."""
    path = directory / f"step-{step:08d}"
    path.mkdir(parents=True)
    records = {}
    for name, size in (("__0_0.distcp", 5 << 20), (".metadata", 900), ("state.json", 70)):
        (path / name).write_bytes(letter * size)
        records[name] = FileRecord(size, hashlib.sha256(letter * size).hexdigest())
    manifest = Manifest(step=step, files=records, info={}, parent=None)
    (path / MANIFEST_FILE).write_bytes(manifest.render())
    return path


def upload(tier: Path, source: Path) -> None:
    place = Tier(str(tier))
    place.upload(source, require_owner=lambda: None)
    place.prune(CheckpointConfig(keep=1), require_owner=lambda: None)


def attempt(tier: Path, source: Path, n: int) -> bool:
    """Upload in a fork that is killed before its n-th act; True if it was killed."""
    child = os.fork()
    if child == 0:
        Killer(n, writes=1, name_acts=ACTS).install()
        upload(tier, source)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def is_whole(tier: Tier, step: int) -> bool:
    """Whether every file of a checkpoint has its hash; all of one attempt."""
    manifest = tier.manifest(step)
    return all(tier.hash_file(manifest, name) == record for name, record in manifest.files.items())


def main(folder: Path) -> None:
    source = make_checkpoint(folder / "run", 300, b"b")
    upload(folder / "before", make_checkpoint(folder / "old", 300, b"a"))
    upload(folder / "before", make_checkpoint(folder / "older", 100, b"c"))
    Tier(str(folder / "before")).upload(folder / "older" / "step-00000100", require_owner=lambda: None)
    report, n, killed = [], 0, True
    while killed:
        n += 1
        place = folder / "tier"
        shutil.copytree(folder / "before", place)
        killed = attempt(place, source, n)
        tier = Tier(str(place))
        steps = tier.steps()
        whole = 300 in steps and all(is_whole(tier, step) for step in steps)
        newer = tier.manifest(300) == read_manifest(source)
        again = tier.upload(source, require_owner=lambda: None)
        tier.prune(CheckpointConfig(keep=1), require_owner=lambda: None)
        after = [step for step in tier.stored() if is_whole(tier, step)]
        report.append({"n": n, "newer": newer, "whole": whole, "sent_again": again, "after": after})
        shutil.rmtree(place)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
