"""The tables of `megatrain data`."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.data.sources.left_out import LeftOut
from megatrain.observe.figures import byte_size

if TYPE_CHECKING:
    from megatrain.data.cache import Cache, Removal
    from megatrain.data.summary import SplitSummary, Summary

BAR = 30
"""Columns of the longest bar."""
NAME = 12
"""Characters of a cache's name in tables; any unique beginning names it."""


def summary_text(summary: "Summary") -> str:
    """Return the figures of a cache as text."""
    files = "" if summary.files is None else f", {summary.files:,} file{'s' * (summary.files != 1)}"
    left_out = LeftOut(summary.left_out).summary() or "nothing"
    lines = [
        f"{summary.origin}{files}",
        f"  cache       {summary.directory}",
        f"  tokenizer   {summary.tokenizer}, {summary.vocab_size:,} tokens",
        f"  left out    {left_out}",
    ]
    titles = {"train": "Training", "val": "Validation"}
    for name, split in summary.splits.items():
        lines += ["", titles.get(name, name), *_split_lines(split)]
    if "val" not in summary.splits:
        lines += ["", "Nothing is held out for validation."]
    return "\n".join(lines)


def _split_lines(split: "SplitSummary") -> list[str]:
    lengths = split.lengths
    lines = [
        f"  documents   {split.documents:,}",
        f"  tokens      {split.tokens:,}, of which {split.documents:,} end a document",
        f"  text        {byte_size(split.text_bytes)}, {split.bytes_per_token:.2f} bytes a token",
        f"  lengths     {lengths.min:,} to {lengths.max:,} tokens, median {lengths.median:,}, nine of ten at most "
        f"{lengths.p90:,}",
        f"  longest     document {lengths.longest:,}",
    ]
    most = max(count for _, _, count in lengths.histogram)
    rows = [(f"{low:,} to {high:,}", count) for low, high, count in lengths.histogram]
    width = max(len(label) for label, _ in rows)
    for label, count in rows:
        bar = "#" * (-(-BAR * count // most))
        lines.append(f"    {label:>{width}}  {bar:<{BAR}}  {count:,}".rstrip())
    return lines


def caches_text(caches: "list[Cache]", root: Path, *, now: float) -> str:
    """Return a table of caches."""
    if not caches:
        return f"There are no token caches in {root}."
    rows = [("name", "tokens", "size", "created", "last used", "state", "sources", "origin")]
    for cache in caches:
        rows.append(
            (
                cache.name[:NAME],
                f"{cache.tokens:,}" if cache.tokens else "-",
                byte_size(cache.bytes),
                _ago(now - cache.created),
                "now" if cache.in_use else _ago(now - cache.last_used),
                _state(cache),
                cache.sources,
                cache.origin or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = byte_size(sum(cache.bytes for cache in caches))
    count = f"{len(caches):,} cache{'s' * (len(caches) != 1)}"
    return "\n".join([*lines, f"{count}, {total}, in {root}"])


def removals_text(removals: "list[Removal]", root: Path, *, dry_run: bool) -> str:
    """Return what was removed, or would be."""
    if not removals:
        return f"There is nothing to remove in {root}."
    lines = []
    for removal in removals:
        cache = removal.cache
        done = "would be removed" if dry_run else "removed"
        what = f"kept ({removal.failure})" if removal.failure else done
        origin = f", {cache.origin}" if cache.origin else ""
        lines.append(f"{cache.name[:NAME]}  {byte_size(cache.bytes):>8}  {what}: {removal.reason}{origin}")
    freed = byte_size(sum(removal.cache.bytes for removal in removals if removal.failure is None))
    lines.append(f"{freed} would be freed; leave out --dry-run to do it." if dry_run else f"{freed} freed.")
    return "\n".join(lines)


def _state(cache: "Cache") -> str:
    return "being built" if cache.state == "unfinished" and cache.in_use else cache.state


def _ago(seconds: float) -> str:
    for size, unit in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {unit}{'s' * (number != 1)} ago"
    return "just now"
