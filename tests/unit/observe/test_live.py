"""The live display on a real pseudo-terminal of every width, read back by a terminal emulator."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pyte
import pytest
import recorded

HEIGHT = 60
PROGRAM = r"""
import os
import sys
from pathlib import Path
from megatrain.observe.figures import Beginning
from megatrain.observe.live import LiveDisplay
display = LiveDisplay()
display.phase("tokenizing", 0.5)
facts = ("Data: a corpus of " + "many " * 20 + "words.",)
record = Path(sys.argv[1]) if len(sys.argv) > 1 else None
display.start(Beginning("the title", 40, 20 if record else 0, facts, 16.0, record))
row = {"train/loss": 2.5, "train/grad_norm": 0.75, "train/lr": 1e-3, "perf/tokens_per_sec": 12345.6,
       "perf/step_time_s": 2.0, "perf/mfu": 0.4321, "memory/peak_gib": 1.234}
if not record:
    for step in range(1, 21):
        extra = {"eval/loss": 3.25, "eval/bits_per_byte": 1.5} if step == 20 else {}
        display.step(row | {"step": step, "train/loss": 5 - step / 10} | extra)
    display.sample(20, "\n\n \n")
os.write(2, b"READY\n")  # sys.stderr is the display's
sys.stdin.readline()
for step in range(21, 41):
    display.step(row | {"step": step, "train/loss": 5 - step / 10})
display.sample(40, "def f(x):\n    return " + "x + " * 200)
display.notice("something to know")
display.close()
"""
FIGURES = (
    "step 40/40", "100%", "elapsed", "1.0000", "3.2500", "1.5000", "0.750", "1.00e-03", "12,346", "43.2%", "2.00s",
    "1.23 GiB", "2.50", "something to know",
)  # fmt: skip


class WrappingScreen(pyte.Screen):
    """A terminal as most are now: on a resize, lines that have become too long go on in another row."""

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        if columns is None:  # the first size
            return super().resize(lines, columns)
        texts = [line.rstrip() for line in self.display[: self.cursor.y + 1]]
        rows = [text[at : at + columns] for text in texts for at in range(0, max(len(text), 1), columns)]
        super().resize(lines, columns)
        self.erase_in_display(2)
        for number, row in enumerate(rows[-HEIGHT:], 1):
            self.cursor_position(number, 1)
            self.draw(row)
        return None


def show(
    width: int, *arguments: str, resize: int | None = None, kind: type[pyte.Screen] = pyte.Screen
) -> str:
    """The last screen of the program on a terminal of `width` columns, which is resized in the middle."""
    ours, theirs = pty.openpty()
    set_width(theirs, width)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment | {"TERM": "xterm"},
    )
    screen = kind(width, HEIGHT)
    stream = pyte.ByteStream(screen)
    reading = threading.Lock()
    reader = threading.Thread(target=feed, args=(ours, stream, reading))
    reader.start()
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stderr.readline() == b"READY\n"
    if resize is not None:
        with reading:
            while select.select([ours], [], [], 0)[0]:  # what was drawn before
                stream.feed(os.read(ours, 65536))
            set_width(theirs, resize)
            screen.resize(columns=resize)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 0, process.stderr.read()
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    process.stderr.close()
    return "\n".join(line.rstrip() for line in screen.display).strip()


def set_width(terminal: int, width: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))


def feed(terminal: int, stream: pyte.ByteStream, reading: threading.Lock) -> None:
    """Pass on what the program draws, until it has ended."""
    while True:
        select.select([terminal], [], [])
        with reading:
            if not select.select([terminal], [], [], 0)[0]:
                continue
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return
            stream.feed(piece)


def words(screen: str) -> str:
    """The screen as running text, for sentences that are wrapped."""
    return " ".join(screen.split())


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_value_is_cut_at_any_width(width: int) -> None:
    screen = show(width)
    for figure in FIGURES:
        assert figure in words(screen), f"{figure} is not in\n{screen}"
    assert "training loss, steps 1 to 40, from 4.9000 (highest) to 1.0000 (lowest)" in words(screen)
    assert "the model writes at step 40: def f(x): return x" in words(screen)
    assert words(screen).startswith("the title Data: a corpus of many many")
    assert screen.count("step 40/40") == 1
    assert "…" in screen  # of the sample, not more than a few lines


@pytest.mark.parametrize("kind", [pyte.Screen, WrappingScreen])
@pytest.mark.parametrize(("before", "after"), [(120, 50), (50, 120)])
def test_a_terminal_that_is_resized(before: int, after: int, kind: type[pyte.Screen]) -> None:
    """Nothing of the drawing before is left, wherever the terminal has put it."""
    screen = show(before, resize=after, kind=kind)
    for figure in FIGURES:
        assert figure in words(screen), f"{figure} is not in\n{screen}"
    assert words(screen).startswith("the title Data: a corpus of many many")
    for part in ("the title", "/40", "elapsed", "training loss", "tokens/s"):
        assert screen.count(part) == 1, f"{part} is left of an earlier drawing in\n{screen}"


def test_the_curve_goes_on_after_a_resume(tmp_path: Path) -> None:
    run = recorded.write(tmp_path / "run", recorded.rows(20))
    screen = words(show(100, str(run / "metrics.jsonl")))
    first = recorded.rows(20)[0]["train/loss"]
    assert "resumed at step 20" in screen
    assert f"training loss, steps 1 to 40, from {first:.4f} (highest) to 1.0000 (lowest)" in screen
    assert f"{recorded.rows(20)[-1]['eval/loss']:.4f}" in screen  # the last validation's
