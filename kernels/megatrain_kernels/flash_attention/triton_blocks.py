"""Block sizes of attention's Triton kernels: what may be chosen, and what is.

A kernel's first call takes the blocks that a table names: the user's own (`MEGATRAIN_TUNED`, else
`~/.cache/megatrain/attention_blocks.json`), which `megatrain bench --tune` writes, before the one that is shipped
(`blocks.json`). So one build of each kernel is all that a first step waits for. With `MEGATRAIN_TUNE=1` all blocks are
compiled and timed, and the fastest go into the user's table.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import triton

Sizes = tuple[int, int, int, int]
"""BLOCK_M (queries), BLOCK_N (keys), warps, stages of the load pipeline."""

# By kernel and width of the head (a power of two), for 16-bit types. Few, since each is compiled and timed once for
# each kind of call; the last of each line needs so little shared memory that it fits every GPU with tensor cores. For
# each kind of mask one of them at least spills no register where no mask is needed (see
# tests/kernels/test_attention_builds.py).
SPACE: dict[str, dict[int, list[Sizes]]] = {
    "forward": {
        64: [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    },
    "query": {
        64: [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
        256: [(64, 32, 8, 2), (32, 32, 4, 1)],
    },
    "key": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
        128: [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
    },
    "fused": {  # fewer than 64 queries would put the fifth product on the older tensor core instructions
        64: [(64, 128, 8, 2), (64, 64, 4, 2)],
        128: [(64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
    },
}
FLOAT32: list[Sizes] = [(32, 32, 8, 1)]  # registers are scarce: larger blocks spill them
INTERPRETED = {"BLOCK_M": 64, "BLOCK_N": 32, "TMA": False}


class Use(NamedTuple):
    """What blocks are chosen for."""

    capability: tuple[int, int]
    kind: str
    """A name in `triton.KINDS`."""
    width: int
    """Of the wider head, a power of two."""
    mask: str
    """As `choices.mask_of` names it."""
    grouped: bool
    """Whether several query heads share a key head."""
    size_class: int


def size_class(seq: int) -> int:
    """Return the class of a sequence length; lengths of one class share their blocks."""
    return sum(seq >= edge for edge in (1024, 8192))


def space(kind: str, width: int, itemsize: int) -> list[Sizes]:
    """Return the blocks that may be chosen."""
    return FLOAT32 if itemsize == 4 else SPACE[kind][max(64, width)]


def config(sizes: Sizes, descriptors: bool) -> triton.Config:
    """Return Triton's form of a choice.

    Args:
        descriptors: whether tiles are copied by tensor descriptors (TMA), which take no more registers than plain loads
            in any build, so the others are not tried beside them.
    """
    m, n, warps, stages = sizes
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TMA": descriptors}, num_warps=warps, num_stages=stages)


_remembered: dict[Use, Sizes] = {}
"""What this process has written."""


def tuning() -> bool:
    """Return whether blocks are to be timed, and the table written."""
    return os.environ.get("MEGATRAIN_TUNE") == "1"


def own_table() -> Path:
    """Return where the user's table is, or would be."""
    named = os.environ.get("MEGATRAIN_TUNED")
    return Path(named) if named else Path.home() / ".cache" / "megatrain" / "attention_blocks.json"


def chosen(use: Use, itemsize: int) -> Sizes:
    """Return the blocks to take: those of the use most like it on such a GPU, the user's before shipped ones.

    A GPU that no table knows gets the smallest blocks, which fit everywhere.
    """
    allowed = space(use.kind, use.width, itemsize)
    found = [
        (
            (row.mask != use.mask, row.grouped != use.grouped, rank, abs(row.size_class - use.size_class)),
            sizes,
        )
        for rank, table in enumerate((_own(), _shipped()))
        for row, sizes in table
        if row[:3] == use[:3] and sizes in allowed
    ]
    return min(found)[1] if found else allowed[-1]


def remember(use: Use, best: triton.Config) -> None:
    """Write the fastest blocks into the user's table, if it can be written."""
    sizes = best.kwargs["BLOCK_M"], best.kwargs["BLOCK_N"], best.num_warps, best.num_stages
    if _remembered.get(use) == sizes:
        return
    _remembered[use] = sizes
    rows = dict(_read(own_table())) | {use: sizes}
    text = json.dumps(
        {"rows": [{**row._asdict(), "blocks": sizes} for row, sizes in sorted(rows.items())]}, indent=1
    )
    with suppress(OSError):
        path = own_table()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text + "\n")
        partial.replace(path)


@cache
def _own() -> list[tuple[Use, Sizes]]:
    return _read(own_table())


@cache
def _shipped() -> list[tuple[Use, Sizes]]:
    return _rows(json.loads(files(__package__).joinpath("blocks.json").read_text())["rows"])


def _read(path: Path) -> list[tuple[Use, Sizes]]:
    """Return the rows of a file; none if it is missing or damaged, since blocks change no result."""
    try:
        return _rows(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _rows(rows: Iterable[dict[str, Any]]) -> list[tuple[Use, Sizes]]:
    found = []
    for row in rows:
        m, n, warps, stages = row["blocks"]
        use = Use(tuple(row["capability"]), *(row[name] for name in Use._fields[1:]))
        found.append((use, (m, n, warps, stages)))
    return found
