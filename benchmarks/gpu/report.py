"""What the rows come to: shares of the floor, ratios to the best public implementation, aims; as JSON and Markdown."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import AUTO, aims, choices, is_ours, is_own
from benchmarks.gpu.steps import named
from benchmarks.gpu.supervise import Progress

Row = dict[str, Any]
PASSES = ("forward", "backward")
"""Shown; both together are in the JSON."""


def of_part(rows: list[Row], part: str) -> list[Row]:
    """Return the part's rows that have figures."""
    return [row for row in rows if row["part"] == part and row["error"] is None]


def failures(rows: list[Row]) -> list[Row]:
    """Return the rows of our steps that failed; public implementations may not take every case.

    What was not compiled ahead is compiled when it is timed, and fails there if it does.
    """
    return [row for row in rows if row["error"] is not None and is_ours(row) and row["part"] != "compiling"]


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
    others = [
        r
        for r in rows
        if (r["operation"], r["case"], r["passes"]) == key and not is_ours(r) and r.get("same_work", True)
    ]
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
        "choices": choices(timed),
        "not_whole": progress.cuts,
        "left_out": progress.left_out,
        "seconds": progress.seconds,
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
    """Format a Markdown table; `heads` are divided by commas, or by bars where there are any."""
    names = [head.strip() for head in heads.split("|" if "|" in heads else ",")]
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
        ("Left out", _left_out),
        ("Ceilings, measured", _ceilings),
        ("Peers that are not installed", _peers),
        ("Correctness", _correctness),
        ("Speed", _speed),
        ("Training", _training),
        ("Starting", _starting),
        ("Compiling", _compiling),
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
    if not found["aims"]:
        return ""
    rows = [
        [row["aim"], row["cases"], row["measured"], "not measured" if row["met"] is None else row["met"]]
        for row in found["aims"]
    ]
    text = "Of our own kernels alone, the worst case of those measured; what `auto` takes is not counted."
    return f"{text}\n\n{table('aim | cases | measured | met', rows)}"


def _left_out(found: Row) -> str:
    """Name every step that there was no time for."""
    lines = [f"- {part}: {'; '.join(names)}" for part, names in found["left_out"].items()]
    return "\n".join(lines)


def _peers(found: Row) -> str:
    rows = of_part(found["rows"], "peers")
    return (
        table("operation, implementation, state", _picked(rows, "operation", "implementation", "state"))
        if rows
        else ""
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
    candidates = sum(row["candidates"] for row in rows)
    right = len(rows) - len(wrong)
    text = f"{right} of {len(rows)} within their tolerances, in {candidates} candidates of tuning together."
    if not wrong:
        return text
    keys = ("operation", "case", "dtype", "backend", "worst", "off", "same_bits")
    heads = "operation, case, type, backend, worst, off (tolerances), same bits twice"
    return f"{text}\n\n{table(heads, _picked(wrong, *keys))}"


def _speed(found: Row) -> str:
    """List each case and pass by the fastest of our own kernels, and what "auto" takes beside it."""
    fastest: dict[tuple[str, ...], Row] = {}
    chosen = {(row["operation"], row["case"], row["passes"]): row for row in found["choices"]}
    for row in of_part(found["rows"], "speed"):
        key = (row["operation"], row["case"], row["passes"])
        # Where our kernel cannot run, as on a CPU, the choice is all there is.
        ours = is_own(row) or (row["implementation"] == AUTO and chosen[key]["own_ms"] is None)
        if ours and row["passes"] in PASSES and (key not in fastest or row["ms"] < fastest[key]["ms"]):
            fastest[key] = row
    if not fastest:
        return ""
    rows = sorted(
        (
            row | {"auto_ms": chosen.get(key, {}).get("ms"), "took": chosen.get(key, {}).get("took")}
            for key, row in fastest.items()
        ),
        key=lambda row: (row["operation"], row["case"], PASSES.index(row["passes"])),
    )
    keys = ("operation", "case", "passes", "implementation", "ms", "tflops", "gbps", "share", "best_public")
    heads = "operation, case, passes, ours, ms, TFLOP/s, GB/s, share of floor, best public"
    text = table(
        f"{heads}, times faster, auto ms, auto took", _picked(rows, *keys, "ratio", "auto_ms", "took")
    )
    return f'"auto took": the kernel that takes most of its time.\n\n{text}'


def _training(found: Row) -> str:
    rows = [row for row in of_part(found["rows"], "training") if "tokens_per_sec" in row]
    if not rows:
        return ""
    cfg = (
        "model",
        "layers",
        "precision",
        "scaling",
        "documents",
        "mean_document",
        "compiled",
        "seq_len",
        "micro",
        "whole",
    )
    figures = (
        "tokens_per_sec",
        "mfu_needed",
        "mfu_causal",
        "mfu_full",
        "peak_gib",
        "first_loss",
        "last_loss",
    )
    heads = (
        "model, layers, precision, fp8 scaling, documents, mean tokens of a document, compiled, seq_len, micro, global,"
        " tokens/s, MFU (what masks leave), MFU (causal), MFU (full), peak GiB, first loss, last loss"
    )
    return table(heads, _picked(rows, *cfg, *figures))


def _starting(found: Row) -> str:
    """Show the seconds to a first step, and how much a tiny model's step launches."""
    rows = [row for row in of_part(found["rows"], "training") if "measure" in row]
    keys = ("model", "measure", "cold_s", "warm_s", "launches", "step_time_s")
    heads = "model, measure, cold s, warm s, launches a step, s a step"
    return table(heads, _picked(rows, *keys)) if rows else ""


def _compiling(found: Row) -> str:
    """Say how much was compiled ahead of the timing, and in how long."""
    rows = of_part(found["rows"], "compiling")
    if not rows:
        return ""
    short = [row for row in rows if row["note"]]
    work = sum(row["seconds"] for row in rows)
    took = found["seconds"].get("compiling", 0.0)
    return f"{len(rows)} steps of {work:.0f} s together, in {took:.0f} s; memory was short in {len(short)}."


def _errors(found: Row) -> str:
    """List our errors; public implementations that cannot take a case are in the JSON only."""
    rows = [row for row in found["rows"] if row["error"] is not None and is_ours(row)]
    said = [
        [row["part"], named({k: v for k, v in row.items() if k not in ("error", "date")}), row["error"]]
        for row in rows
    ]
    return table("part, step, error", said) if rows else ""
