"""What `megatrain verify` shows: a table that grows, the run that is going on, the result in words, and as JSON."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatrain.parallel.layout import world_size
from megatrain.train.candidates import Candidate
from megatrain.train.faults import FAULTS

if TYPE_CHECKING:
    from megatrain.train.verify import Check, Verdict

WORDS = {"wrong": "WRONG", "failed": "FAILED", "missed": "MISSED"}
REASON = 160
"""Most characters of a reason in the table; JSON has all."""


class Table:
    """Printer of one check's verdicts, in columns as wide as the longest layout needs."""

    def __init__(self, check: "Check") -> None:
        self.check = check
        self.runs = len(check.plan())
        self.done = 0
        self.began = time.monotonic()
        faults = [len(name) + 2 for name in check.faults]
        self.width = max(6, *(len(each.label) for each in check.candidates), *faults)
        self._unreached: list[str] = []
        self._is_live = _is_terminal()

    def begin(self) -> None:
        """Print what is compared with what, and the head of the table."""
        small, check = self.check.small, self.check
        model = small.model
        sizes = [f"{model.n_layers} layers", f"{model.n_heads} heads", f"{model.kv_heads} key-value heads"]
        if model.experts is not None:
            sizes.append(f"{model.experts.n_experts} experts")
        print(
            f"{model.kind}, shrunk ({', '.join(sizes)}, ffn_size {model.ffn_size}, vocabulary {model.vocab_size}; "
            f"sizes divide as the real ones do), seed {small.train.seed}."
        )
        from megatrain.train.verify import BOUND, FACTOR

        print(
            f"Errors are relative to one process in float64. equal: at most {BOUND:g}; alike: in a lower precision, at "
            f"most {FACTOR:g} times those of one process in it."
        )
        if check.faults:
            print("Indented: what came of the layout with a fault planted in it.")
        head = f"{'layout':{self.width}s}  precision     loss     norm  gradient    weight  samples  start   verdict"
        print(head, flush=True)

    def progress(self, label: str) -> None:
        """Show on a terminal which run is going on."""
        self.done += 1
        if self._is_live:
            elapsed = time.monotonic() - self.began
            text = f"[{self.done}/{self.runs}] {label}  {elapsed:.0f} s elapsed"
            print(f"\r\x1b[K{text[: _columns() - 1]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the line of progress."""
        if self._is_live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def row(self, verdict: "Verdict") -> None:
        """Print one verdict; the faults that can't reach a layout share a line."""
        self.clear()
        if verdict.outcome == "cannot reach it":
            self._unreached.append(verdict.fault)
            return
        if not verdict.fault:
            self.flush()
        name = f"  {verdict.fault}" if verdict.fault else verdict.candidate.label
        print(f"{name:{self.width}s}  {_figures(verdict)}  {_words(verdict)}", flush=True)

    def flush(self) -> None:
        """Print the faults that could not reach the layout above."""
        if self._unreached:
            print(f"  cannot reach it: {', '.join(self._unreached)}", flush=True)
            self._unreached = []

    def end(self, verdicts: Sequence["Verdict"], seconds: float) -> None:
        """Print the result in words."""
        self.flush()
        print("\n".join([*_fault_lines(verdicts, self.check.faults), _summary(verdicts, seconds)]))


def _figures(verdict: "Verdict") -> str:
    """Return the columns between a verdict's name and its words."""
    if verdict.outcome == "not tried":
        return f"{'':9s}{'':9s}{'':9s}{'':10s}{'':10s}  {'':7s}  {'':6s}"
    errors = verdict.errors
    if errors is None:
        return f"{verdict.precision:9s}{'-':>9s}{'-':>9s}{'-':>10s}{'-':>10s}  {'-':7s}  {'-':6s}"
    loss, norm, gradient, weight = errors.sizes
    same = ["same" if each else "DIFFER" for each in (errors.same_samples, errors.same_start)]
    return f"{verdict.precision:9s}{loss:9.1e}{norm:9.1e}{gradient:10.1e}{weight:10.1e}  {same[0]:7s}  {same[1]:6s}"


def _words(verdict: "Verdict") -> str:
    """Return the verdict with its reason."""
    word = WORDS.get(verdict.outcome, verdict.outcome)
    if word == "equal" and verdict.precision != "fp64":
        word = "alike"
    reasons = [_last_line(verdict.reason), "" if verdict.fault else verdict.candidate.note]
    said = "; ".join(reason for reason in reasons if reason)
    return f"{word}: {said}" if said else word


def _last_line(text: str) -> str:
    """Return the line of an error's traceback that says what happened."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last if len(last) <= REASON else f"{last[: REASON - 3]}..."


def _fault_lines(verdicts: Sequence["Verdict"], faults: Sequence[str]) -> list[str]:
    """Return how often each fault was caught."""
    found = []
    for fault in faults:
        of_it = [
            each.outcome for each in verdicts if each.fault == fault and each.outcome != "cannot reach it"
        ]
        caught = of_it.count("caught")
        what = f"caught in {caught} of the {len(of_it)} layouts" if of_it else "none of the layouts is one"
        found.append(f"{fault}: {what} that it can reach ({FAULTS[fault].rule})")
    return found


def _summary(verdicts: Sequence["Verdict"], seconds: float) -> str:
    """Return the last line: how many layouts were equal, and which were not, or were not tried."""
    by_label: dict[str, list[Verdict]] = {}
    for each in verdicts:
        if not each.fault:
            by_label.setdefault(each.candidate.label, []).append(each)
    groups: dict[str, list[str]] = {"equal": [], "wrong": [], "failed": [], "not tried": []}
    for label, of_it in by_label.items():
        outcomes = [each.outcome for each in of_it]
        outcome = next((each for each in ("failed", "wrong") if each in outcomes), outcomes[0])
        why = f": {_last_line(of_it[0].reason)}" if outcome == "not tried" else ""
        groups[outcome].append(label + why)
    parts = [f"{len(groups['equal'])} equal"]
    for outcome in ("wrong", "failed", "not tried"):
        if groups[outcome]:
            listed = "; ".join(groups[outcome])
            parts.append(f"{len(groups[outcome])} {WORDS.get(outcome, outcome)} ({listed})")
    faulty = [each for each in verdicts if each.fault and each.outcome != "cannot reach it"]
    if faulty:
        caught = sum(each.outcome == "caught" for each in faulty)
        parts.append(f"{caught} of {len(faulty)} planted faults caught")
    layouts = f"{len(by_label)} layout{'s' * (len(by_label) != 1)}"
    return f"{layouts}: {', '.join(parts)}. {seconds:.0f} s."


def as_json(check: "Check", verdicts: Sequence["Verdict"], *, exit_code: int, seconds: float) -> str:
    """Return everything as one JSON object."""
    model = check.small.model
    sizes = ("kind", "n_layers", "n_heads", "kv_heads", "ffn_size", "vocab_size")
    shrunk = {name: getattr(model, name) for name in sizes}
    if model.experts is not None:
        shrunk["n_experts"] = model.experts.n_experts
    return json.dumps(
        {
            "shrunk_model": shrunk,
            "seed": check.small.train.seed,
            "results": [_entry(each) for each in verdicts],
            "exit_code": exit_code,
            "seconds": round(seconds, 1),
        },
        indent=1,
    )


def _entry(verdict: "Verdict") -> dict[str, Any]:
    candidate: Candidate = verdict.candidate
    return {
        "layout": candidate.label,
        "processes": world_size(candidate.layout),
        "asked_for": candidate.asked,
        "note": candidate.note or None,
        "fault": verdict.fault or None,
        "precision": verdict.precision,
        "outcome": verdict.outcome,
        "reason": verdict.reason or None,
        "errors": None if verdict.errors is None else _finite(dataclasses.asdict(verdict.errors)),
        "bounds": dict(zip(("loss", "grad_norm", "gradient", "weight"), verdict.bounds, strict=True)),
        "seconds": round(verdict.seconds, 1),
    }


def _finite(value: Any) -> Any:
    """Return `value` with null in place of infinite errors, which JSON can't say."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except ValueError:  # closed
        return False


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
