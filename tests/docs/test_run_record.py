"""The page of a run's record names exactly what the code writes: every metric, event and status field."""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from megatrain.cli.main import main

ROOT = Path(__file__).parents[2]
TINY = (
    "data.path=my.txt", "data.tokenizer.kind=bytes", "model.n_layers=1", "model.hidden_size=32", "model.n_heads=2",
    "model.ffn_size=64", "model.vocab_size=260", "seq_len=32", "global_batch_size=2", "micro_batch_size=2",
    "train.steps=4", "train.eval_every=2", "train.eval_tokens=64", "train.sample_tokens=4", "train.precision=fp32",
    "schedule.warmup_steps=0", "checkpoint.every=1", "log.wandb=off", "log.display=off",
)  # fmt: skip
Row = dict[str, object]


def documented(section: str) -> dict[str, str]:
    """Return the first column of the table below `## section`, and for each name the rest of its row."""
    page = (ROOT / "docs" / "run-record.md").read_text(encoding="utf-8")
    text = page.split(f"## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was stopped, resumed and finished, and whose last attempt found something wrong."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "my.txt").write_text("".join(f"Line {n}: {n * n}.\n" for n in range(400)))
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setenv("MEGATRAIN_CACHE", str(folder / "cache"))
        assert main(["train", *TINY, "train.stop_at=2"]) == 0
        assert main(["train", *TINY]) == 0
        yield folder / "runs" / "default"


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_is_documented_and_written(run: Path) -> None:
    written = {key for row in rows(run / "metrics.jsonl") for key in row}
    assert written == documented("metrics.jsonl").keys()


def test_every_status_field_is_documented_and_written(run: Path) -> None:
    assert json.loads((run / "status.json").read_text()).keys() == documented("status.json").keys()


def test_every_event_is_documented(run: Path) -> None:
    assert events_in_source() == documented("events.jsonl").keys()


def test_fields_of_events_are_those_documented(run: Path) -> None:
    table = documented("events.jsonl")
    seen = set()
    for event in rows(run / "events.jsonl"):
        fields = event.keys() - {"time", "event", "attempt", "run_id"}
        name = str(event["event"])
        assert fields == set(re.findall(r"`(\w+)`", table[name].split("|")[0])), name
        seen.add(name)
    assert seen == {"start", "data", "resume", "sample", "save", "stop"}


def events_in_source() -> set[str]:
    """Return the names that the code passes to `.event(...)`."""
    found: set[str] = set()
    for path in (ROOT / "megatrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "event":
                found |= {each.value for each in ast.walk(node.args[0]) if is_name(each)}  # type: ignore[attr-defined]
    return found


def is_name(node: ast.AST) -> bool:
    """Whether `node` is a literal text."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
