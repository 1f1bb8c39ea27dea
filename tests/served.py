"""`megatrain serve` as a process, and what a client in a test needs to speak with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

SECONDS = 120.0
"""After which a test gives up: the machine may be busy."""


class Served:
    """A server that is ready, at a free port; a `with` block stops it."""

    def __init__(self, run: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        self.log = run.parent / f"serve-{os.getpid()}-{id(self)}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatrain", "serve", str(run), "--port", "0", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(env or {})},
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()  # printed when it is ready
        assert self.url.startswith("http://"), self.said
        self.model = run.name
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS)

    @property
    def said(self) -> str:
        """What it has written to standard error."""
        return self.log.read_text()

    def post(self, path: str, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json={"model": self.model, **body}, **options)

    def stream(self, path: str, body: Mapping[str, Any]) -> Any:
        asked = {"model": self.model, "stream": True, **body}
        return self.client.stream("POST", f"/v1/{path}", json=asked)

    def metric(self, name: str) -> float:
        """One figure of `/metrics`."""
        lines = self.client.get("/metrics").text.splitlines()
        (line,) = [each for each in lines if each.startswith(name + " ")]
        return float(line.split()[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, unless it has ended, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *failure: object) -> None:
        self.client.close()
        try:
            code = self.end()
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        if failure == (None, None, None):
            assert code == 0, self.said
            assert "Traceback" not in self.said


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The objects of a stream, which ends as it should, or with an error."""
    ended = False
    for line in response.iter_lines():
        if not line:
            continue
        assert not ended
        data = line.removeprefix("data: ")
        ended = data == "[DONE]"
        if not ended:
            found = json.loads(data)
            ended = "error" in found
            yield found
    assert ended
