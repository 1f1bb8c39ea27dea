"""Server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatrain.serve.errors import RefusedError, error_body
from megatrain.serve.growing import gone

LOG = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """Return an object as an event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come, until they end or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], *, seconds: float) -> None:
        """Take the events.

        Args:
            close: called once they have ended, or nobody reads them any more. seconds: most that they may take.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.close = close
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait((sending, leaving), timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await task
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for each in self.events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            last = DONE
        except RefusedError as error:
            last = event(error.body)
        except Exception:
            LOG.exception("an answer failed")
            last = event(error_body(500, "The server failed on this request; its log says why."))
        await send({"type": "http.response.body", "body": last, "more_body": False})
