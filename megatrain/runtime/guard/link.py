"""Messages between guards: objects of JSON, one a line, over a socket or a pipe that never blocks."""

import contextlib
import json
import os
from typing import Any

MOST = 1 << 26
"""Bytes that may wait to be sent; a line longer than this is not taken."""


class Link:
    """One end of a connection."""

    def __init__(self, file: int, *, out: int | None = None) -> None:
        """Use the file `file` for reading, and `out` (or the same one) for writing."""
        self.file = file
        self._out = file if out is None else out
        self._in = b""
        self._waiting = b""
        self.rank: int | None = None
        """Of the guard at the other end, once it is known."""
        self.is_open = True
        os.set_blocking(self.file, False)
        os.set_blocking(self._out, False)

    def send(self, message: dict[str, Any]) -> None:
        """Send `message` as soon as there is room; `flush` sends the rest."""
        if self.is_open and len(self._waiting) < MOST:
            self._waiting += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting and self.is_open:
            try:
                self._waiting = self._waiting[os.write(self._out, self._waiting) :]
            except BlockingIOError:
                return
            except OSError:
                self.is_open = False

    @property
    def is_full(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._waiting) and self.is_open

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come; none and not `is_open`: the other end is closed."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                data = os.read(self.file, 1 << 16)
            except BlockingIOError:
                return messages
            except OSError:
                data = b""
            if not data or len(self._in) > MOST:
                self.is_open = False
                return messages
            *lines, self._in = (self._in + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    if isinstance(message := json.loads(line), dict):
                        messages.append(message)
