"""`megatrain bench --multirun`: measure every combination, each in a new process, and compare them in a table."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatrain.cli.compose import Source, compose
from megatrain.cli.sweep import differing, expand, job_command, short, table
from megatrain.config.errors import UserError
from megatrain.config.schema import ConfigError
from megatrain.runtime.launch import passing_signals

INTERRUPTED = 130


@dataclass
class Measurement:
    """One combination of a sweep, and what came of it."""

    overrides: list[str]
    differs: dict[str, str]
    """Swept key -> value."""
    exit_code: int | None = None
    """None: not started."""
    reason: str = ""
    """Why there is no result."""
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    ratio: float | None = None
    """Tokens/s over those of the first combination that was measured."""


def run_measurements(
    overrides: list[str], source: Source, flags: list[str], *, as_json: bool, trace: str | None
) -> int:
    """Measure one combination after another and print how they compare; 0 only if all were measured.

    A combination that is refused, or that fails, is a row with its reason, and the others go on.

    Args:
        flags: those of `bench` for each measurement. trace: directory that gets a folder of traces for each.

    Raises:
        UserError: an override is not one, or can't be swept.
    """
    combinations, swept = expand(overrides, source)
    found = [Measurement(lines, differing(lines, swept)) for lines in combinations]
    out = sys.stderr if as_json else sys.stdout
    for index, each in enumerate(found):
        print(f"[{index + 1}/{len(found)}] {short(each.differs) or 'as it is'}", file=out, flush=True)
        traced = [] if trace is None else [f"--trace={Path(trace) / str(index)}"]
        _measure(each, source, [*flags, *traced])
        if each.reason:
            print(f"  {each.reason}", file=out, flush=True)
        if each.exit_code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            break
    rates = [_rate(each) for each in found]
    first = next((rate for rate in rates if rate is not None), None)
    for each, rate in zip(found, rates, strict=True):
        each.ratio = None if rate is None or first is None else rate / first
    print(_as_json(found) if as_json else "\n" + _as_text(found))
    codes = [INTERRUPTED if each.exit_code is None else abs(each.exit_code) for each in found]
    return next((code for code in codes if code), 0)


def _measure(each: Measurement, source: Source, flags: list[str]) -> None:
    """Run one measurement in a new process, whose messages are passed on as they come."""
    try:
        compose(each.overrides, source)
    except UserError as error:
        problems = error.problems if isinstance(error, ConfigError) else [error]
        each.exit_code, each.reason = error.exit_code, " ".join(map(str, problems))
        return
    started = time.monotonic()
    command = [*job_command("bench", each.overrides, source), "--json", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        messages: list[str] = []
        reader = threading.Thread(target=_pass_on, args=(child.stderr, messages), daemon=True)
        reader.start()
        with passing_signals([child]):
            printed = child.stdout.read()
            each.exit_code = child.wait()
        reader.join(timeout=5)
    each.seconds = time.monotonic() - started
    if each.exit_code == 0:
        each.result = json.loads(printed)
    else:
        each.reason = _reason(each.exit_code, messages)


def _pass_on(stream: IO[bytes], messages: list[str]) -> None:
    for line in stream:
        messages.append(line.decode(errors="replace").rstrip())
        print(messages[-1], file=sys.stderr, flush=True)


def _reason(code: int, messages: list[str]) -> str:
    """Return why a measurement failed: its first message, or what its exit code says."""
    said = [line for line in messages if line.startswith("megatrain: ")]
    if said:
        return said[0].removeprefix("megatrain: ")
    if abs(code) in (signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed (SIGKILL), as a system does that is out of memory"
    lines = [line for line in messages if line]
    return f"exit code {code}: {lines[-1] if lines else 'nothing was printed'}"


def _rate(each: Measurement) -> float | None:
    return None if each.result is None else each.result["rates"]["perf/tokens_per_sec"]


def _as_json(found: list[Measurement]) -> str:
    return json.dumps({"measurements": [asdict(each) for each in found]}, indent=1)


def _as_text(found: list[Measurement]) -> str:
    """Return the table, and below it what MFU is a share of and why measurements failed."""
    rows, below = [], []
    for each in found:
        name = short(each.differs) or "as it is"
        if each.result is None:
            failed = (
                "refused" if each.exit_code == UserError.exit_code else f"failed, exit code {each.exit_code}"
            )
            rows.append(("-",) * 6 + (f"{name} ({'not started' if each.exit_code is None else failed})",))
            below += [f"{name}: {each.reason}"] if each.reason else []
            continue
        result, rates = each.result, each.result["rates"]
        low, high = result["spread_s"]
        rows.append(
            (
                f"{rates['perf/tokens_per_sec']:,.0f}",
                f"{each.ratio:.2f}",
                f"{result['step_time_s'] * 1e3:.1f}",
                f"{low * 1e3:.1f}-{high * 1e3:.1f}",
                f"{rates['perf/mfu']:.1%}" if "perf/mfu" in rates else "-",
                f"{result['peak_memory_gib']:.2f}",
                name,
            )
        )
        below += [_peak_line(result)] if result["peak"] is not None else []
    head = ("tokens/s", "ratio", "step ms", "spread", "MFU", "GiB", "what differs")
    return "\n".join([table(head, rows), *dict.fromkeys(below), *_note_lines(found)])


def _note_lines(found: list[Measurement]) -> list[str]:
    """Return each note with the measurements that it applies to."""
    where: dict[str, list[str]] = {}
    measured = [each for each in found if each.result is not None]
    for each in measured:
        for note in each.result["notes"] if each.result is not None else ():
            where.setdefault(note, []).append(short(each.differs))
    lines = []
    for note, names in where.items():
        which = "" if len(names) == len(measured) else f" ({'; '.join(names)})"
        lines.append(f"Note{which}: {note}.")
    return lines


def _peak_line(result: dict[str, Any]) -> str:
    peak = result["peak"]
    return (
        f"MFU: {result['flop_convention']['perf/mfu']}; a share of {peak['flops_per_s'] / 1e12:.3g} TFLOP/s a process, "
        f"{peak['source']}."
    )
