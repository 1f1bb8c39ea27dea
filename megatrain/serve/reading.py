"""`POST /v1/embeddings` and `POST /v1/classify`: texts that are read and not continued."""

import base64
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from megatrain.serve.errors import RefusedError
from megatrain.serve.growing import ended_with
from megatrain.serve.limits import MAX_TEXTS
from megatrain.serve.schemas import ClassifyRequest, EmbeddingRequest
from megatrain.serve.service import Service
from megatrain.train.scoring import batches

T = TypeVar("T")


async def embed(service: Service, asked: EmbeddingRequest, http: Request) -> dict[str, Any]:
    """Return the vectors of the texts.

    Raises:
        RefusedError: the request is not answered.
    """
    service.require_model(asked.model)
    prompts = await service.prompts.of(asked.input)
    texts = [prompt.ids for prompt in prompts]
    service.require_short(texts)
    vectors: list[Any] = [None] * len(texts)
    async with ended_with(http.receive):
        for numbers in batches({n: len(text) for n, text in enumerate(texts)}):
            batch = [texts[n] for n in numbers]
            found = await _read(service, partial(service.embedder.vectors, batch), batch)
            for n, vector in zip(numbers, found.numpy(), strict=True):
                vectors[n] = vector
    is_packed = asked.encoding_format == "base64"
    n_read = sum(map(len, texts))
    return {
        "object": "list",
        "model": service.name,
        "data": [
            {
                "object": "embedding",
                "index": n,
                "embedding": _base64(vector) if is_packed else vector.tolist(),
            }
            for n, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": n_read, "total_tokens": n_read},
    }


async def classify(service: Service, asked: ClassifyRequest, http: Request) -> dict[str, Any]:
    """Return for each text which choice is the likeliest after it, as `megatrain evaluate --choices` finds it.

    Raises:
        RefusedError: the request is not answered.
    """
    service.require_model(asked.model)
    if asked.choices is None:
        raise RefusedError(
            400,
            f"{service.name} was not trained as a classifier: say the choices, of which the likeliest is chosen.",
            code="unsupported",
            param="choices",
        )
    labels = asked.choices
    if len(set(labels)) < len(labels):
        raise RefusedError(400, "The choices must be different.", code="conflict", param="choices")
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if len(texts) * len(labels) > MAX_TEXTS:
        raise RefusedError(
            400,
            f"{len(texts)} texts with {len(labels)} choices each are too many: {MAX_TEXTS} are the most in all.",
            code="too_many_texts",
            param="input",
        )
    pairs = [service.scorer.encode(text, label) for text in texts for label in labels]
    service.require_short([[*before, *after] for before, after in pairs])
    nats = np.zeros(len(pairs))
    async with ended_with(http.receive):
        for numbers in batches({n: len(pair[0]) + len(pair[1]) for n, pair in enumerate(pairs)}):
            batch = [pairs[n] for n in numbers]
            work = partial(service.scorer.scores, batch)
            for n, score in zip(
                numbers, await _read(service, work, [[*a, *b] for a, b in batch]), strict=True
            ):
                nats[n] = score.nats
    n_read = sum(len(before) + len(after) for before, after in pairs)
    rows = nats.reshape(len(texts), len(labels))
    return {
        "id": f"classify-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": [_chosen(n, row, labels) for n, row in enumerate(rows)],
        "usage": {"prompt_tokens": n_read, "total_tokens": n_read},
    }


async def _read(service: Service, work: Callable[[], T], texts: Sequence[Sequence[int]]) -> T:
    found = await service.engine.compute(work)
    service.metrics.prompt_tokens.inc(sum(map(len, texts)))
    return found


def _chosen(index: int, nats: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    shares = np.exp(nats - np.logaddexp.reduce(nats))
    return {
        "index": index,
        "label": labels[int(nats.argmax())],
        "probs": shares.tolist(),
        "logprobs": nats.tolist(),
        "num_classes": len(labels),
    }


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
