"""The events of a run in words, and its samples of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatrain.observe.figures import visible
from megatrain.observe.report.record import Event, Record

SHOWN = 300
"""Most events of a run on the page; of more, the first and the last ones."""
SAMPLES = 12
SAMPLE_CHARS = 4000
WARNING, ERROR = "warning", "error"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the history: `kind` is `warning`, `error` or empty."""

    time: str
    step: str
    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model wrote at a step, as it can be read: a text without a visible character is spelled out."""

    step: int
    prompt: str
    text: str


def history(record: Record) -> list[Entry]:
    """Return the events of the run in order; saves in a row are one entry, samples have their own section."""
    entries: list[Entry] = []
    told = (event for event in record.events if event.get("event") != "sample")
    for name, group in groupby(told, key=lambda event: event.get("event")):
        events = list(group)
        entries += [_saves(events)] if name == "save" else [_entry(event) for event in events]
    if len(entries) <= SHOWN:
        return entries
    left_out = Entry("", "", f"{len(entries) - SHOWN:,} entries are not shown; see events.jsonl")
    return [*entries[: SHOWN // 2], left_out, *entries[-SHOWN // 2 :]]


def samples(record: Record) -> tuple[list[Sample], int]:
    """Return up to `SAMPLES` samples of text spread over the run, first and last included, and how many there are.

    As in metrics, what a resumed attempt wrote replaces what was written at that step or later.
    """
    found: dict[int, Sample] = {}
    for event in record.events:
        step, text = event.get("step"), event.get("text")
        if event.get("event") == "sample" and isinstance(step, int) and isinstance(text, str):
            found = {before: sample for before, sample in found.items() if before < step}
            found[step] = Sample(step, str(event.get("prompt") or ""), visible(text[:SAMPLE_CHARS]))
    every = list(found.values())
    last = len(every) - 1
    places = range(last + 1) if last < SAMPLES else [round(n * last / (SAMPLES - 1)) for n in range(SAMPLES)]
    return [every[place] for place in places], len(every)


def resumed_at(record: Record) -> list[int]:
    """Return the steps at which later attempts began."""
    return list(_steps_of(record.events, "resume"))


def _steps_of(events: list[Event], name: str) -> Iterator[int]:
    for event in events:
        step = event.get("step")
        if event.get("event") == name and isinstance(step, int):
            yield step


def _saves(events: list[Event]) -> Entry:
    steps = list(_steps_of(events, "save"))
    if len(events) == 1 or not steps:
        return Entry(_time(events[-1]), _step(events[-1]), "Checkpoint saved")
    return Entry(
        _time(events[-1]),
        _step(events[-1]),
        f"{len(events):,} checkpoints saved, the first at step {steps[0]:,}",
    )


def _entry(event: Event) -> Entry:
    name = str(event.get("event", "?"))
    text, kind = _in_words(name, event)
    return Entry(_time(event), _step(event), text, kind)


def _data(event: Event) -> str:
    """Say what was read, and what was left out."""
    groups = [group for group in event.get("left_out") or () if isinstance(group, dict)]
    left_out = ", ".join(
        f"{group.get('count')} {group.get('unit')}{'s' * (group.get('count') != 1)} ({group.get('reason')})"
        for group in groups
    )
    said = f"Read {event.get('documents')} documents of {event.get('origin')}"
    return f"{said}; left out: {left_out}" if left_out else said


def _in_words(name: str, event: Event) -> tuple[str, str]:
    if name == "start":
        return f"Started{_where(event)}", ""
    if name == "resume":
        changes = event.get("changes")
        changed = f"; changed: {_changes(changes)}" if isinstance(changes, dict) and changes else ""
        return f"Resumed{_where(event)}{changed}", ""
    if name == "stop":
        words = {"done": "Finished", "early stop": "Finished early: the validation loss stopped improving"}
        reason = str(event.get("reason", ""))
        by = "at stop_at" if reason == "stop_at" else f"by {reason}"
        return words.get(reason, f"Stopped {by}, with everything saved"), ""
    if name == "data":
        return _data(event), ""
    if name == "failure":
        return f"Failed: {event.get('error', '')}", ERROR
    if name == "notice":
        return str(event.get("text", "")), WARNING
    if name == "import":
        return f"Imported from {event.get('source', '?')}", ""
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "attempt", "step")}
    return f"{name}: {', '.join(f'{key} {value}' for key, value in rest.items())}", ""


def _where(event: Event) -> str:
    """Return on which machine an attempt runs, as far as the event says."""
    machine = event.get("machine")
    if not isinstance(machine, dict):
        return ""
    processes = machine.get("processes")
    many = f", {processes} processes" if isinstance(processes, int) and processes > 1 else ""
    return f" on {machine.get('host', '?')} ({machine.get('device', '?')}{many})"


def _changes(changes: dict[str, Any]) -> str:
    parts = []
    for key, pair in changes.items():
        was, now = pair if isinstance(pair, list) and len(pair) == 2 else ("?", pair)
        parts.append(f"{key} from {was} to {now}")
    return ", ".join(parts)


def _time(event: Event) -> str:
    """Return the event's time to the second; UTC, as events.jsonl has it."""
    return str(event.get("time", ""))[:19].replace("T", " ")


def _step(event: Event) -> str:
    step = event.get("step")
    return f"{step:,}" if isinstance(step, int) else ""
