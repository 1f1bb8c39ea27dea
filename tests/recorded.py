"""Run directories as a run writes them, without the run: rows, events, status and config made up with a seed."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

Fields = dict[str, object]
SEED = 7
MARKUP = "<script>document.title='owned'</script>\"'&<img src=x onerror=\"document.title='owned'\">"
"""A text that acts where it is not escaped."""
CONFIG = "run:\n  name: {name}\nmodel:\n  kind: qwen3\n  n_layers: 4\noptim:\n  lr: {lr}\ntrain:\n  steps: {steps}\n"


def row(step: int, loss: float | None, **more: object) -> Fields:
    """One row of metrics.jsonl."""
    return {
        "step": step,
        "train/loss": loss,
        "train/grad_norm": 0.5 + 4 / step,
        "train/lr": 1e-3,
        "train/tokens": step * 2048,
        "data/sample_digest": "00",
        "perf/step_time_s": 0.25,
        "perf/data_time_s": 0.005,
        "perf/tokens_per_sec": 8000.0 + step,
        "perf/mfu": 0.125,
        "memory/peak_gib": 0.5,
        **more,
    }


def rows(steps: int, *, evals: bool = True, bad: Sequence[int] = ()) -> list[Fields]:
    """The rows of a run that learns, with a validation every 20 steps; at the steps `bad` the loss is not finite."""
    draw = random.Random(SEED)
    found = []
    for step in range(1, steps + 1):
        loss = 2 + 6 * 0.97**step + draw.gauss(0, 0.1)
        more: Fields = (
            {"eval/loss": loss + 0.2, "eval/bits_per_byte": loss / 3} if evals and step % 20 == 0 else {}
        )
        found.append(row(step, None if step in bad else loss, **more))
    return found


def write(
    directory: Path,
    table: Iterable[Fields],
    *,
    events: Iterable[Fields] = (),
    status: Fields | None = None,
    config: str | None = None,
    torn: str = "",
) -> Path:
    """Write a run directory and return it; `torn` is what a killed process left of its last row."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in table) + torn)
    (directory / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    if status is not None:
        (directory / "status.json").write_text(json.dumps(status))
    if config is None:
        config = CONFIG.format(name=directory.name, lr=1e-3, steps=200)
    (directory / "config.yaml").write_text(config)
    return directory
