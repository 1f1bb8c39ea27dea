"""`POST /v1/completions` and `POST /v1/chat/completions`."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatrain.serve.errors import RefusedError
from megatrain.serve.formats import ChatFormat, CompletionFormat, Format
from megatrain.serve.growing import Growing, ended_with
from megatrain.serve.prompts import Prompt
from megatrain.serve.schemas import ChatRequest, CompletionRequest, Generating
from megatrain.serve.service import Service, Way
from megatrain.serve.streaming import EventStream
from megatrain.train.generation import Continuation

LATEST = 5.0
"""Seconds after the time of a request in which its end is still written to a client that reads slowly."""


async def complete(service: Service, asked: CompletionRequest, http: Request) -> Response:
    """Answer a request to continue prompts.

    Raises:
        RefusedError: it is not answered.
    """
    service.require_model(asked.model)
    service.require_language_model()
    if asked.echo and asked.logprobs is not None:
        raise RefusedError(
            400,
            "echo with logprobs is not supported: prompts have no log-probabilities here.",
            code="unsupported",
            param="echo",
        )
    prompts = await service.prompts.of(asked.prompt)
    most = 16 if asked.max_tokens is None else asked.max_tokens
    way = Way(most, asked.logprobs, service.prompts.ends)
    written = CompletionFormat(
        service.name,
        service.trained.tokenizer,
        logprobs=asked.logprobs,
        with_usage=_wants_usage(asked),
        echoes=bool(asked.echo),
    )
    return await _answer(service, asked, prompts, way, written, http)


async def chat(service: Service, asked: ChatRequest, http: Request) -> Response:
    """Answer a request to continue a conversation.

    Raises:
        RefusedError: it is not answered.
    """
    service.require_model(asked.model)
    service.require_language_model()
    if asked.top_logprobs and not asked.logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs=true.", code="conflict", param="top_logprobs")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    prompt = await service.prompts.of_chat(asked.messages)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    way = Way(most, logprobs, service.prompts.chat_ends, service.prompts.chat_stops)
    written = ChatFormat(
        service.name, service.trained.tokenizer, logprobs=logprobs, with_usage=_wants_usage(asked)
    )
    return await _answer(service, asked, [prompt], way, written, http)


def _wants_usage(asked: Generating) -> bool:
    if asked.stream_options is not None and not asked.stream:
        raise RefusedError(400, "stream_options needs stream=true.", code="conflict", param="stream_options")
    return asked.stream_options is not None and asked.stream_options.include_usage


async def _answer(
    service: Service,
    asked: Generating,
    prompts: Sequence[Prompt],
    way: Way,
    written: Format,
    http: Request,
) -> Response:
    requests = service.requests(asked, prompts, way)
    texts = [Continuation(each, service.trained.tokenizer) for each in requests]
    seconds = service.limits.request_seconds
    growing = Growing(service.engine, texts, seconds=seconds)
    n_read = sum(len(prompt.ids) for prompt in prompts)
    if asked.stream:
        return EventStream(_events(growing, written, n_read), growing.close, seconds=seconds + LATEST)
    try:
        async with ended_with(http.receive):
            await growing.complete()
    finally:
        growing.close()
    return JSONResponse(written.complete(texts, _usage(texts, n_read)))


async def _events(growing: Growing, written: Format, n_read: int) -> AsyncIterator[bytes]:
    for index, text in enumerate(growing.texts):
        if opening := written.opening(index, text):
            yield opening
    async for pieces in growing.pieces():
        events = []
        for piece in pieces:
            finish = growing.texts[piece.index].finish
            shows = piece.text or finish or (piece.produced and written.logprobs is not None)
            if shows:
                events.append(written.event(piece.index, piece.text, piece.produced, finish))
        if events:
            yield b"".join(events)
    if written.with_usage:
        yield written.usage_event(_usage(growing.texts, n_read))


def _usage(texts: Sequence[Continuation], n_read: int) -> dict[str, Any]:
    made = sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": n_read, "completion_tokens": made, "total_tokens": n_read + made}
