"""Autoregressive generation, one token at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    max_new_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that follow `prompt` (at least one id).

    Args:
        context: number of most recent tokens that the model sees.
        temperature: 0 is greedy decoding.
        top_k: sample from the k most likely tokens.
        top_p: nucleus sampling: sample from the most likely tokens with this total probability (arXiv 1904.09751).
        stop: end-of-text token, which ends generation and is not yielded.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        token = _draw(model(window)[0, -1].float().cpu(), (temperature, top_k, top_p), generator)
        if token == stop:
            return
        tokens.append(token)
        yield token


def _draw(logits: Tensor, how: tuple[float, int | None, float | None], generator: torch.Generator) -> int:
    """Draw one token from logits `(vocab,)`; `how` is (temperature, top_k, top_p)."""
    temperature, top_k, top_p = how
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        likeliest, token = probabilities.sort(descending=True)
        up_to = likeliest.cumsum(0)
        probabilities[token[1:][up_to[:-1] >= top_p]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
