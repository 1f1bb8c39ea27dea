"""Sparsity: weights that matter least become zero, by magnitude or by Wanda (arXiv 2306.11695)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatrain.compress.calibration import walk
from megatrain.compress.methods import Sparsity
from megatrain.data.loader import Batch
from megatrain.nn.decoder import Decoder

Progress = Callable[[str, float], None]


@torch.no_grad()
def sparsify_model(
    model: Decoder,
    names: Sequence[str],
    method: Sparsity,
    sparsity: float,
    *,
    batches: Sequence[Batch] = (),
    progress: Progress,
) -> None:
    """Set weights of the parameters `names` to zero.

    Args:
        sparsity: share of the weights that becomes zero; of no account in two of four, where it is a half.
        batches: calibration text, where the method needs it.
    """
    done = set()
    if method.weighs_inputs:
        for layer, _, moments in walk(model, batches):
            progress(f"pruning, layer {layer + 1}", layer / model.cfg.n_layers)
            for name in moments.keys() & set(names):
                weight = model.get_parameter(name)
                kept = kept_weights(weight, moments[name].norm, method, sparsity)
                weight.mul_(kept)
                done.add(name)
    for name in names:
        if name not in done:
            weight = model.get_parameter(name)
            weight.mul_(kept_weights(weight, None, method, sparsity))


def kept_weights(weight: Tensor, norm: Tensor | None, method: Sparsity, sparsity: float) -> Tensor:
    """Return which weights of `weight` `(..., out, in)` are kept: bool of its shape.

    Wanda's score is |w| times the 2-norm of the input over the calibration tokens, compared within each output;
    magnitudes are compared within the whole matrix. In two of four both are compared within four neighbouring inputs.

    Args:
        norm: `(..., in)`; None: by magnitude.
    """
    score = weight.abs().double() if norm is None else weight.abs().double() * norm.unsqueeze(-2)
    if method.is_two_of_four:
        return _largest(score.unflatten(-1, (-1, 4)), 2).flatten(-2)
    if norm is None:
        size = score.shape[-2:].numel()
        return _largest(score.flatten(-2), size - int(sparsity * size)).view_as(weight)
    size = score.shape[-1]
    return _largest(score, size - int(sparsity * size))


def _largest(score: Tensor, count: int) -> Tensor:
    """Return where the `count` largest scores along the last dimension are; of equal ones the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter(-1, order[..., :count], True)
