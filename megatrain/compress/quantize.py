"""Quantization of a model in memory: codes for its products, and in the model the numbers that they stand for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatrain.compress.awq import awq
from megatrain.compress.calibration import Moments, walk
from megatrain.compress.codes import Codes, Grid, round_to_nearest
from megatrain.compress.gptq import gptq
from megatrain.compress.methods import Quantization
from megatrain.data.loader import Batch
from megatrain.nn.decoder import Decoder

Progress = Callable[[str, float], None]


@torch.no_grad()
def quantize_model(
    model: Decoder,
    names: Sequence[str],
    method: Quantization,
    grid: Grid,
    *,
    batches: Sequence[Batch] = (),
    progress: Progress,
) -> dict[str, Codes]:
    """Return the codes of the parameters `names`; the model then has the numbers that they stand for.

    Args:
        batches: calibration text, where the method needs it.
    """
    found: dict[str, Codes] = {}
    inside = [name for name in names if name.startswith("layers.")]
    if method.needs_text:
        for layer, block, moments in walk(model, batches):
            progress(f"quantizing, layer {layer + 1}", layer / model.cfg.n_layers)
            prefix = f"layers.{layer}."
            named = {name: each.detach() for name, each in block.named_parameters()}
            own = {name.removeprefix(prefix): each for name, each in moments.items() if name in inside}
            if method.fit == "awq":
                codes = awq(model.cfg, layer, named, own, grid)
            else:
                codes = {name: _gptq(named[name], each, grid) for name, each in own.items()}
            for name, each in codes.items():
                named[name].copy_(each.numbers())
                found[prefix + name] = each
    for name in names:
        if name not in found:  # a method without text, or the head
            weight = model.get_parameter(name)
            found[name] = round_to_nearest(weight.detach(), grid)
            weight.copy_(found[name].numbers())
    return found


def _gptq(weight: Tensor, moments: Moments, grid: Grid) -> Codes:
    """Quantize a matrix, or each of a stack."""
    if weight.ndim == 2:
        return gptq(weight, moments.gram, grid)
    each = [gptq(matrix, gram, grid) for matrix, gram in zip(weight, moments.gram, strict=True)]
    return Codes(torch.stack([c.values for c in each]), torch.stack([c.scales for c in each]), grid)
