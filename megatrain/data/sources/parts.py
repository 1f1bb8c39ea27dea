"""A corpus cut into units of work of about equal size, the same for any number of processes."""

import hashlib
from dataclasses import dataclass

from megatrain.data.sources.columnar import row_groups
from megatrain.data.sources.corpus import Corpus, Part
from megatrain.data.sources.formats import format_of
from megatrain.data.sources.listing import accessible
from megatrain.data.sources.streams import CHUNK, MARKS, uncompressed_name

UNIT_BYTES = 32 << 20
"""Source bytes of a unit. A file that can't be cut (text, CSV, anything compressed) is a unit, whatever its size."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over the bytes of a file found: their SHA-256, and where the file can be cut.

    Each cut is a part's begin and end (bytes, or row groups), the rows before it, and its size in bytes.
    """

    digest: str
    cuts: tuple[tuple[int, int, int, int], ...]


def scan(corpus: Corpus, number: int) -> Scan:
    """Read a file of the corpus once.

    Raises:
        UserError: it can't be read.
    """
    file = corpus.files[number]
    kind = format_of(file.name)
    plain = uncompressed_name(file.name) == file.name
    cuttable = plain and not corpus.is_stdlib and file.size > UNIT_BYTES
    with accessible(file.path), file.open() as stream:
        if cuttable and kind == "parquet":
            groups = _row_groups(row_groups(stream, file.path))
            stream.seek(0)
            return Scan(hashlib.file_digest(stream, "sha256").hexdigest(), groups)  # type: ignore[arg-type]
        if not (cuttable and kind == "jsonl" and corpus.encoding == "auto"):
            return Scan(hashlib.file_digest(stream, "sha256").hexdigest(), ())  # type: ignore[arg-type]
        total = hashlib.sha256()
        begin = rows_before = position = lines = 0
        cuts: list[tuple[int, int, int, int]] = []
        marked = False
        while chunk := stream.read(CHUNK):
            total.update(chunk)
            marked = marked or (position == 0 and any(chunk.startswith(mark) for mark, _ in MARKS[1:]))
            at = (
                chunk.find(b"\n", max(0, begin + UNIT_BYTES - position))
                if position + len(chunk) > begin + UNIT_BYTES
                else -1
            )
            if at >= 0:
                end = position + at + 1
                cuts.append((begin, end, rows_before, end - begin))
                begin, rows_before = end, lines + chunk.count(b"\n", 0, at + 1)
            lines += chunk.count(b"\n")
            position += len(chunk)
        if position > begin:
            cuts.append((begin, position, rows_before, position - begin))
        return Scan(
            total.hexdigest(), () if marked else tuple(cuts)
        )  # a break in UTF-16 is more than one byte


def _row_groups(sizes: list[int]) -> tuple[tuple[int, int, int, int], ...]:
    """Group the row groups of a Parquet file, given their sizes."""
    cuts, begin, size = [], 0, 0
    for number, each in enumerate(sizes, 1):
        size += each
        if size >= UNIT_BYTES or number == len(sizes):
            cuts.append((begin, number, 0, size))
            begin, size = number, 0
    return tuple(cuts)


def units(corpus: Corpus, scans: list[Scan]) -> list[tuple[list[Part], int]]:
    """Return the units of the corpus in order: the parts of each, and their size in bytes."""
    found: list[tuple[list[Part], int]] = []
    parts: list[Part] = []
    size = 0
    for number, (file, each) in enumerate(zip(corpus.files, scans, strict=True)):
        pieces = [(Part(number, *cut[:3]), cut[3]) for cut in each.cuts] or [(Part(number), file.size)]
        for part, part_size in pieces:
            if parts and size + part_size > UNIT_BYTES:
                found.append((parts, size))
                parts, size = [], 0
            parts.append(part)
            size += part_size
    if parts:
        found.append((parts, size))
    return found
