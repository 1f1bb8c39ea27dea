"""Texts of one request as they grow."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.types import Message, Receive

from megatrain.models.generate import Produced
from megatrain.serve.engine import Engine, Job
from megatrain.serve.errors import RefusedError
from megatrain.train.generation import Continuation

T = TypeVar("T")


@dataclass
class Piece:
    """What has been added to one text."""

    index: int
    text: str = ""
    produced: list[Produced] = field(default_factory=list)


class Growing:
    """The texts of one request, and the job in the engine that lets them grow."""

    def __init__(self, engine: Engine, texts: list[Continuation], *, seconds: float) -> None:
        """Let the texts wait for their turn.

        Args:
            seconds: until the request is given up.

        Raises:
            RefusedError: too many texts run and wait.
        """
        self.engine = engine
        self.texts = texts
        self.job: Job = engine.open([text.request.for_model(text.tokenizer) for text in texts])
        timeout = RefusedError(504, f"The answer took longer than {seconds:g} s.", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(seconds, self.job.fail, timeout)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield what has been added since, until all texts have ended.

        Raises:
            RefusedError: they can't be completed.
        """
        open_texts = len(self.texts)
        while open_texts:
            found: dict[int, Piece] = {}
            for index, produced in await self.job.arrived():
                text = self.texts[index]
                if text.finish:
                    continue  # a stop text came, and the engine did not know it yet
                piece = found.setdefault(index, Piece(index))
                piece.text += text.take(produced)
                if produced.token is not None:
                    piece.produced.append(produced)
                if text.finish:
                    open_texts -= 1
                    self.engine.end(self.job, index)
            if found:
                yield list(found.values())

    async def complete(self) -> None:
        """Wait until all texts have ended.

        Raises:
            RefusedError: they can't be completed.
        """
        async for _ in self.pieces():
            pass

    def close(self) -> None:
        """End what has not ended, and free its part of the cache."""
        self._timer.cancel()
        self.engine.close(self.job)


async def gone(receive: Callable[[], Awaitable[Message]]) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def ended_with(receive: Receive) -> AsyncIterator[None]:
    """End the `with` block when the client leaves.

    Raises:
        RefusedError: it has left; nobody reads that.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.create_task(gone(receive))
    left = False

    def cancel(done: "asyncio.Task[None]") -> None:
        nonlocal left
        if not done.cancelled():
            left = True
            task.cancel()

    watch.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
        raise RefusedError(499, "The client has left.", code="client_left") from None
    finally:
        watch.remove_done_callback(cancel)
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
