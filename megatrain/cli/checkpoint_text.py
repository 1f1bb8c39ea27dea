"""The tables of `megatrain checkpoint`, and the same facts as plain data."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.observe.figures import byte_size, visible

if TYPE_CHECKING:
    from megatrain.checkpoint.compare import Comparison, Element, TensorDifference
    from megatrain.checkpoint.inspect import Opened, Verified
    from megatrain.checkpoint.listing import Listed

ROWS = 20
"""Differing tensors that the text lists; --json has all."""
WIDTH = 100
"""Characters of a value that the text shows."""


def list_text(found: "list[Listed]", directory: Path | str) -> str:
    """Return a table of checkpoints."""
    if not found:
        return f"There are no checkpoints in {directory}."
    rows = [("step", "state", "size", "saved (UTC)", "layout", "after", "")]
    for each in found:
        rows.append(
            (
                f"{each.step:,}",
                each.state,
                byte_size(each.bytes),
                visible(each.created).replace("T", " ").removesuffix("+00:00"),
                layout_text(each.info.get("layout")) if each.state == "complete" else "-",
                visible(str(each.parent or "-")),
                each.reason and value_text(each.reason),
            )
        )
    states = [each.state for each in found]
    counts = ", ".join(f"{states.count(state):,} {state}" for state in dict.fromkeys(states))
    total = byte_size(sum(each.bytes for each in found))
    return "\n".join([*table(rows), f"{counts}; {total}, in {directory}"])


def describe(opened: "Opened") -> dict[str, Any]:
    """Return what a checkpoint says of itself and its tensors, as plain data."""
    from megatrain.checkpoint.compare import natural
    from megatrain.checkpoint.inspect import kind_of

    manifest, specs = opened.manifest, opened.reader.tensor_specs()
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": kind_of(name),
            "dtype": str(specs[name].dtype).removeprefix("torch."),
            "shape": list(specs[name].size),
            "bytes": specs[name].nbytes,
        }
        for name in sorted(specs, key=natural)
    ]
    totals: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        total = totals.setdefault(tensor["kind"], {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += math.prod(tensor["shape"])
        total["bytes"] += tensor["bytes"]
    return {
        "path": str(opened.path),
        "step": manifest.step,
        "created": manifest.created,
        "parent": manifest.parent,
        "format_version": manifest.format_version,
        "versions": manifest.versions,
        "info": manifest.info,
        "state": opened.state,
        "files": {name: record._asdict() for name, record in manifest.files.items()},
        "bytes": opened.bytes,
        "totals": totals,
        "tensors": tensors,
    }


def show_text(facts: dict[str, Any]) -> str:
    """Return what `describe` found as text."""
    from megatrain.checkpoint.compare import flat

    lines = [
        visible(str(facts["path"])),
        f"  step              {facts['step']:,}",
        f"  saved             {value_text(facts['created'])}",
        f"  after             {value_text(facts['parent'] or 'nothing: the first of its attempt')}",
        f"  size              {byte_size(facts['bytes'])} in {len(facts['files'])} files",
        f"  format            {facts['format_version']}",
        f"  written by        {', '.join(f'{value_text(k)} {value_text(v)}' for k, v in facts['versions'].items())}",
    ]
    for key, value in facts["info"].items():
        if key == "config":  # a hundred keys, which --json has and `config.yaml` shows
            continue
        shown = layout_text(value) if key == "layout" else value_text(value)
        if key != "layout" and isinstance(value, dict):
            shown = f"{len(list(flat(value))):,} values; --json has them"
        lines.append(f"  {value_text(key.replace('_', ' ')):<16}  {shown}")
    lines += ["", "State", *(f"  {_pair(*each)}" for each in flat(facts["state"])), "", "Totals"]
    rows = [("  kind", "tensors", "elements", "size")]
    for kind, total in facts["totals"].items():
        rows.append(
            (f"  {kind}", f"{total['tensors']:,}", f"{total['elements']:,}", byte_size(total["bytes"]))
        )
    lines += [*table(rows), "", "Tensors"]
    names = [("  name", "dtype", "shape", "size")]
    for tensor in facts["tensors"]:
        shape = " × ".join(map(str, tensor["shape"])) or "scalar"
        names.append((f"  {visible(tensor['name'])}", tensor["dtype"], shape, byte_size(tensor["bytes"])))
    return "\n".join([*lines, *table(names)])


def verify_text(found: "list[Verified]") -> str:
    """Return what reading every byte of checkpoints found."""
    lines = []
    for each in found:
        size = f", {byte_size(each.bytes)}" if each.state == "whole" else ""
        lines.append(f"{each.path}: {each.state}{size}")
        lines += [f"  {damage.file} {visible(damage.what)}" for damage in each.damages]
        lines += [f"  {visible(each.unknown)}"] if each.unknown else []
    if any(each.damages for each in found):
        lines.append(
            "Nothing was moved or changed. A run that resumes moves a damaged checkpoint to quarantine/ and takes the "
            "one before it."
        )
    return "\n".join(lines)


def comparison_text(found: "Comparison", a: str, b: str) -> str:
    """Return how two checkpoints differ."""
    lines = [f"a: {a}", f"b: {b}"]
    if found.equal:
        what = "bitwise equal" if not found.rtol else f"equal to {found.rtol:g}"
        more = f" ({found.ignored:,} not bitwise)" if found.ignored else ""
        lines.append(f"Equal: {found.tensors:,} tensors are {what}{more}.")
    lines += comparison_lines(found)
    if found.info:
        lines += ["Their manifests also say:", *_pair_lines(found.info)]
    return "\n".join(lines)


def comparison_lines(found: "Comparison") -> list[str]:
    """Return the lines about tensors and state that differ, none where they are equal."""
    lines = []
    if found.differences:
        first, largest = found.differences[0], found.largest
        assert largest is not None
        lines.append(f"{len(found.differences):,} of {found.tensors:,} tensors differ.")
        lines += [
            f"  first    {first.name}: {_at(first.first)}",
            f"  largest  {largest.name}: {_at(largest.largest)}",
        ]
        lines += table(
            [
                ("  tensor", "max abs", "relative", "elements that differ", "dtype"),
                *(_difference_row(each) for each in found.differences[:ROWS]),
            ]
        )
        if len(found.differences) > ROWS:
            lines.append(f"  and {len(found.differences) - ROWS:,} more; --json has all")
    lines += _listed("of other shapes", [f"{k}: {a} and {b}" for k, (a, b) in found.reshaped.items()])
    lines += _listed("only in a", found.only_a) + _listed("only in b", found.only_b)
    if found.state:
        lines += ["The state (state.json) differs:", *_pair_lines(found.state)]
    return lines


def comparison_json(found: "Comparison") -> dict[str, Any]:
    """Return a comparison as plain data."""
    largest = found.largest
    return {
        "equal": found.equal,
        "rtol": found.rtol,
        "tensors": found.tensors,
        "ignored": found.ignored,
        "first": found.differences[0].name if found.differences else None,
        "largest": None if largest is None else largest.name,
        "differences": [dataclasses.asdict(each) | {"relative": each.relative} for each in found.differences],
        "reshaped": found.reshaped,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "state": found.state,
        "info": found.info,
    }


def removals_text(removals: "list[Listed]", directory: Path | str, *, dry_run: bool) -> str:
    """Return what was removed, or would be."""
    if not removals:
        return f"There is nothing to remove in {directory}."
    done = "would be removed" if dry_run else "removed"
    lines = [
        f"{Path(each.path).name}  {byte_size(each.bytes):>8}  {done} ({each.state})" for each in removals
    ]
    freed = byte_size(sum(each.bytes for each in removals))
    lines.append(f"{freed} would be freed; leave out --dry-run to do it." if dry_run else f"{freed} freed.")
    return "\n".join(lines)


def layout_text(layout: Any) -> str:
    """Return a layout's degrees above 1 and the other values that a manifest lists, or that there is one process."""
    if not isinstance(layout, dict):
        return "-" if layout is None else value_text(layout)
    degrees = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    found = [f"{name}={value_text(layout[name])}" for name in degrees if layout.get(name, 1) != 1]
    return " ".join(found) or "one process"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out rows in columns; the last one takes what it needs."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _difference_row(each: "TensorDifference") -> tuple[str, ...]:
    count = f"{each.differing:,} of {each.elements:,}"
    return f"  {visible(each.name)}", f"{each.max_abs:.3g}", f"{each.relative:.3g}", count, each.dtype


def _at(element: "Element | None") -> str:
    if element is None:
        return "another dtype, equal values"
    place = ", ".join(map(str, element.index))
    return f"[{place}] is {element.a!r} and {element.b!r}"


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"  and {len(names) - ROWS:,} more; --json has all"] if len(names) > ROWS else []
    count = f"{len(names):,} tensor{'s' * (len(names) != 1)}"
    return [f"{count} {title}:", *(f"  {visible(name)}" for name in names[:ROWS]), *more]


def _pair_lines(pairs: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"  {value_text(key)}: {value_text(a)} and {value_text(b)}" for key, (a, b) in pairs.items()]


def _pair(key: str, value: Any) -> str:
    return f"{value_text(key)} {value_text(value)}" if key else value_text(value)


def value_text(value: Any) -> str:
    """Return a value of a file as text that can't harm a terminal, at most `WIDTH` characters of it."""
    text = visible(str(value)).replace("\n", "\\n")
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."
