"""AWQ (arXiv 2306.00978): inputs with large activations are scaled up before rounding, and what makes them down.

The scales are folded into the operation before: a norm, or the product whose outputs these inputs are. So the model
computes the same, and its files have the same tensors, until weights are rounded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.compress.calibration import Moments
from megatrain.compress.codes import Codes, Grid, round_to_nearest, squared_error
from megatrain.compress.gptq import fitted_scales
from megatrain.nn.config import GATED, DecoderConfig

EXPONENTS = tuple(step / 20 for step in range(20))
"""Exponents of the activations' mean size that are tried (section 3.2, equation 5)."""


@dataclass(frozen=True)
class Fold:
    """Products that share their inputs, and the operation that makes these."""

    consumers: tuple[str, ...]
    """Names in the block."""
    producer: str
    """A norm, or a product."""
    serves: int = 1
    """Heads of the inputs that come from one head of the producer."""
    head: int = 1
    """Inputs of a head."""


def folds(cfg: DecoderConfig, layer: int) -> Iterator[Fold]:
    """Yield where block `layer` of a model without experts can be scaled."""
    if cfg.mla is None:
        yield Fold(("attn.wq", "attn.wk", "attn.wv"), "attn_norm")
        yield Fold(("attn.wo",), "attn.wv", cfg.n_heads // cfg.kv_heads, cfg.v_head_dim)
    else:
        wq = "attn.wq" if cfg.mla.q_lora_rank is None else "attn.wq_down"
        yield Fold((wq, "attn.wkv_down", "attn.wk_rope"), "attn_norm")
        yield Fold(("attn.wkv_up",), "attn.kv_norm")
        if cfg.mla.q_lora_rank is not None:
            yield Fold(("attn.wq_up",), "attn.q_norm")
    if cfg.activation in GATED:  # linear in `up`; other activations are not scaled as their inputs are
        yield Fold(("mlp.gate", "mlp.up"), "mlp_norm")
        yield Fold(("mlp.down",), "mlp.up")
    else:
        yield Fold(("mlp.up",), "mlp_norm")


def search_scales(weights: list[Tensor], moments: Moments, grid: Grid, fold: Fold) -> Tensor:
    """Return the factors `(in,)` of the inputs under which rounding `weights` `(out, in)` is wrong the least.

    s = (mean |x|)^a with a of `EXPONENTS`, divided by sqrt(max s · min s) as in AWQ's code, against
    ||(Q(W s) / s - W) x||² summed over the calibration inputs.
    """
    size = _shared(moments.mean_size, fold)
    best, least = torch.ones_like(size), torch.inf
    for exponent in EXPONENTS:
        scale = size.clamp(min=1e-4) ** exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            wrong = round_to_nearest(weight * scale, grid).numbers() / scale - weight
            error += float(squared_error(wrong, moments.gram).sum())
        if error < least:
            best, least = scale, error
    return best


def _shared(size: Tensor, fold: Fold) -> Tensor:
    """Return `size` `(in,)` as a mean over the heads that one head of the producer serves."""
    if fold.serves == 1:
        return size
    heads = size.unflatten(0, (-1, fold.serves, fold.head))
    return heads.mean(1, keepdim=True).expand_as(heads).flatten()


def fold_scales(named: Mapping[str, Tensor], fold: Fold, scale: Tensor) -> None:
    """Multiply the consumers' inputs by `scale`, and divide what makes them, bias included.

    Args:
        named: parameters of the block by name, changed in place.
    """
    for name in fold.consumers:
        named[f"{name}.weight"].mul_(scale)
    if fold.serves > 1:
        scale = scale.unflatten(0, (-1, fold.serves, fold.head))[:, 0].flatten()
    weight, bias = named[f"{fold.producer}.weight"], named.get(f"{fold.producer}.bias")
    weight.div_(scale if weight.ndim == 1 else scale[:, None])
    if bias is not None:
        bias.div_(scale)


def awq(
    cfg: DecoderConfig, layer: int, named: Mapping[str, Tensor], moments: Mapping[str, Moments], grid: Grid
) -> dict[str, Codes]:
    """Scale a block's weights in place, and return the codes of its products by parameter name in the block.

    After scaling, the scale of each group is fitted to the calibration inputs (the clipping of AWQ's section 3.2).

    Args:
        named, moments: by parameter name in the block.
    """
    grams = {name: each.gram for name, each in moments.items()}
    for fold in folds(cfg, layer):
        weights = [named[f"{name}.weight"].double() for name in fold.consumers]
        scale = search_scales(weights, moments[f"{fold.consumers[0]}.weight"], grid, fold)
        fold_scales(named, fold, scale.to(weights[0].dtype))
        for name in fold.consumers:
            grams[f"{name}.weight"] = grams[f"{name}.weight"] / (scale[:, None] * scale)
    found = {}
    for name, gram in grams.items():
        weight = named[name].double()
        scales = fitted_scales(weight, gram, grid)
        found[name] = Codes(grid.round(weight, scales), scales, grid)
    return found
