"""The engine of a server: one thread in which all work of the model is done, and how the event loop speaks with it.

The loop's side is `open`, `end`, `close`, `compute`; they put orders into an inbox, and never wait for the model. The
thread obeys them between two passes, and sends what a pass produced back in one message. All other attributes belong
to one of the two sides, as their names say.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from megatrain.models.generate import Generation, Produced, Request
from megatrain.serve.errors import RefusedError
from megatrain.serve.metrics import Metrics

T = TypeVar("T")
LOG = logging.getLogger(__name__)
FAILED = "The model failed on this text; the server's log says why."


class Job:
    """The texts of one HTTP request, as the event loop sees them."""

    def __init__(self, size: int) -> None:
        self.opened = time.monotonic()
        self.numbers: list[int | None] = [None] * size
        """Of the texts in the generation; the thread's."""
        self.left = set(range(size))
        """Texts that have not ended."""
        self.failure: RefusedError | None = None
        self._arrived: list[tuple[int, Produced]] = []
        self._event = asyncio.Event()

    def put(self, index: int, produced: Produced) -> None:
        """Take in what came of a text."""
        self._arrived.append((index, produced))
        self._event.set()

    def fail(self, failure: RefusedError) -> None:
        """Let whoever waits for the texts learn that no more will come."""
        self.failure = failure
        self._event.set()

    async def arrived(self) -> list[tuple[int, Produced]]:
        """Wait for tokens; returns all that have come, each with the index of its text.

        Raises:
            RefusedError: no more will come.
        """
        await self._event.wait()
        self._event.clear()
        if self.failure is not None:
            raise self.failure
        found, self._arrived = self._arrived, []
        return found


class Engine:
    """A `Generation` in a thread of its own."""

    def __init__(self, generation: Generation, metrics: Metrics, *, most_texts: int) -> None:
        """Take what generates.

        Args:
            most_texts: how many texts may run or wait before requests are refused.
        """
        self.generation = generation
        self.metrics = metrics
        self.most_texts = most_texts
        self.jobs: set[Job] = set()
        """Those of the loop that are not closed."""
        self._computing = 0
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._texts: dict[int, tuple[Job, int]] = {}
        self._latest: dict[int, float] = {}
        self._works: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._stops = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        metrics.blocks.set(generation.runner.cache.n_blocks)
        metrics.blocks_used.set_function(lambda: float(self._blocks_used()))
        metrics.running.set_function(lambda: float(generation.n_running))
        metrics.waiting.set_function(lambda: float(generation.n_waiting))

    # The loop's side.

    def start(self) -> None:
        """Start the thread, and tell it the present event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present pass."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_texts(self) -> int:
        """Texts that run or wait."""
        return sum(len(job.left) for job in self.jobs)

    def open(self, requests: Sequence[Request]) -> Job:
        """Let requests wait for their turn; whoever opens a job closes it.

        Raises:
            RefusedError: too many texts run and wait.
        """
        self._require_room(len(requests))
        job = Job(len(requests))
        self.jobs.add(job)
        self._inbox.put(partial(self._add, job, requests))
        return job

    def end(self, job: Job, index: int) -> None:
        """End one text of a job early."""
        if index in job.left:
            job.left.discard(index)
            self._inbox.put(partial(self._end, job, index))

    def close(self, job: Job) -> None:
        """End what is left of a job."""
        self.metrics.cancelled.inc(len(job.left))
        for index in list(job.left):
            self.end(job, index)
        self.jobs.discard(job)

    async def compute(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which the thread does between two passes.

        Raises:
            RefusedError: too much waits for that.
        """
        self._require_room(1)
        future: asyncio.Future[T] = self._loop.create_future()
        self._computing += 1
        try:
            self._inbox.put(partial(self._works.append, (work, future)))
            return await future
        finally:
            self._computing -= 1

    def _require_room(self, wanted: int) -> None:
        if not self.is_alive:
            raise RefusedError(503, "The engine has stopped.", code="engine_stopped")
        if self.n_texts + self._computing + wanted > self.most_texts:
            raise RefusedError(
                429,
                f"{self.n_texts + self._computing} texts run and wait, and {self.most_texts} are the most; try again.",
                code="queue_full",
                retry_after=1,
            )

    def _deliver(self, found: list[tuple[Job, int, Produced]]) -> None:
        for job, index, produced in found:
            if index in job.left:
                job.put(index, produced)
                if produced.finish:
                    job.left.discard(index)

    # The thread's side.

    def _run(self) -> None:
        while not self._stops:
            self._obey(waits=not (self.generation.is_busy or self._works))
            if self._works:
                self._compute(*self._works.popleft())
            if self.generation.is_busy:
                self._step()

    def _obey(self, *, waits: bool) -> None:
        try:
            while True:
                self._inbox.get(block=waits)()
                waits = False
        except Empty:
            return

    def _stop(self) -> None:
        self._stops = True

    def _add(self, job: Job, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            number = self.generation.add(request)
            job.numbers[index] = number
            self._texts[number] = (job, index)
            self.metrics.prompt_tokens.inc(len(request.prompt))

    def _end(self, job: Job, index: int) -> None:
        number = job.numbers[index]
        if number is not None and self._texts.pop(number, None) is not None:
            self._latest.pop(number, None)
            self.generation.end(number)

    def _compute(self, work: Callable[[], T], future: "asyncio.Future[T]") -> None:
        if future.cancelled():
            return
        try:
            result = work()
        except Exception as error:
            LOG.exception("a computation failed")
            self._loop.call_soon_threadsafe(_settle, future, None, error)
        else:
            self._loop.call_soon_threadsafe(_settle, future, result, None)

    def _step(self) -> None:
        try:
            found = self.generation.step()
        except Exception:
            LOG.exception("a pass of the model failed")
            self._fail()
            return
        now = time.monotonic()
        sent = []
        tokens = 0
        for produced in found:
            job, index = self._texts[produced.request]
            sent.append((job, index, produced))
            if produced.token is not None:
                tokens += 1
                self._note_time(produced.request, job, now)
            if produced.finish:
                del self._texts[produced.request]
                self._latest.pop(produced.request, None)
        self.metrics.generated_tokens.inc(tokens)
        self.metrics.batch.observe(len(found))
        self._loop.call_soon_threadsafe(self._deliver, sent)

    def _note_time(self, number: int, job: Job, now: float) -> None:
        before = self._latest.get(number)
        if before is None:
            self.metrics.first_token_seconds.observe(now - job.opened)
        else:
            self.metrics.between_tokens_seconds.observe(now - before)
        self._latest[number] = now

    def _fail(self) -> None:
        """End all texts: which of them made the pass fail is not known."""
        self.metrics.failures.inc()
        jobs = {job for job, _ in self._texts.values()}
        for number in self._texts:
            self.generation.end(number)
        self._texts.clear()
        self._latest.clear()
        for job in jobs:
            self._loop.call_soon_threadsafe(job.fail, RefusedError(500, FAILED))

    def _blocks_used(self) -> int:
        cache = self.generation.runner.cache
        return cache.n_blocks - cache.n_free


def _settle(future: "asyncio.Future[Any]", result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
