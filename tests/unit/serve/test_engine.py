"""The engine's thread: a pass that fails ends its texts and no others, and what is computed beside them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from unit.models.test_generate import FAMILIES, PROMPTS, alone, build

from megatrain.models.generate import Generation, Request
from megatrain.models.sampling import Sampling
from megatrain.serve.engine import Engine, Job
from megatrain.serve.errors import RefusedError
from megatrain.serve.metrics import Metrics

GREEDY = Sampling(temperature=0)
MODEL = build(FAMILIES["llama3"])


def in_engine(work: Callable[[Engine], Coroutine[Any, Any, None]], *, most_texts: int = 20) -> None:
    async def run() -> None:
        engine = Engine(
            Generation(MODEL, context=64, n_blocks=20, max_batch=4), Metrics(), most_texts=most_texts
        )
        engine.start()
        try:
            async with asyncio.timeout(60):
                await work(engine)
        finally:
            await engine.stop()
        assert not engine.is_alive
        assert engine.generation.runner.cache.n_free == 20

    asyncio.run(run())


def request(prompt: list[int], tokens: int = 6) -> Request:
    return Request(prompt=prompt, max_new_tokens=tokens, sampling=GREEDY)


async def tokens_of(job: Job, size: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(size)]
    ended = 0
    while ended < size:
        for index, produced in await job.arrived():
            if produced.token is not None:
                found[index].append(produced.token)
            ended += bool(produced.finish)
    return found


def test_texts_of_several_jobs_are_each_as_alone() -> None:
    pairs = [[request(PROMPTS[n]), request(PROMPTS[n + 1], 3)] for n in range(len(PROMPTS) - 1)]
    expected = [[alone(MODEL, each, 64)[0] for each in pair] for pair in pairs]

    async def work(engine: Engine) -> None:
        jobs = [engine.open(pair) for pair in pairs]
        for job, texts in zip(jobs, expected, strict=True):
            assert await tokens_of(job, 2) == texts
            engine.close(job)
        assert engine.n_texts == 0
        assert engine.metrics.generated_tokens._value.get() == 9 * len(jobs)

    in_engine(work)


def test_a_pass_that_fails_ends_its_texts_and_no_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = alone(MODEL, request(PROMPTS[0]), 64)[0]

    async def work(engine: Engine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine.generation.runner, "run", lambda works: 1 // 0)
            job = engine.open([request([1, 2])])
            with pytest.raises(RefusedError, match="failed") as failure:
                await tokens_of(job, 1)
            assert failure.value.status == 500
            engine.close(job)
        assert "ZeroDivisionError" in caplog.text
        job = engine.open([request(PROMPTS[0])])
        assert await tokens_of(job, 1) == [expected]
        engine.close(job)
        assert engine.metrics.failures._value.get() == 1

    in_engine(work)


def test_one_text_of_a_job_is_ended() -> None:
    async def work(engine: Engine) -> None:
        job = engine.open([request([1], 60), request([2], 5)])
        await job.arrived()
        engine.end(job, 0)
        assert engine.n_texts == 1
        second: list[int] = []
        while 1 in job.left:
            second += [each.token or 0 for index, each in await job.arrived() if index == 1]
        engine.close(job)
        await engine.compute(lambda: None)  # after the orders before it
        assert engine.generation.n_running == 0

    in_engine(work)


def test_what_is_computed_and_what_fails() -> None:
    async def work(engine: Engine) -> None:
        job = engine.open([request([1], 60)])
        assert await asyncio.gather(*(engine.compute(lambda n=n: n * n) for n in range(5))) == [
            0,
            1,
            4,
            9,
            16,
        ]
        with pytest.raises(ZeroDivisionError):
            await engine.compute(lambda: 1 // 0)
        engine.close(job)

    in_engine(work)


def test_texts_that_are_too_many_are_refused() -> None:
    async def work(engine: Engine) -> None:
        job = engine.open([request([1], 60), request([2], 60)])
        with pytest.raises(RefusedError, match="are the most") as refused:
            engine.open([request([1]), request([2])])
        assert refused.value.status == 429
        assert refused.value.headers == {"Retry-After": "1"}
        engine.close(engine.open([request([3])]))
        engine.close(job)

    in_engine(work, most_texts=3)
