"""The public implementations that operations are compared with: PyTorch's own, and Liger's where it is installed.

Each is made for inputs at hand, since some prepare something that is not to be timed (a block mask), and takes the
tensors. None: it has nothing for this case.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatrain_kernels.moe_gate.reference import GateRule, gate_reference
from megatrain_kernels.newton_schulz.reference import COEFFICIENTS, EPS
from megatrain_kernels.quantization.reference import quantize_reference

Run = Callable[..., Any]
Tensors = tuple[Tensor, ...]
Options = dict[str, Any]


class Peer(NamedTuple):
    """Another implementation."""

    make: Callable[[Tensors, Options], Run | None]
    compiled: bool = False
    """By torch.compile, which takes many seconds: timed after all others, and on GPUs only."""


def plain(function: Run) -> dict[str, Peer]:
    """`function(*tensors, **options)` as PyTorch runs it, and compiled."""

    def eager(tensors: Tensors, options: Options) -> Run:
        return lambda *given: function(*given, **options)

    def compiled(tensors: Tensors, options: Options) -> Run:
        return torch.compile(eager(tensors, options), dynamic=False)

    return {"torch eager": Peer(eager), "torch.compile": Peer(compiled, compiled=True)}


def liger(name: str, call: Callable[..., Any]) -> dict[str, Peer]:
    """`call(Liger's function of that name, *tensors, **options)` where the package is installed."""
    if not find_spec("liger_kernel"):
        return {}

    def make(tensors: Tensors, options: Options) -> Run:
        function = getattr(import_module("liger_kernel.transformers.functional"), name)
        return lambda *given: call(function, *given, **options)

    return {"Liger": Peer(make)}


def _sees_all(tensors: Tensors, options: Options) -> bool:
    return not options.get("causal", True) or options.get("q_offset", 0) >= tensors[1].shape[1] - 1


def _sdpa(backend: SDPBackend) -> Peer:
    """torch's fused attention by one backend, where no mask is needed but the causal one."""

    def make(tensors: Tensors, options: Options) -> Run | None:
        full = _sees_all(tensors, options)
        square = tensors[0].shape[1] == tensors[1].shape[1] and not options.get("q_offset", 0)
        if set(options) - {"causal", "q_offset"} or not (full or square):
            return None
        if backend == SDPBackend.CUDNN_ATTENTION and tensors[0].device.type != "cuda":
            return None
        grouped = tensors[0].shape[2] != tensors[1].shape[2]

        def run(*given: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in given)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=not full, enable_gqa=grouped)
            return out.transpose(1, 2)

        return run

    return Peer(make)


def _flex(tensors: Tensors, options: Options) -> Run:
    """flex_attention, compiled; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, _ = tensors
    window, offset = options.get("window"), options.get("q_offset", 0)
    cap: float = options.get("softcap", 0.0)
    doc_ids: Tensor | None = options.get("doc_ids")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + offset
        seen = key <= position if options.get("causal", True) else key >= 0
        if window is not None:
            seen = seen & (key > position - window)
        if doc_ids is not None:
            seen = seen & (doc_ids[batch, position] == doc_ids[batch, key])
        return seen

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    masked = not _sees_all(tensors, options) or window is not None or doc_ids is not None
    rows = None if doc_ids is None else q.shape[0]
    mask = create_block_mask(visible, rows, None, q.shape[1], k.shape[1], q.device) if masked else None
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[2] != k.shape[2]

    def run(*given: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in given)
        score = capped if cap else None
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return run


ATTENTION = {
    "torch flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex_attention": Peer(_flex, compiled=True),
}


def _grouped(tensors: Tensors, options: Options) -> Run | None:
    """torch's grouped product, where this version has it."""
    product = getattr(F, "grouped_mm", None)
    if product is None:
        return None
    return lambda x, weights, sizes: product(x, weights.mT, offs=sizes.cumsum(0).to(torch.int32))


GROUPED_GEMM = {"torch grouped_mm": Peer(_grouped)}


def _loss(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, softcap: float | None = None) -> Tensor:
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets)
    return loss if z_loss == 0 else loss + z_loss * logits.logsumexp(-1).square().mean()


def _linear_loss(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _loss(x @ weight.T, targets, **options)


def _first(made: Any) -> Tensor:
    """The loss, beside which Liger's versions return other things or none."""
    loss: Tensor = made[0] if isinstance(made, tuple) else made
    return loss


def _liger_loss(function: Run, logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    renamed = {"z_loss": "lse_square_scale"}
    return _first(function(logits, targets, **{renamed.get(k, k): v for k, v in options.items()}))


def _liger_linear_loss(function: Run, x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _liger_loss(lambda *given, **named: function(x, weight, given[1], **named), x, targets, **options)


CROSS_ENTROPY = plain(_loss) | liger("liger_cross_entropy", _liger_loss)
LINEAR_CROSS_ENTROPY = plain(_linear_loss) | liger("liger_fused_linear_cross_entropy", _liger_linear_loss)


def _newton_schulz(update: Tensor, *, steps: int = 5) -> Tensor:
    """Plain products in bf16."""
    a, b, c = COEFFICIENTS
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


NEWTON_SCHULZ = plain(_newton_schulz)


def _quantize(x: Tensor, *, dtype: str, scaling: str, group_size: int = 128) -> tuple[Tensor, Tensor]:
    return quantize_reference(x, dtype, scaling, group_size)


QUANTIZATION = plain(_quantize)


def _gate(
    logits: Tensor,
    *,
    top_k: int,
    scores: str = "softmax",
    scale: float = 1.0,
    n_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    rule = GateRule(top_k, scores, True, scale, n_groups, top_groups)
    _, weights, found = gate_reference(logits, None, rule)
    return weights, found


MOE_GATE = plain(_gate)


def _scaled_mm(tensors: Tensors, options: Options) -> Run | None:
    """torch's own product, which takes one scale each, or one a row each."""
    a, b, scale_a, scale_b = tensors
    by_row = scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    if not (by_row or scale_a.ndim == scale_b.ndim == 0):
        return None
    return lambda a, b, scale_a, scale_b: torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16
    )


def _bf16_product(tensors: Tensors, options: Options) -> Run:
    """What fp8 is to beat."""
    a, b = (t.to(torch.bfloat16) for t in tensors[:2])
    return lambda *_: a @ b


SCALED_MATMUL = {"torch _scaled_mm": Peer(_scaled_mm), "torch bf16 product": Peer(_bf16_product)}


def _rms_norm(x: Tensor, weight: Tensor, *residual: Tensor, eps: float) -> Any:
    total = x + residual[0] if residual else x
    out = F.rms_norm(total, weight.shape, weight, eps)
    return (out, total) if residual else out


def _liger_rms_norm(function: Run, x: Tensor, weight: Tensor, *residual: Tensor, eps: float) -> Any:
    total = x + residual[0] if residual else x
    out = function(total, weight, eps, in_place=False)
    return (out, total) if residual else out


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    c, s = (torch.cat([t, t], -1).unsqueeze(-2).to(q.dtype) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * c + torch.cat([-second, first], -1) * s

    return turn(q), turn(k)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _as_is(function: Run, *tensors: Tensor, **options: Any) -> Any:
    return function(*tensors, **options)


RMS_NORM = plain(_rms_norm) | liger("liger_rms_norm", _liger_rms_norm)
LAYER_NORM = plain(_layer_norm) | liger("liger_layer_norm", _as_is)
ROTARY = plain(_rotary)
SWIGLU = plain(_swiglu) | liger("liger_swiglu", _as_is)
GEGLU = plain(_geglu) | liger("liger_geglu", _as_is)
