"""The report's reader, its thinning and its words; how the page behaves in a browser is in tests/e2e."""

import fcntl
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import recorded

from megatrain.cli.main import main
from megatrain.observe.figures import visible
from megatrain.observe.report import metrics as metrics_module
from megatrain.observe.report.events import history, samples
from megatrain.observe.report.figures import duration, figures_of
from megatrain.observe.report.metrics import read_metrics
from megatrain.observe.report.page import report
from megatrain.observe.report.record import read_record
from megatrain.observe.report.thin import thin


def reference(path: Path) -> dict[float, dict[str, object]]:
    """The rows by step as the definition says: a row removes those of its step and of later ones."""
    found: dict[float, dict[str, object]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found = {step: each for step, each in found.items() if step < row["step"]} | {row["step"]: row}
    return found


@pytest.mark.parametrize("chunk", [200, 3000, 8 << 20])
@pytest.mark.parametrize("bad", [(), (5, 6, 41)])
def test_rows_are_those_that_the_definition_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, bad: tuple[int, ...]
) -> None:
    """Rows done again after a resume, a torn end, absent and non-finite values, in chunks of every size."""
    monkeypatch.setattr(metrics_module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(metrics_module, "FAST_FROM", 0)
    first = recorded.rows(60, bad=bad)
    again = [recorded.row(step, 1.5, **{"new/key": step}) for step in range(31, 50)]
    directory = recorded.write(tmp_path / "run", [*first, *again], torn='{"step": 50, "train/lo')
    path = directory / "metrics.jsonl"
    found, expected = read_metrics(path), reference(path)
    assert found.steps.tolist() == list(expected)
    assert found.torn == 1
    for key in ("train/loss", "eval/loss", "new/key"):
        steps, values = found.series(key)
        wanted = {step: row[key] for step, row in expected.items() if key in row}
        assert steps.tolist() == list(wanted)
        assert values.tolist() == [math.inf if value is None else value for value in wanted.values()]
    assert "data/sample_digest" not in found.columns


def test_numbers_that_are_not_json_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": -Infinity}\n{"step": 3, "a": true}\n'
    )
    steps, values = read_metrics(path).series("train/loss")
    assert steps.tolist() == [1, 2]
    assert np.isinf(values).all()


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 5000])
def test_no_peak_and_no_value_that_is_not_finite_vanishes(count: int) -> None:
    draw = random.Random(recorded.SEED)
    values = np.array([draw.gauss(0, 1) for _ in range(count)])
    bad = [draw.randrange(count)] if count > 2 else []
    values[bad] = math.inf
    steps = np.arange(1.0, count + 1) * 10
    found = thin(steps, values, buckets=100)
    assert len(found["x"]) <= 302
    assert found["x"] == sorted(found["x"])
    assert (found["bad"], found["bad_x"]) == (len(bad), [float(steps[each]) for each in bad])
    assert found["y"].count(None) == len(bad)
    drawn = [value for value in found["y"] if value is not None]
    finite = values[np.isfinite(values)]
    assert min(drawn) == pytest.approx(finite.min(), rel=1e-5)
    assert max(drawn) == pytest.approx(finite.max(), rel=1e-5)
    if "mean_y" in found:
        assert np.mean(found["mean_y"]) == pytest.approx(finite.mean(), abs=0.01)


def test_a_series_without_any_finite_value_is_still_a_series() -> None:
    found = thin(np.arange(1000.0), np.full(1000, math.inf), buckets=10)
    assert set(found["y"]) == {None}
    assert found["bad"] == 1000


def test_the_state_of_a_run_is_told_by_its_lock(tmp_path: Path) -> None:
    run = recorded.write(tmp_path / "run", recorded.rows(3), status={"state": "running"})
    assert read_record(run).state == "interrupted"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_record(run).state == "running"
        assert main(["report", str(run)]) == 0  # while it trains
    assert read_record(run).state == "interrupted"


def test_figures_of_a_run(tmp_path: Path) -> None:
    table = [recorded.row(step, 4.0 - step, **{"eval/loss": abs(step - 2) + 1.0}) for step in (1, 2, 3)]
    run = recorded.write(tmp_path / "run", table)
    found = {figure.name: (figure.value, figure.note) for figure in figures_of(read_record(run))}
    assert found["Validation loss"] == ("1.0000", "best, at step 2; 2.0000 at the last, step 3")
    assert found["Training loss"] == ("1.0000", "the last step")
    assert found["Steps"] == ("3", "of 200")
    assert found["Tokens trained on"][0] == "6,144"
    assert found["Time in steps"][0] == "0.8 s"  # three steps of a quarter of a second
    assert found["Tokens per second"] == ("8,002", "median")
    assert found["MFU"][0] == "12.5 %"
    assert found["Peak memory"][0] == "0.50 GiB"
    assert "Bits per byte" not in found


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.44, "0.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3661, "1 h 01 min"), (90000, "1 d 1 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_samples_are_spread_over_the_run_and_replaced_after_a_resume(tmp_path: Path) -> None:
    events: list[recorded.Fields] = [
        {"event": "sample", "step": step, "prompt": "def ", "text": f"text {step}"}
        for step in range(0, 1000, 10)
    ]
    events.append({"event": "sample", "step": 500, "text": " \n\n"})
    run = recorded.write(tmp_path / "run", recorded.rows(3), events=events)
    found, total = samples(read_record(run))
    assert total == 51
    assert len(found) == 12
    assert (found[0].step, found[0].prompt, found[0].text) == (0, "def ", "text 0")
    assert (found[-1].step, found[-1].text) == (500, r" \n\n")


def test_text_that_cannot_be_seen_is_spelled_out() -> None:
    assert visible("\n\n") == r"\n\n"
    assert visible("") == "(empty)"
    assert visible("a\x1b[31m\tb\nc") == "a\\x1b[31m\tb\nc"


def test_history_is_in_words(tmp_path: Path) -> None:
    events: list[recorded.Fields] = [
        {"time": "2026-11-28T10:00:01.5+00:00", "event": "start", "step": 0},
        *({"event": "save", "step": step} for step in (10, 20, 30)),
        {"event": "resume", "step": 30, "changes": {"optim.lr": [1, 2]}},
        {"event": "notice", "text": "beware"},
        {"event": "unheard-of", "fact": 3},
        {"event": "failure", "error": "DivergedError"},
        {"event": "stop", "step": 40, "reason": "SIGTERM"},
    ]
    run = recorded.write(tmp_path / "run", recorded.rows(3), events=events)
    found = history(read_record(run))
    assert [entry.text for entry in found] == [
        "Started",
        "3 checkpoints saved, the first at step 10",
        "Resumed; changed: optim.lr from 1 to 2",
        "beware",
        "unheard-of: fact 3",
        "Failed: DivergedError",
        "Stopped by SIGTERM, with everything saved",
    ]
    assert found[0].time == "2026-11-28 10:00:01"


class Elements(HTMLParser):
    """The tags of a page, and its texts outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name in ("src", "href", "onerror")], (tag, attrs)


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    markup = recorded.MARKUP
    events: list[recorded.Fields] = [
        {"event": "sample", "step": 1, "prompt": markup, "text": f"{markup}\ud800"},
        {"event": "notice", "text": markup},
        {"event": markup, markup: markup},
    ]
    table = [recorded.row(1, 2.0, **{markup: 3.0})]
    config = f"run:\n  name: {json.dumps(markup)}\n{json.dumps(markup)}: {json.dumps(markup)}\n"
    run = recorded.write(
        tmp_path / "run", table, events=events, status={"state": "failed", "reason": markup}, config=config
    )
    plain = recorded.write(tmp_path / "plain", recorded.rows(2))
    for directories in ([run], [run, plain]):
        page = report(directories, tmp_path / "page.html").read_text()
        found = Elements(page)
        assert found.tags.count("script") == 3
        assert "img" not in found.tags
        assert "http" not in page.replace("http-equiv", "").split("<script>")[0]  # nothing is loaded
    assert (tmp_path / "page.html").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such directory"),
        (lambda path: path.mkdir(), "is not a run directory"),
        (lambda path: recorded.write(path, []), "has no rows to show: metrics.jsonl is empty"),
        (lambda path: recorded.write(path, [], torn='{"st'), "metrics.jsonl is damaged"),
        (lambda path: recorded.write(path / "inner", recorded.rows(1)), "It holds runs: "),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, message: str
) -> None:
    make(tmp_path / "run")  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded.write(tmp_path / "run", recorded.rows(1))
    for out in (tmp_path / "absent" / "page.html", tmp_path):
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert "can't be written" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "RUN" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
