"""Load balancing of experts in training: the scale of the balance loss, and routing biases that follow the load."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatrain.nn.config import DecoderConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.moe import MoE


def _moe_layers(models: Iterable[Decoder]) -> Iterator[tuple[int, MoE]]:
    """Yield (index in the full model, MoE) of each layer that has experts."""
    for model in models:
        for index, block in model.blocks():
            if block.moe is not None:
                yield index, block.moe


def begin_balance(models: Iterable[Decoder], scale: float) -> None:
    """Set the scale of the balance losses before a step, whose loss is `scale` times the sum over all tokens."""
    for _, moe in _moe_layers(models):
        moe.balance.scale = scale


def take_expert_counts(models: Iterable[Decoder], cfg: DecoderConfig, device: torch.device) -> Tensor:
    """Return each expert's tokens since the last call, `(n_layers, n_experts)` int64; rows of other layers are 0.

    `models` are stages of one model. Devices that count their own tokens have to sum their results.
    """
    assert cfg.experts is not None
    found = torch.zeros(cfg.n_layers, cfg.experts.n_experts, dtype=torch.int64, device=device)
    for index, moe in _moe_layers(models):
        if moe.balance.counts is not None:
            found[index] += moe.balance.counts
        moe.balance.counts = None
    return found


def forget_expert_counts(models: Iterable[Decoder]) -> None:
    """Drop the counts of a step that is not taken."""
    for _, moe in _moe_layers(models):
        moe.balance.counts = None


@torch.no_grad()
def update_expert_bias(models: Iterable[Decoder], counts: Tensor, rate: float) -> None:
    """Move each expert's bias by `rate`: up where its load is below the mean, down where above (arXiv 2408.15664).

    counts: `(n_layers, n_experts)` of the global batch; a common factor changes nothing.
    """
    for index, moe in _moe_layers(models):
        bias = moe.expert_bias
        assert bias is not None
        load = counts[index]
        bias += rate * torch.sign(load.sum() - load * len(load)).to(bias.dtype)


def balance_experts(models: Iterable[Decoder], cfg: DecoderConfig, total: Callable[[Tensor], Tensor]) -> None:
    """Move the biases, after a step, by its global counts; `total` sums over all devices."""
    parts = list(models)
    if cfg.experts is None or cfg.experts.bias_rate is None:
        return
    device = next(p.device for part in parts for p in part.parameters())
    update_expert_bias(parts, total(take_expert_counts(parts, cfg, device)), cfg.experts.bias_rate)
