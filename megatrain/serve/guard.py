"""What stands before the application: keys, sizes, times, and the refusal of requests while the server drains."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatrain.serve.errors import RefusedError
from megatrain.serve.service import Service

API = "/v1/"


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, *, service: Service, keys: Sequence[str], paths: frozenset[str]) -> None:
        """Take the application.

        Args:
            keys: of which one must come with every request of the API; none: all may ask. paths: that metrics name.
        """
        self.app = app
        self.service = service
        self.in_flight = 0
        """Requests of the API that are not answered yet."""
        self._keys = [_digest(key) for key in keys]
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = 499  # the client has left before anything was said

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_api = scope["path"].startswith(API)
        self.in_flight += is_api
        try:
            await self._answer(scope, receive, sending)
        finally:
            self.in_flight -= is_api
            metrics = self.service.metrics
            metrics.requests.labels(path, str(status)).inc()
            metrics.request_seconds.labels(path).observe(time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"].startswith(API):
                self._require_key(scope)
                self._require_open()
            body = await self._read(scope, receive)
        except RefusedError as error:
            answer = error.response()
            answer.headers["Connection"] = "close"  # what is left of the body is not read
            await answer(scope, receive, send)
            return
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, received, send)

    def _require_key(self, scope: Scope) -> None:
        if not self._keys:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in a time that does not depend on where it differs.
        right = [hmac.compare_digest(digest, each) for each in self._keys]
        if scheme.lower() != b"bearer" or not any(right):
            said = "No API key was given" if not given else "The API key is wrong"
            error = RefusedError(401, f"{said} (Authorization: Bearer KEY).", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error

    def _require_open(self) -> None:
        if self.service.is_draining:
            raise RefusedError(
                503, "The server is about to stop; ask another one.", code="draining", retry_after=5
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None: the client has left.

        Raises:
            RefusedError: it is too large, or does not arrive.
        """
        limits = self.service.limits
        too_large = RefusedError(
            413, f"A request may have {limits.body_bytes} bytes, and this one has more.", code="too_large"
        )
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(said) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limits.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RefusedError(
                408, f"The request did not arrive within {limits.read_seconds:g} s.", code="timeout"
            ) from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
