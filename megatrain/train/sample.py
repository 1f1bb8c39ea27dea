"""A sample of text from a model."""

from collections.abc import Iterator

from torch import nn

from megatrain.data.tokenizer import Tokenizer
from megatrain.models.generate import generate


def continue_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; an empty prompt starts a new document."""
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    produced: list[int] = []
    shown = ""
    for token in generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        context=context,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop=tokenizer.eos_id,
    ):
        produced.append(token)
        text = tokenizer.decode(produced)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # a character whose bytes are not complete yet
        yield text[len(shown) :]
        shown = text
