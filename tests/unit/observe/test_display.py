"""Displays: exact plain lines, a real terminal for the live one, and outputs that go away."""

import os
import pty
import subprocess
import sys

import pytest

from megatrain.observe.display import PlainDisplay, make_display, sparkline

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
display = make_display("auto")
display.phase("tokenizing", 0.5)
display.start(40, 0, "the title")
row = {"train/loss": 2.5, "train/grad_norm": 0.75, "train/lr": 1e-3, "perf/tokens_per_sec": 12345.6,
       "perf/step_time_s": 2.0}
for step in range(1, 41):
    extra = {"eval/loss": 3.25, "eval/bits_per_byte": 1.5} if step == 20 else {}
    display.step(row | {"step": step, "train/loss": 5 - step / 10} | extra)
display.notice("something to know")
display.close()
print(type(display).__name__)
"""


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    display.start(100, 0, "title")
    for step in range(1, 30):
        display.step(ROW | {"step": step})
    display.step(ROW | {"step": 30, "eval/loss": 3.0, "eval/bits_per_byte": 1.25})
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "step 1/100  loss 2.5000  grad norm 0.750  lr 1.00e-03  tokens/s 12,346  MFU 43.2%  eta 3m18s",
        "step 30/100  loss 2.5000  val loss 3.0000  bits/byte 1.2500  grad norm 0.750  lr 1.00e-03  "
        "tokens/s 12,346  MFU 43.2%  eta 2m20s",
    ]


def test_no_terminal_means_plain_lines() -> None:
    assert isinstance(make_display("auto"), PlainDisplay)


def on_a_terminal(environment: dict[str, str]) -> str:
    """What the program draws on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, env=os.environ | environment)
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


def test_a_closed_output_ends_nothing() -> None:
    program = PROGRAM.replace("print(type(display).__name__)", "import os; os._exit(7)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 7


def test_sparkline_shows_the_course() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 10) == "█▇▆▅▄▃▂▁"
    assert sparkline([4.0] * 3, 10) == "▁▁▁"
    assert len(sparkline([float(n) for n in range(1000)], 50)) == 50
    assert sparkline([], 5) == ""
