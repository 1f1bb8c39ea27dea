"""The model that a server has, and what is checked before it is asked."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain.config.errors import UserError
from megatrain.models.generate import Generation, Request
from megatrain.models.hidden import Embedder
from megatrain.models.sampling import Sampling
from megatrain.nn.decoder import Decoder
from megatrain.serve.engine import Engine
from megatrain.serve.errors import RefusedError
from megatrain.serve.limits import MAX_TEXTS, Limits
from megatrain.serve.metrics import Metrics
from megatrain.serve.prompts import Prompt, Prompts
from megatrain.serve.schemas import Generating
from megatrain.train.generation import TextRequest
from megatrain.train.inference import TrainedModel
from megatrain.train.scoring import Scorer

GIB = 1 << 30


class Way(NamedTuple):
    """How the answers of one request are generated, beside what `Generating` says."""

    most: int | None
    """Most tokens; None: what the context has room for."""
    logprobs: int | None
    ends: frozenset[int]
    stops: tuple[str, ...] = ()


class Service:
    """One trained model, its engine, and the limits of what is asked of it."""

    def __init__(
        self,
        trained: TrainedModel,
        directory: Path,
        *,
        name: str,
        limits: Limits,
        cache_gib: float = 1.0,
        pooling: str = "mean",
    ) -> None:
        """Take a model that is whole, in this process.

        Args:
            directory: it was loaded from. name: by which requests call it. cache_gib: most memory for keys and values.
            pooling: of embeddings; see `Embedder`.

        Raises:
            UserError: the cache is too small for one text, or the chat template can't be read.
        """
        (decoder,) = trained.parallel.models
        assert isinstance(decoder, Decoder)
        self.trained = trained
        self.name = name
        self.limits = limits
        self.created = int(time.time())
        self.metrics = Metrics()
        self.prompts = Prompts(directory, trained.tokenizer, decoder.cfg.vocab_size)
        blocks = _blocks(trained, cache_gib, limits.batch)
        generation = Generation(
            trained.packed(), context=trained.context, n_blocks=blocks, max_batch=limits.batch
        )
        self.engine = Engine(generation, self.metrics, most_texts=limits.texts)
        self.scorer = Scorer(trained)
        self.embedder = Embedder(decoder, context=trained.context, pooling=pooling)
        self.is_draining = False
        self.classifier = trained.cfg.model.classifier if trained.parallel.plan.has_classifier else None
        """Its labels, if the model was trained to tell them; it generates no text then."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine in the `with` block."""
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()

    def require_model(self, name: str) -> None:
        """Refuse a request that calls another model.

        Raises:
            RefusedError: it does.
        """
        if name != self.name:
            raise RefusedError(
                404,
                f"There is no model {name!r} here, but {self.name!r}.",
                code="model_not_found",
                param="model",
            )

    def require_language_model(self) -> None:
        """Refuse to generate text with a classifier.

        Raises:
            RefusedError: the model is one.
        """
        if self.classifier is not None:
            raise RefusedError(
                400,
                f"{self.name} is a classifier, which predicts labels and no tokens: ask /v1/classify.",
                code="unsupported",
                param="model",
            )

    def requests(self, asked: Generating, prompts: Sequence[Prompt], way: Way) -> list[TextRequest]:
        """Return a request for each answer: `n` to the first prompt, `n` to the next.

        Raises:
            RefusedError: they are too many, or too long.
        """
        count = asked.n or 1
        most = min(self.limits.texts, MAX_TEXTS)
        if count * len(prompts) > most:
            raise RefusedError(
                400,
                f"{len(prompts)} prompts with {count} answers each are too many: {most} are the most in all.",
                code="too_many_texts",
                param="n",
            )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        sampling = Sampling(
            repetition_penalty=_or(asked.repetition_penalty, 1.0),
            temperature=_or(asked.temperature, 1.0),
            top_k=asked.top_k,
            top_p=None if asked.top_p in (None, 1.0) else asked.top_p,
            min_p=asked.min_p or None,
        )
        return [
            TextRequest(
                prompt=prompt.text,
                ids=prompt.ids,
                tokens=self._most_tokens(prompt, way.most),
                sampling=replace(sampling, seed=(seed + number) % 2**63),
                stop=(*stop, *way.stops),
                ends=way.ends,
                logprobs=way.logprobs,
            )
            for prompt in prompts
            for number in range(count)
        ]

    def _most_tokens(self, prompt: Prompt, asked: int | None) -> int:
        room = self.trained.context - len(prompt.ids)
        most = self.limits.max_tokens
        if room < 1 or (asked is not None and asked > room):
            wanted = "" if asked is None else f" and an answer of {asked}"
            raise RefusedError(
                400,
                f"The model sees {self.trained.context} tokens, and the prompt has {len(prompt.ids)}{wanted}: they do "
                "not fit.",
                code="context_length_exceeded",
            )
        if asked is not None and most is not None and asked > most:
            raise RefusedError(
                400,
                f"max_tokens is {asked}, but {most} are the most here.",
                code="too_many_tokens",
                param="max_tokens",
            )
        return min(each for each in (room, asked, most) if each is not None)

    def require_short(self, texts: Sequence[Sequence[int]]) -> None:
        """Refuse texts that are longer than what the model sees.

        Raises:
            RefusedError: one is.
        """
        longest = max(map(len, texts))
        if longest > self.trained.context:
            raise RefusedError(
                400,
                f"The model sees {self.trained.context} tokens, and a text has {longest}.",
                code="context_length_exceeded",
                param="input",
            )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _blocks(trained: TrainedModel, gib: float, batch: int) -> int:
    """Return how many blocks the cache has: as many as fit, and no more than a full batch needs.

    What a block takes is seen in a pass over one token, which also shows that the model runs.

    Raises:
        UserError: one text of full length does not fit.
    """
    probe = Generation(trained.packed(), context=trained.context, n_blocks=1)
    probe.add(Request(prompt=[0], max_new_tokens=1, sampling=Sampling(temperature=0)))
    probe.step()
    cache = probe.runner.cache
    fitting = int(gib * GIB) // cache.n_bytes
    text = cache.blocks_for(trained.context)
    if fitting < text:
        raise UserError(
            f"serve: --cache-gib {gib:g}: a text of {trained.context} tokens needs {text * cache.n_bytes / GIB:.2g} "
            "GiB for its keys and values; give more"
        )
    if trained.parallel.device.type == "cuda":
        torch.cuda.empty_cache()
    return min(fitting, text * batch)
