"""How fast a model scores and generates."""

import logging
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from megatrain.models.generate import Generation, Request, blocks_needed
from megatrain.models.sampling import Sampling
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear
from megatrain.train.inference import TrainedModel

ROUNDS = 3
TOKENS = 1024
"""Tokens of a pass that are scored."""
PROMPT, GENERATED = 16, 32


@torch.no_grad()
def speed(trained: TrainedModel) -> dict[str, float]:
    """Return tokens a second of scoring full sequences, and of generating one text greedily: medians of three."""
    model, seq_len = trained.parallel.models[0], trained.context
    rows = max(1, TOKENS // seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(trained.cfg.model.vocab_size, (rows, seq_len), generator=generator)
    tokens = tokens.to(trained.parallel.device)

    def score() -> int:
        model(tokens).sum().item()
        return tokens.numel()

    prompt = tokens[0, : min(PROMPT, seq_len // 2)].tolist()
    wanted = min(GENERATED, seq_len - len(prompt))
    request = Request(prompt=prompt, max_new_tokens=wanted, sampling=Sampling(temperature=0.0))

    def decode() -> int:
        made = Generation(
            trained.packed(), context=seq_len, n_blocks=blocks_needed([request], context=seq_len)
        )
        made.add(request)
        count = 0
        while made.is_busy:
            count += sum(each.token is not None for each in made.step())
        return count

    return {"scored_tokens_per_sec": _rate(score), "generated_tokens_per_sec": _rate(decode)}


def _rate(work: Callable[[], int]) -> float:
    work()
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def can_compute_in_int8() -> bool:
    """Tell whether torchao, whose int8 layers are measured, is installed."""
    return find_spec("torchao") is not None


def compute_in_int8(model: Decoder, *, quantizes_inputs: bool) -> None:
    """Let torchao compute the linear layers of the blocks from int8 weights, and int8 inputs if they are quantized."""
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # what they log of GPU parts that this machine lacks is no news
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if quantizes_inputs else Int8WeightOnlyConfig()
    quantize_(
        model,
        config,
        filter_fn=lambda module, name: isinstance(module, Linear) and name.startswith("layers."),
    )
