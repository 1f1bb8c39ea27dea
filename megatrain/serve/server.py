"""The server: a socket, the loop that answers on it, and how both end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatrain.config.errors import UserError
from megatrain.serve.app import make_app
from megatrain.serve.errors import RefusedError
from megatrain.serve.guard import Guard
from megatrain.serve.service import Service

LOG = logging.getLogger(__name__)
STOPPED = RefusedError(503, "The server has stopped before the answer was complete.", code="draining")


class TimedProtocol(H11Protocol):
    """HTTP/1.1 in which a connection that does not bring a request's headers in time is closed."""

    def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.read_seconds: float = config.app.service.limits.read_seconds  # type: ignore[union-attr]
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers (asyncio)."""
        super().connection_made(transport)
        self._headers_due = self.loop.call_later(self.read_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take in bytes (asyncio)."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._headers_due is None:
            self._headers_due = self.loop.call_later(self.read_seconds, self.transport.abort)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait (asyncio)."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class Server(uvicorn.Server):
    """A server that ends when requests under way are answered."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`."""
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket at that address; port 0: a free one.

    Raises:
        UserError: the address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise UserError(
            f"serve: --host {host} --port {port}: {error.strerror}; choose another address"
        ) from None
    return opened


def url_of(opened: socket.socket) -> str:
    """Return the URL at which a socket is reached."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    service: Service, opened: socket.socket, *, keys: Sequence[str], on_ready: Callable[[], None]
) -> None:
    """Answer requests until SIGTERM or SIGINT, and then those that are under way; a second signal ends these, too."""
    asyncio.run(_serve(make_app(service, keys), opened, on_ready))


async def _serve(app: Guard, opened: socket.socket, on_ready: Callable[[], None]) -> None:
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=1024,
        timeout_graceful_shutdown=2,
    )
    server = Server(config)
    drain = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _signalled, app, drain)
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if not serving.done():
        on_ready()
        draining = asyncio.create_task(_drain(app, server, drain))
        await serving
        draining.cancel()
    await serving


def _signalled(app: Guard, drain: asyncio.Event) -> None:
    if app.service.is_draining:
        _end_jobs(app)
    app.service.is_draining = True
    drain.set()


async def _drain(app: Guard, server: Server, drain: asyncio.Event) -> None:
    await drain.wait()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(app.service.limits.drain_seconds):
            while app.in_flight:
                await asyncio.sleep(0.02)
    _end_jobs(app)
    server.should_exit = True


def _end_jobs(app: Guard) -> None:
    for job in app.service.engine.jobs:
        job.fail(STOPPED)
