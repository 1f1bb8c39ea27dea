"""Files in which a guard leaves what it knows: logs/hang-*.txt, and status.json where the process can't write it."""

import contextlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from megatrain.runtime.guard.verdict import Call, Statement, Verdict

CALLS = 12
"""Calls of each rank that the report shows."""


def write_report(directory: str | None, verdict: Verdict, found: list[Statement]) -> Path | None:
    """Write the verdict, and what each rank was doing, to the run directory's logs; None: there is no directory yet."""
    if not directory:
        return None
    path = Path(directory) / "logs" / f"hang-{datetime.now(UTC):%Y%m%d-%H%M%S}.txt"
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "\n".join([verdict.sentence, "", *_table(found), *(_rank(each) for each in found)]) + "\n"
        )
        return path
    return None


def _table(found: list[Statement]) -> list[str]:
    """Return one line a channel in which the ranks do not agree."""
    numbers: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for each in found:
        for call in each.last:
            numbers.setdefault(call.key, {})[each.rank] = call.number
    lines = []
    for (name, ranks), by_rank in numbers.items():
        if len(set(by_rank.values())) > 1 or len(by_rank) < len(ranks):
            counts = ", ".join(f"rank {rank}: {by_rank.get(rank, 0)}" for rank in ranks)
            lines.append(f"Collectives begun in {name}: {counts}")
    return [*lines, ""] if lines else []


def _rank(each: Statement) -> str:
    waits = "" if each.waits_s is None else f", waiting for others for {each.waits_s:.1f} s"
    fate = f", {each.fate} {each.fate_age_s:.1f} s ago" if each.fate else ""
    lines = [
        f"Rank {each.rank} on {each.host}: phase '{each.phase}', step {each.step}, no progress for {each.age_s:.1f} s"
        f"{waits}{fate}, process state {each.state or 'unknown'}"
    ]
    if each.text:
        lines.append(f"  its error: {each.text}")
    lines += [f"  {call.age_s:8.2f} s ago: {_call(call)}" for call in each.recent[-CALLS:]]
    lines += [f"  {line}" for line in each.stack.splitlines()] or [
        "  (no stack: the process could not write it)"
    ]
    return "\n".join([*lines, ""])


def _call(call: Call) -> str:
    return f"{call} at {call.site}"


def write_status(directory: str | None, pid: int, reason: str) -> None:
    """Set status.json to failed, if it still says that the process `pid` is running."""
    if not directory:
        return
    path = Path(directory) / "status.json"
    with contextlib.suppress(OSError, ValueError):
        status = json.loads(path.read_text())
        if status.get("state") != "running" or status.get("pid") != pid:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        status |= {"state": "failed", "reason": f"StalledError: {reason}", "exit_code": 1, "time": now}
        partial = path.with_name(f".{path.name}.guard-{os.getpid()}-{time.monotonic_ns()}")
        partial.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(partial, path)
