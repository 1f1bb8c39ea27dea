"""Perplexity and bits per byte of given text."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatrain.data.sources.corpus import find_corpus
from megatrain.train.scoring import Scorer

Pair = tuple[list[int], list[int]]
DOCUMENTS = 256
"""Documents that are scored together."""


def windows(tokens: Sequence[int], first: int, *, context: int, stride: int) -> Iterator[Pair]:
    """Yield (context, tokens to be predicted) so that each token of a document is predicted once.

    Args:
        first: the token before the document.
        context: most tokens that the model sees. stride: tokens that are predicted at a time; the others of a window
            are what precedes them, so that a smaller one gives each token more to go by.
    """
    text = [first, *tokens]
    start = 1
    while start < len(text):
        end = min(len(text), start + (context if start == 1 else stride))
        begin = max(0, end - 1 - context)
        yield text[begin:start], text[start:end]
        start = end


def perplexity(
    scorer: Scorer, paths: Sequence[str], *, field: str, stride: int, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Return how well the model predicts the documents of `paths`, which are as `data.path` takes them.

    Each document is predicted from its first token on, by itself.

    Args:
        field: of rows that hold the text.

    Raises:
        UserError: a path has no text.
    """
    trained = scorer.trained
    nats, n_tokens, n_bytes, n_documents = 0.0, 0, 0, 0
    corpus = find_corpus(tuple(paths), text_field=field)
    waiting: list[Pair] = []
    for document in corpus.documents():
        ids = trained.tokenizer.encode(document.text)
        waiting += windows(ids, trained.tokenizer.eos_id, context=trained.context, stride=stride)
        n_tokens += len(ids)
        n_bytes += len(document.text.encode())
        n_documents += 1
        if len(waiting) >= DOCUMENTS:
            nats -= sum(score.nats for score in scorer.scores(waiting))
            waiting = []
            progress(f"scoring, document {n_documents}", 0.0)
    nats -= sum(score.nats for score in scorer.scores(waiting))
    loss = nats / max(n_tokens, 1)
    return {
        "documents": n_documents,
        "tokens": n_tokens,
        "bytes": n_bytes,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / (math.log(2) * max(n_bytes, 1)),
    }
