"""What the rows come to: shares of the floor, ratios to the best public implementation, aims; as JSON and Markdown."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import aims, is_ours
from benchmarks.gpu.supervise import Progress

Row = dict[str, Any]
PASSES = ("forward", "backward")
"""Shown; both together are in the JSON."""


def of_part(rows: list[Row], part: str) -> list[Row]:
    """Return the part's rows that have figures."""
    return [row for row in rows if row["part"] == part and row["error"] is None]


def failures(rows: list[Row]) -> list[Row]:
    """Return the rows of our steps that failed; public implementations may not take every case."""
    return [row for row in rows if row["error"] is not None and is_ours(row)]


def ceilings(rows: list[Row]) -> dict[str, float]:
    """Return the best rates measured: bytes/s under "copy", FLOP/s under each type of products."""
    best: dict[str, float] = {}
    for row in of_part(rows, "ceilings"):
        rate = row["gbps"] * 1e9 if row["ceiling"] == "copy" else row["tflops"] * 1e12
        best[row["ceiling"]] = max(best.get(row["ceiling"], 0.0), rate)
    return best


def speeds(rows: list[Row]) -> list[Row]:
    """Return the rows of speed and, from pairs of them, of the backward pass; each with rates, floor and ratio."""
    measured = of_part(rows, "speed")
    forward = {_who(row): row for row in measured if row["passes"] == "forward"}
    found = list(measured)
    for row in measured:
        alone = forward.get(_who(row))
        if row["passes"] == "both" and alone and row["ms"] > alone["ms"]:
            rest = {key: row[key] - alone[key] for key in ("ms", "flops", "bytes")}
            found.append({**row, **rest, "passes": "backward"})
    known, found = ceilings(rows), [row | _rates(row) for row in found]
    return [row | _floor(row, known) | _ratio(row, found) for row in found]


def _who(row: Row) -> tuple[str, str, str]:
    return row["operation"], row["case"], row["implementation"]


def _rates(row: Row) -> Row:
    return {"tflops": row["flops"] / row["ms"] / 1e9, "gbps": row["bytes"] / row["ms"] / 1e6}


def _floor(row: Row, known: dict[str, float]) -> Row:
    """Compute the least time that the ceilings allow, and its share of the time taken."""
    if "copy" not in known or row["ceiling"] not in known:
        return {"floor_ms": None, "share": None, "bound": None}
    memory, products = row["bytes"] / known["copy"], row["flops"] / known[row["ceiling"]]
    floor = 1e3 * max(memory, products)
    return {
        "floor_ms": floor,
        "share": floor / row["ms"],
        "bound": "memory" if memory > products else "products",
    }


def _ratio(row: Row, rows: list[Row]) -> Row:
    """Compute how many times faster a row is than the best public implementation of the same work."""
    key = (row["operation"], row["case"], row["passes"])
    others = [r for r in rows if (r["operation"], r["case"], r["passes"]) == key and not is_ours(r)]
    if not is_ours(row) or not others:
        return {}
    best = min(others, key=lambda other: other["ms"])
    return {"best_public": best["implementation"], "public_ms": best["ms"], "ratio": best["ms"] / row["ms"]}


def summary(progress: Progress, about: Row) -> Row:
    """Collect all that is known, for JSON. Small shapes say nothing about aims."""
    plain = [row for row in progress.rows if row["part"] != "speed" or row["error"] is not None]
    timed, small = speeds(progress.rows), progress.machine.get("small")
    return {
        **about,
        "machine": progress.machine,
        "ceilings": ceilings(progress.rows),
        "aims": [] if small else aims(timed, of_part(progress.rows, "training")),
        "not_whole": progress.cuts,
        "rows": plain + timed,
    }


def save(progress: Progress, about: Row, folder: Path) -> None:
    """Write gpu.json and gpu.md, each in one piece."""
    found = summary(progress, about)
    for name, text in (("gpu.json", json.dumps(found, indent=1)), ("gpu.md", markdown(found))):
        partial = folder / f".{name}"
        partial.write_text(text + "\n")
        partial.replace(folder / name)


def shown(value: object) -> str:
    """Format a figure with three digits, and a word as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def table(heads: str, rows: Iterable[Iterable[object]]) -> str:
    """Format a Markdown table; `heads` are divided by commas."""
    names = [head.strip() for head in heads.split(",")]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(map(shown, row)) + " |" for row in rows]
    return "\n".join(lines)


def _picked(rows: list[Row], *keys: str) -> list[list[object]]:
    return [[row.get(key) for key in keys] for row in rows]


def markdown(found: Row) -> str:
    """Format the tables as Markdown."""
    machine = found["machine"]
    versions = ", ".join(
        f"{name} {machine.get(name) or 'none'}" for name in ("driver", "torch", "triton", "python")
    )
    parts: list[tuple[str, Callable[[Row], str]]] = [
        ("Aims", _aims),
        ("Ceilings, measured", _ceilings),
        ("Correctness", _correctness),
        ("Speed", _speed),
        ("Training", _training),
        ("Errors", _errors),
    ]
    head = [
        f"# {machine.get('device')}, {found['date']}",
        "",
        f"{versions}; commit {machine.get('commit')}",
        "",
    ]
    head += [f"`{found['command']}`", ""]
    if machine.get("small"):
        head += ["Small shapes: the figures show that the benchmark runs, and nothing else.", ""]
    head += [f"Not whole: {part}: {why}." for part, why in found["not_whole"].items()]
    return "\n".join(head + [f"\n## {title}\n\n{text}" for title, part in parts if (text := part(found))])


def _aims(found: Row) -> str:
    return (
        table("aim, measured, met", _picked(found["aims"], "aim", "measured", "met")) if found["aims"] else ""
    )


def _ceilings(found: Row) -> str:
    rows = [[name, rate / (1e9 if name == "copy" else 1e12)] for name, rate in found["ceilings"].items()]
    return table("what, GB/s or TFLOP/s", rows) if rows else ""


def _correctness(found: Row) -> str:
    """Say how many results are right, and list those that are not."""
    rows = of_part(found["rows"], "correctness")
    if not rows:
        return ""
    wrong = [row for row in rows if not row["right"]]
    text = f"{len(rows) - len(wrong)} of {len(rows)} within their tolerances."
    if not wrong:
        return text
    keys = ("operation", "case", "dtype", "backend", "worst", "off")
    heads = "operation, case, type, backend, worst, off (tolerances)"
    return f"{text}\n\n{table(heads, _picked(wrong, *keys))}"


def _speed(found: Row) -> str:
    """List each case and pass by the fastest of our backends."""
    fastest: dict[tuple[str, ...], Row] = {}
    for row in of_part(found["rows"], "speed"):
        key = (row["operation"], row["case"], row["passes"])
        shown_here = is_ours(row) and row["passes"] in PASSES
        if shown_here and (key not in fastest or row["ms"] < fastest[key]["ms"]):
            fastest[key] = row
    if not fastest:
        return ""
    rows = sorted(
        fastest.values(), key=lambda row: (row["operation"], row["case"], PASSES.index(row["passes"]))
    )
    keys = (
        "operation",
        "case",
        "passes",
        "implementation",
        "ms",
        "tflops",
        "gbps",
        "share",
        "best_public",
        "ratio",
    )
    heads = "operation, case, passes, ours, ms, TFLOP/s, GB/s, share of floor, best public, times faster"
    return table(heads, _picked(rows, *keys))


def _training(found: Row) -> str:
    rows = of_part(found["rows"], "training")
    if not rows:
        return ""
    cfg = ("model", "layers", "precision", "compiled", "seq_len", "micro", "whole")
    figures = ("tokens_per_sec", "mfu_full", "mfu_causal", "peak_gib", "first_loss", "last_loss")
    heads = "model, layers, precision, compiled, seq_len, micro, global, tokens/s, MFU (full), MFU (causal), peak GiB"
    return table(heads + ", first loss, last loss", _picked(rows, *cfg, *figures))


def _errors(found: Row) -> str:
    """List our errors; public implementations that cannot take a case are in the JSON only."""
    rows = failures(found["rows"])
    names = ("part", "error", "date")
    said = [
        [row["part"], " ".join(str(v) for k, v in row.items() if k not in names), row["error"]]
        for row in rows
    ]
    return table("part, step, error", said) if rows else ""
