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
    """Return the labels of the texts: a classifier's own, or which of the choices is the likeliest after a text.

    Raises:
        RefusedError: the request is not answered.
    """
    service.require_model(asked.model)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    classifier = service.classifier
    if classifier is None:
        labels, is_multi = _choices(service, asked, len(texts)), False
        rows, n_read = await _score(service, texts, labels, http)
    else:
        labels, is_multi = list(classifier.labels), classifier.multi_label is True
        if asked.choices is not None:
            said = f"{service.name} is a classifier with labels of its own: leave the choices out."
            raise RefusedError(400, said, code="unsupported", param="choices")
        rows, n_read = await _logits(service, texts, http)
    return {
        "id": f"classify-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "labels": labels,
        "data": [_chosen(n, row, labels, is_multi=is_multi) for n, row in enumerate(rows)],
        "usage": {"prompt_tokens": n_read, "total_tokens": n_read},
    }


def _choices(service: Service, asked: ClassifyRequest, count: int) -> list[str]:
    if asked.choices is None:
        raise RefusedError(
            400,
            f"{service.name} was not trained as a classifier: say the choices, of which the likeliest is chosen.",
            code="unsupported",
            param="choices",
        )
    if len(set(asked.choices)) < len(asked.choices):
        raise RefusedError(400, "The choices must be different.", code="conflict", param="choices")
    if count * len(asked.choices) > MAX_TEXTS:
        raise RefusedError(
            400,
            f"{count} texts with {len(asked.choices)} choices each are too many: {MAX_TEXTS} are the most in all.",
            code="too_many_texts",
            param="input",
        )
    return asked.choices


async def _score(
    service: Service, texts: Sequence[str], labels: Sequence[str], http: Request
) -> tuple[np.ndarray, int]:
    """Return the log-likelihoods of labels after texts, `(texts, labels)`, as `megatrain evaluate --choices` does."""
    pairs = [service.scorer.encode(text, label) for text in texts for label in labels]
    tokens = [[*before, *after] for before, after in pairs]
    service.require_short(tokens)
    nats = np.zeros(len(pairs))
    async with ended_with(http.receive):
        for numbers in batches({n: len(each) for n, each in enumerate(tokens)}):
            work = partial(service.scorer.scores, [pairs[n] for n in numbers])
            for n, score in zip(
                numbers, await _read(service, work, [tokens[n] for n in numbers]), strict=True
            ):
                nats[n] = score.nats
    return nats.reshape(len(texts), len(labels)), sum(map(len, tokens))


async def _logits(service: Service, texts: Sequence[str], http: Request) -> tuple[np.ndarray, int]:
    """Return a classifier's logits, `(texts, labels)`, of documents as they are in training: ended."""
    tokenizer = service.trained.tokenizer
    tokens = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    service.require_short(tokens)
    rows: list[Any] = [None] * len(texts)
    async with ended_with(http.receive):
        for numbers in batches({n: len(each) for n, each in enumerate(tokens)}):
            batch = [tokens[n] for n in numbers]
            found = await _read(service, partial(service.scorer.last_logits, batch), batch)
            for n, logits in zip(numbers, found, strict=True):
                rows[n] = logits.double().numpy()
    return np.stack(rows), sum(map(len, tokens))


async def _read(service: Service, work: Callable[[], T], texts: Sequence[Sequence[int]]) -> T:
    found = await service.engine.compute(work)
    service.metrics.prompt_tokens.inc(sum(map(len, texts)))
    return found


def _chosen(index: int, row: np.ndarray, labels: Sequence[str], *, is_multi: bool) -> dict[str, Any]:
    """Return what one text is, from log-likelihoods or logits `(labels,)`."""
    logs = -np.logaddexp(0.0, -row) if is_multi else row - np.logaddexp.reduce(row)
    shares = np.exp(logs)
    likeliest = labels[int(row.argmax())]
    chosen = [label for label, share in zip(labels, shares, strict=True) if share > 0.5]
    return {
        "index": index,
        "label": likeliest,
        "chosen": chosen if is_multi else [likeliest],
        "probs": shares.tolist(),
        "logprobs": logs.tolist(),
        "num_classes": len(labels),
    }


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
