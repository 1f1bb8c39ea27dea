"""What rounding may put each element of an operation's results and gradients off, from what went into it.

Each function takes the operation's arguments in float64, the gradients of its outputs, and the true results by name
("output 0", "gradient 1"), and returns for each name what an element may be off, as `rounding.py` explains. Attention's
bounds are in `attention_truth.py`, since they need its probabilities. Newton-Schulz has none: five iterations of three
products each mix all elements, so only its matrices as a whole are bounded (`correctness.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rounding import Rounding
from megatrain_kernels.quantization.reference import FORMATS

Given = tuple[Any, ...]
Found = dict[str, Tensor]
Bounds = Callable[[Given, dict[str, Any], list[Tensor], Found, Rounding], Found]
FP8_SUMS = 2.0**-12
"""Of the terms' sizes: tensor cores of Hopper add fp8 products with about 14 bits (DeepSeek-V3, arXiv 2412.19437,
section 3.3.2)."""


def _norm(x: Tensor, weight: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inverse deviation, the normalized rows, and the sizes of the terms of these."""
    mean = x.mean(-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
    inverse = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return inverse, (x - mean) * inverse, (x.abs() + mean.abs()) * inverse


def rms_norm(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Bound RMSNorm: two roundings of a result, three where a sum with the residual is rounded before it."""
    x, weight, eps, *residual = given
    total = x + residual[0] if residual else x
    inverse, normed, _ = _norm(total, weight, eps, centred=False)
    inner = (grads[0] * weight).abs()
    size = inverse * (inner + normed.abs() * (inner * normed.abs()).mean(-1, keepdim=True))
    stored = r.u * size if residual else 0.0  # the sum is read as it was stored
    size = size + (grads[1].abs() if residual else 0.0)
    found = {
        "output 0": (3 if residual else 2) * r.u * truth["output 0"].abs() + r.e * truth["output 0"].abs()
    }
    if residual:
        found["output 1"] = r.u * total.abs() + r.e * (x.abs() + residual[0].abs())
    by_row = (grads[0] * normed).abs()
    found["gradient 0"] = 2 * r.u * truth["gradient 0"].abs() + stored + r.e * size
    found["gradient 1"] = (
        2 * r.u * truth["gradient 1"].abs()
        + (r.u * r.of_terms(by_row.sum(0), by_row.square().sum(0)) if residual else 0.0)
        + r.e * by_row.sum(0)
    )
    return found | ({"gradient 3": found["gradient 0"]} if residual else {})


def layer_norm(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound LayerNorm by its terms, which partly cancel; a sum with the residual is rounded before it."""
    x, weight, bias, eps, *residual = given
    total = x + residual[0] if residual else x
    inverse, normed, size = _norm(total, weight, eps, centred=True)
    inner = (grads[0] * weight).abs()
    terms = inner + inner.mean(-1, keepdim=True) + normed.abs() * (inner * size).mean(-1, keepdim=True)
    stored = r.u if residual else 0.0  # the sum is read as it was stored
    above = grads[1].abs() if residual else 0.0
    by_row = grads[0].abs() * size
    found = {
        "output 0": 2 * r.u * truth["output 0"].abs() + (stored + r.e) * (size * weight.abs() + bias.abs()),
        "gradient 0": 2 * r.u * truth["gradient 0"].abs() + (stored + r.e) * inverse * terms + r.e * above,
        "gradient 1": 2 * r.u * truth["gradient 1"].abs()
        + stored * r.of_terms(by_row.sum(0), by_row.square().sum(0))
        + r.e * by_row.sum(0),
        "gradient 2": 2 * r.u * truth["gradient 2"].abs() + r.e * grads[0].abs().sum(0),
    }
    if residual:
        found["output 1"] = r.u * total.abs() + r.e * (x.abs() + residual[0].abs())
        found["gradient 4"] = found["gradient 0"]
    return found


def bias_gelu(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Bound GELU of a sum: its slope is at most 1.13, and that of its slope at most 0.8.

    PyTorch's path rounds the sum before the function, and a gradient's terms before they are added up.
    """
    x, bias = given
    size, total, above = x.abs() + bias.abs(), (x + bias).abs(), grads[0].abs()
    terms, rounded = above * (2 + size), above * total + truth["gradient 0"].abs()
    return {
        "output 0": r.u * (2 * truth["output 0"].abs() + 1.13 * total) + r.e * 2 * size,
        "gradient 0": 2 * r.u * truth["gradient 0"].abs() + r.u * above * total + r.e * terms,
        "gradient 1": 2 * r.u * truth["gradient 1"].abs()
        + r.u * r.of_terms(rounded.sum(0), rounded.square().sum(0))
        + r.e * terms.sum(0),
    }


def gate(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Bound SwiGLU and GeGLU: products of three numbers, of which the gate's derivative is a sum."""
    gate, up = given
    above = grads[0].abs()
    return {
        "output 0": 2 * r.u * truth["output 0"].abs() + r.e * (gate * up).abs(),
        "gradient 0": 2 * r.u * truth["gradient 0"].abs() + r.e * above * up.abs() * (1 + gate.abs()),
        "gradient 1": 2 * r.u * truth["gradient 1"].abs() + r.e * above * gate.abs(),
    }


def rotary(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Bound rotations: each number is a sum of two products."""
    cos, sin = (torch.cat([t, t], -1).abs().unsqueeze(-2) for t in given[2:])

    def size(x: Tensor) -> Tensor:
        first, second = x.abs().chunk(2, -1)
        return x.abs() * cos + torch.cat([second, first], -1) * sin

    pairs = {**{f"output {n}": given[n] for n in (0, 1)}, **{f"gradient {n}": grads[n] for n in (0, 1)}}
    return {name: 2 * r.u * truth[name].abs() + r.e * size(x) for name, x in pairs.items()}


def _loss(
    logits: Tensor, targets: Tensor, options: dict[str, Any], above: Tensor, relative: float, r: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """Bound a mean loss: it, and the gradient of logits that are off by `relative` of themselves; and that gradient."""
    cap, z = options.get("softcap"), options.get("z_loss", 0.0)
    bent = logits if cap is None else cap * (logits / cap).tanh()
    slope = 1.0 if cap is None else 1 - (bent / cap).square()
    p, lse = bent.softmax(-1), bent.logsumexp(-1, keepdim=True)
    hot = torch.zeros_like(p).scatter_(-1, targets.unsqueeze(-1), 1.0)
    factor = above.abs() / targets.numel()
    off = relative * logits.abs() + r.e * (1 + logits.abs() + (cap or 0.0))  # of each logit
    mean_off = (p * off).sum(-1, keepdim=True)
    picked = bent.gather(-1, targets.unsqueeze(-1))
    loss_off = mean_off + (hot * off).sum(-1, keepdim=True) + r.e * (lse.abs() + picked.abs())
    loss_off = loss_off + z * (2 * lse.abs() * mean_off + r.e * lse.square())
    gradient = factor * slope * (p * (1 + 2 * z * lse) - hot)
    rows = factor * (p * (1 + 2 * z * lse.abs()) * (off + mean_off + r.e) + r.e * hot)
    rows = rows + 2 * z * factor * p * mean_off
    if cap is not None:
        rows = rows + factor * (p * (1 + 2 * z * lse.abs()) + hot) * (2 * off / cap)
    return loss_off.mean(), rows, gradient


def cross_entropy(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound the loss, and each logit's gradient: a stored probability, its difference, and that times a factor."""
    logits, targets = given
    loss, rows, gradient = _loss(logits, targets, options, grads[0], 0.0, r)
    return {"output 0": loss, "gradient 0": 3 * r.u * gradient.abs() + rows}


def linear_cross_entropy(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound the fused loss, whose logits and their gradients are stored in the inputs' type between the products."""
    x, weight, targets = given
    logits, inner = x @ weight.T, x.abs() @ weight.abs().T
    loss, rows, gradient = _loss(logits, targets, options, grads[0], r.u, r)
    rows = rows + gradient.abs() * r.u + r.e * gradient.abs() * inner
    squares = rows.square()
    found = {}
    for name, product, terms, more in (
        ("gradient 0", (rows, weight.abs()), (squares, weight.square()), gradient.abs() @ weight.abs()),
        ("gradient 1", (rows.T, x.abs()), (squares.T, x.square()), gradient.abs().T @ x.abs()),
    ):
        size = r.of_terms(product[0] @ product[1], terms[0] @ terms[1])
        # Stored, added to other chunks' and scaled.
        found[name] = 3 * r.u * truth[name].abs() + 2 * size + r.e * more
    return {"output 0": loss, **found}


def grouped_gemm(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound the products of each group by the sizes of their terms."""
    x, weights, sizes = given
    groups = list(
        zip(x.abs().split(sizes.tolist()), grads[0].abs().split(sizes.tolist()), weights.abs(), strict=True)
    )
    inner = {
        "output 0": torch.cat([rows @ weight.T for rows, _, weight in groups]),
        "gradient 0": torch.cat([above @ weight for _, above, weight in groups]),
        "gradient 1": torch.stack([above.T @ rows for rows, above, _ in groups]),
    }
    return {name: r.u * truth[name].abs() + r.e * size for name, size in inner.items()}


def scaled_matmul(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound the product of fp8 numbers by the sizes of its terms; `truth` has these as "size"."""
    return {"output 0": r.u * truth["output 0"].abs() + FP8_SUMS * truth["size"]}


def quantize(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Let a code be its neighbour, since a quotient between two may be rounded either way, and bound the scales."""
    form = FORMATS[options["dtype"]]
    values = truth["output 0"]
    if form.mantissa:
        least = 2.0 ** (1 - form.bias)
        step = torch.exp2(values.abs().clamp(min=least).log2().floor() - form.mantissa)
    else:
        step = torch.ones_like(values)
    return {"output 0": step, "output 1": r.e * truth["output 1"]}


def dequantize(
    given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding
) -> Found:
    """Bound a product of two numbers."""
    return {"output 0": (r.u + r.e) * truth["output 0"].abs()}


def moe_gate(given: Given, options: dict[str, Any], grads: list[Tensor], truth: Found, r: Rounding) -> Found:
    """Bound scores and weights by themselves, and the gradient by the sums over a token's experts."""
    scores, weights = truth["output 1"], truth["output 0"]
    total = (grads[1].abs() * scores).sum(-1, keepdim=True)
    picked = (grads[0].abs() * weights).sum(-1, keepdim=True)
    size = (
        scores * (grads[1].abs() + total)
        + picked
        + grads[0].abs().amax(-1, keepdim=True) * weights.amax(-1, keepdim=True)
    )
    size = size * (1 + given[0].abs().amax(-1, keepdim=True))
    return {
        "output 0": r.e * weights * (1 + given[0].abs().amax(-1, keepdim=True)),
        "output 1": r.e * scores * (1 + given[0].abs().amax(-1, keepdim=True)),
        "gradient 0": r.e * size,
    }


BOUNDS: dict[str, Bounds] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "bias_gelu": bias_gelu,
    "swiglu": gate,
    "geglu": gate,
    "rotary": rotary,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "grouped_gemm": grouped_gemm,
    "scaled_matmul": scaled_matmul,
    "quantize": quantize,
    "dequantize": dequantize,
    "moe_gate": moe_gate,
}
"""By the operation's name."""
