"""Faults at random moments of small runs under random layouts, and a table of what became of them."""

import random
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.jobs import LAYOUTS, Job
from faults.kinds import KINDS, Scene, moments


@dataclass
class Result:
    kind: str
    layout: str
    seed: int
    seconds: float = 0.0
    wrong: str = ""
    codes: list[int] = field(default_factory=list)


def text_in(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(f"The square of {n} is {n * n}.\n" for n in range(3000)))
    return path


def campaign(folder: Path, *, seed: int, count: int, kinds: list[str] | None = None) -> Iterator[Result]:
    """Yield what became of each of `count` faults drawn with `seed`."""
    text = text_in(folder)
    draw = random.Random(seed)
    wholes: dict[str, Job] = {}
    for number, (kind, layout, own) in enumerate(moments(draw, count, list(LAYOUTS))):
        if kinds and kind not in kinds:
            continue
        if layout not in wholes:
            wholes[layout] = Job(folder, text, f"whole-{len(wholes)}", layout)
            code = wholes[layout].start().ended()
            assert code == 0, wholes[layout].folder.joinpath(f"{wholes[layout].name}.out").read_text()
        own_folder = folder / f"fault-{number}"
        own_folder.mkdir()
        scene = Scene(Job(own_folder, text, "run", layout), wholes[layout], random.Random(own), [])
        found = Result(kind, layout, own, codes=scene.codes)
        began = time.monotonic()
        try:
            KINDS[kind](scene)
        except AssertionError as error:
            found.wrong = str(error) or traceback.format_exc()
        except Exception:
            found.wrong = traceback.format_exc()
        found.seconds = time.monotonic() - began
        if not found.wrong:
            shutil.rmtree(own_folder, ignore_errors=True)
        yield found
