"""Displays: exact plain lines, a real terminal for the live one, and outputs that go away."""

import os
import pty
import subprocess
import sys

import pytest

from megatrain.observe.display import PlainDisplay, make_display
from megatrain.observe.figures import Beginning, Clock, Course, sparkline

ROW = {
    "train/loss": 2.5,
    "train/grad_norm": 0.75,
    "train/lr": 1e-3,
    "perf/tokens_per_sec": 12345.6,
    "perf/step_time_s": 2.0,
    "perf/mfu": 0.4321,
}
PROGRAM = """
from megatrain.observe.display import make_display
from megatrain.observe.figures import Beginning
display = make_display("auto")
display.phase("tokenizing", 0.5)
display.start(Beginning("the title", 40, facts=("a fact",), steps_per_epoch=16))
row = {"train/loss": 2.5, "train/grad_norm": 0.75, "train/lr": 1e-3, "perf/tokens_per_sec": 12345.6,
       "perf/step_time_s": 2.0}
for step in range(1, 41):
    extra = {"eval/loss": 3.25, "eval/bits_per_byte": 1.5} if step == 20 else {}
    display.step(row | {"step": step, "train/loss": 5 - step / 10} | extra)
display.notice("something to know")
display.close()
print(type(display).__name__)
"""


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    hand = Hand()
    display = PlainDisplay(hand)
    display.phase("tokenizing", 0.0)
    for second in range(1, 14):  # the next line is due after ten seconds
        hand.at = float(second)
        display.phase("tokenizing", second / 20)
    display.start(Beginning("title", 100, facts=("a fact",), steps_per_epoch=50))
    for step in range(1, 5):  # three seconds a step, of which the steps themselves take two
        hand.at += 3
        display.step(ROW | {"step": step})
    hand.at += 3
    display.step(ROW | {"step": 5, "eval/loss": 3.0, "eval/bits_per_byte": 1.25})
    display.notice("two\nlines")
    assert capsys.readouterr().out.splitlines() == [
        "tokenizing",
        "tokenizing 50%",
        "title",
        "a fact",
        "step 1/100  loss 2.5000  grad norm 0.750  lr 1.00e-03  tokens/s 12,346  MFU 43.2%  "
        "step time 2.00s  epoch 0.02  elapsed 3s  eta 3m18s",
        "step 5/100  loss 2.5000  val loss 3.0000  bits/byte 1.2500  grad norm 0.750  lr 1.00e-03  "
        "tokens/s 12,346  MFU 43.2%  step time 2.00s  epoch 0.10  elapsed 15s  eta 4m45s",
        "two lines",
    ]


def test_the_time_left_counts_validations_and_checkpoints_but_not_what_came_before() -> None:
    hand = Hand()
    clock = Clock(100, 20, hand)
    assert clock.eta() == "?"
    hand.at = 500.0  # compilation, say
    clock.tick({"step": 21, "perf/step_time_s": 1.0})
    assert clock.eta() == "1m19s"
    for step in range(22, 41):  # a second each, and at 30 a checkpoint of 19 s: 38 s for 19 steps
        hand.at += 20 if step == 30 else 1
        clock.tick({"step": step, "perf/step_time_s": 1.0})
    assert clock.eta() == "2m00s"  # 60 steps of 2 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59, "59s"), (61, "1m01s"), (3599, "59m59s"), (3660, "1h01m"), (90000, "1d01h")],
)
def test_the_time_left_in_words(seconds: float, text: str) -> None:
    clock = Clock(2, 0)
    clock.tick({"step": 1, "perf/step_time_s": seconds})
    assert clock.eta() == text


def test_the_course_of_a_long_series_stays_short_and_true() -> None:
    course = Course(most=8)
    for value in range(1000):
        course.add(float(value))
        assert len(course.values()) <= 8
    width = 1000 / len(course.values())
    for place, mean in enumerate(course.values()):  # of 0, 1, 2 ...: the middle of each share
        assert mean == pytest.approx((place + 0.5) * width - 0.5, rel=0.25)
    short = Course(most=8)
    for loss in (3.0, 1.0, 2.0):
        short.add(loss)
    assert short.values() == [3.0, 1.0, 2.0]


def test_no_terminal_means_plain_lines() -> None:
    assert isinstance(make_display("auto"), PlainDisplay)


def on_a_terminal(environment: dict[str, str], program: str = PROGRAM) -> str:
    """What the program draws on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, env=os.environ | environment)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        drawn += piece
    assert process.wait() == 0
    os.close(ours)
    return drawn.decode()


def test_the_live_display_on_a_terminal() -> None:
    drawn = on_a_terminal({"TERM": "xterm", "COLUMNS": "140", "LINES": "40"})
    assert "LiveDisplay" in drawn
    for part in ("the title", "step 40/40", "1.0000", "3.2500", "1.5000", "12,346", "something to know", "█"):
        assert part in drawn


def test_a_dumb_terminal_gets_plain_lines() -> None:
    drawn = on_a_terminal({"TERM": "dumb"})
    assert "PlainDisplay" in drawn
    assert "\x1b" not in drawn


EXITS_WITH_7 = PROGRAM.rpartition("print")[0] + "import sys; sys.stdout.flush(); raise SystemExit(7)"


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_a_reader_that_goes_away_does_not_change_the_exit_code(mode: str) -> None:
    """What Python still holds for it would fail once more when the process ends."""
    line = [sys.executable, "-c", EXITS_WITH_7.replace("auto", mode)]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # as by default
    with subprocess.Popen(line, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 7


def test_an_output_closed_from_the_start_does_not_change_the_exit_code() -> None:
    line = f"'{sys.executable}' -c \"$PROGRAM\" >&-"
    done = subprocess.run(
        ["bash", "-c", line],
        env=os.environ | {"PROGRAM": EXITS_WITH_7.replace("sys.stdout.flush(); ", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("mode", ["auto", "live"])
def test_an_output_of_few_characters_gets_plain_lines(mode: str) -> None:
    program = PROGRAM.replace("auto", mode).replace("something", "\u00e9\u2192")
    drawn = on_a_terminal({"PYTHONIOENCODING": "ascii", "TERM": "xterm"}, program)
    assert "PlainDisplay" in drawn
    assert "?? to know" in drawn


def test_sparkline_shows_the_course() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 10) == "█▇▆▅▄▃▂▁"
    assert sparkline([4.0] * 3, 10) == "▁▁▁"
    assert len(sparkline([float(n) for n in range(1000)], 50)) == 50
    assert sparkline([], 5) == ""
