"""The public implementations that operations are compared with: PyTorch's own, and other packages' where installed.

Each is made for the arguments of one case, since some prepare something that is not to be timed (a block mask), and
then takes these arguments. `PEERS` lists them; an operation without an entry is compared with its own definition. A
package that is not installed is a row of its own, so that the record says who is missing.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatrain_kernels.kernel import Kernel
from megatrain_kernels.newton_schulz.reference import COEFFICIENTS, EPS

Run = Callable[..., Any]
Arguments = tuple[Any, ...]
"""Positional arguments of an operation's public function, most of them tensors."""
Options = dict[str, Any]
DENSE = "one dense product"
"""The peer that is no grouped product, but the work of one with a single group."""


PACKAGES = {
    "Liger": ("liger_kernel", "liger-kernel"),
    "QuACK": ("quack", "quack-kernels"),
    "FlashAttention-3": ("flash_attn_interface", "flash-attn-3"),
}
"""Implementation -> its module and its distribution."""


class Peer(NamedTuple):
    """Another implementation."""

    make: Callable[[Arguments, Options], Run | None]
    """Makes it for one case; None: it has nothing for this case."""
    compiled: bool = False
    """Whether torch.compile makes it, which takes many seconds: timed after all others, and on GPUs only."""
    package: str = ""
    """The key in `PACKAGES` of what must be installed; empty: PyTorch alone."""
    same_work: bool = True
    """Whether it computes what the operation does, so that it counts as the best public implementation."""
    given: Callable[[Arguments], Arguments] = tuple
    """What it takes in place of the operation's arguments."""

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return not self.package or find_spec(PACKAGES[self.package][0]) is not None


def plain(function: Run) -> dict[str, Peer]:
    """Return `function(*arguments, **options)` as PyTorch runs it, and compiled."""

    def eager(given: Arguments, options: Options) -> Run:
        return lambda *arguments: function(*arguments, **options)

    def compiled(given: Arguments, options: Options) -> Run:
        return torch.compile(eager(given, options), dynamic=False)

    return {"torch eager": Peer(eager), "torch.compile": Peer(compiled, compiled=True)}


def liger(name: str, call: Callable[..., Any]) -> dict[str, Peer]:
    """Return `call(Liger's function of that name, *arguments, **options)`."""

    def make(given: Arguments, options: Options) -> Run:
        function = getattr(import_module("liger_kernel.transformers.functional"), name)
        return lambda *arguments: call(function, *arguments, **options)

    return {"Liger": Peer(make, package="Liger")}


def quack(
    module: str, name: str, call: Callable[..., Any], *, knows: frozenset[str] = frozenset()
) -> dict[str, Peer]:
    """Return `call(QuACK's function of that name, *arguments, **options)` for cases with no options but `knows`."""

    def make(given: Arguments, options: Options) -> Run | None:
        if set(options) - knows:
            return None
        function = getattr(import_module(f"quack.{module}"), name)
        return lambda *arguments: call(function, *arguments, **options)

    return {"QuACK": Peer(make, package="QuACK")}


def _sees_all(given: Arguments, options: Options) -> bool:
    return not options.get("causal", True) or options.get("q_offset", 0) >= given[1].shape[1] - 1


def _sdpa(backend: SDPBackend) -> Peer:
    """Return torch's fused attention by one backend, where no mask is needed but the causal one."""

    def make(given: Arguments, options: Options) -> Run | None:
        full = _sees_all(given, options)
        square = given[0].shape[1] == given[1].shape[1] and not options.get("q_offset", 0)
        if set(options) - {"causal", "q_offset"} or not (full or square):
            return None
        if backend == SDPBackend.CUDNN_ATTENTION and given[0].device.type != "cuda":
            return None
        grouped = given[0].shape[2] != given[1].shape[2]

        def run(*qkv: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in qkv)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=not full, enable_gqa=grouped)
            return out.transpose(1, 2)

        return run

    return Peer(make)


def _flash_3(given: Arguments, options: Options) -> Run | None:
    """Return FlashAttention-3, which has windows and soft-caps, and documents only as sequences one after the other."""
    if set(options) - {"causal", "q_offset", "window", "softcap"} or (
        options.get("q_offset", 0) != given[1].shape[1] - given[0].shape[1]
    ):
        return None  # its causal mask ends at the last query and key
    attend = import_module("flash_attn_interface").flash_attn_func
    window = options.get("window")
    named = {
        "causal": options.get("causal", True),
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": options.get("softcap") or 0.0,
    }

    def run(*qkv: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = attend(*qkv, **named)
        return out[0] if isinstance(out, tuple) else out  # older ones return the log-sum-exp too

    return run


def _flex(given: Arguments, options: Options) -> Run:
    """Compile flex_attention; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, _ = given
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

    masked = not _sees_all(given, options) or window is not None or doc_ids is not None
    rows = None if doc_ids is None else q.shape[0]
    mask = create_block_mask(visible, rows, None, q.shape[1], k.shape[1], q.device) if masked else None
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[2] != k.shape[2]

    def run(*qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv)
        score = capped if cap else None
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return run


def _grouped(given: Arguments, options: Options) -> Run | None:
    """Return torch's grouped product, where this version has it."""
    product = getattr(F, "grouped_mm", None)
    if product is None:
        return None
    return lambda x, weights, sizes: product(x, weights.mT, offs=sizes.cumsum(0).to(torch.int32))


def _dense(given: Arguments, options: Options) -> Run:
    """Return one product of all rows with one matrix: what a grouped product of the same size is held against."""
    return lambda x, weight: x @ weight.T


def _loss(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, softcap: float | None = None) -> Tensor:
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets)
    return loss if z_loss == 0 else loss + z_loss * logits.logsumexp(-1).square().mean()


def _linear_loss(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _loss(x @ weight.T, targets, **options)


def _first(made: Any) -> Tensor:
    """Return the loss, beside which Liger's versions return other things or none."""
    loss: Tensor = made[0] if isinstance(made, tuple) else made
    return loss


def _liger_loss(function: Run, logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    renamed = {"z_loss": "lse_square_scale"}
    return _first(function(logits, targets, **{renamed.get(k, k): v for k, v in options.items()}))


def _liger_linear_loss(function: Run, x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _liger_loss(lambda *given, **named: function(x, weight, given[1], **named), x, targets, **options)


def _newton_schulz(update: Tensor, *, steps: int = 5) -> Tensor:
    """Iterate with plain products in bf16."""
    a, b, c = COEFFICIENTS
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _scaled_mm(given: Arguments, options: Options) -> Run | None:
    """Return torch's own product, which takes one scale each, or one a row each."""
    a, b, scale_a, scale_b = given
    by_row = scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    if not (by_row or scale_a.ndim == scale_b.ndim == 0):
        return None
    return lambda a, b, scale_a, scale_b: torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=options["out_dtype"]
    )


def _bf16_product(given: Arguments, options: Options) -> Run:
    """Return the product in bf16, which fp8 is to beat."""
    a, b = (t.to(torch.bfloat16) for t in given[:2])
    return lambda *_: a @ b


def _quack_loss(function: Run, logits: Tensor, targets: Tensor) -> Any:
    return function(logits, targets, reduction="mean")


def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = F.rms_norm(total, weight.shape, weight, eps)
    return out if residual is None else (out, total)


def _liger_rms_norm(
    function: Run, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Any:
    total = x if residual is None else x + residual
    out = function(total, weight, eps, in_place=False)
    return out if residual is None else (out, total)


def _quack_rms_norm(
    function: Run, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Any:
    return function(x, weight, residual=residual, eps=eps, prenorm=residual is not None)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = F.layer_norm(total, weight.shape, weight, bias, eps)
    return out if residual is None else (out, total)


def _liger_layer_norm(
    function: Run, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Any:
    total = x if residual is None else x + residual
    out = function(total, weight, bias, eps)
    return out if residual is None else (out, total)


def _bias_gelu(x: Tensor, bias: Tensor, *, tanh: bool) -> Tensor:
    return F.gelu(x + bias, approximate="tanh" if tanh else "none")


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    c, s = (torch.cat([t, t], -1).unsqueeze(-2).to(q.dtype) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * c + torch.cat([-second, first], -1) * s

    return turn(q), turn(k)


def _liger_rotary(function: Run, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q and k in place, as it does."""
    c, s = (torch.cat([t, t], -1).unsqueeze(0).to(q.dtype) for t in (cos, sin))
    turned, other = function(q.transpose(1, 2), k.transpose(1, 2), c, s)
    return turned.transpose(1, 2), other.transpose(1, 2)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _as_is(function: Run, *given: Any, **options: Any) -> Any:
    return function(*given, **options)


PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "torch flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-3": Peer(_flash_3, package="FlashAttention-3"),
        "flex_attention": Peer(_flex, compiled=True),
    },
    "grouped_gemm": {
        "torch grouped_mm": Peer(_grouped),
        DENSE: Peer(_dense, same_work=False, given=lambda given: (given[0], given[1][0])),
    },
    "cross_entropy": plain(_loss)
    | liger("liger_cross_entropy", _liger_loss)
    | quack("cross_entropy", "cross_entropy", _quack_loss),
    "linear_cross_entropy": plain(_linear_loss)
    | liger("liger_fused_linear_cross_entropy", _liger_linear_loss)
    | quack("linear_cross_entropy", "chunked_linear_cross_entropy", _as_is),
    "orthogonalize": plain(_newton_schulz),
    "scaled_matmul": {
        "torch _scaled_mm": Peer(_scaled_mm),
        "torch bf16 product": Peer(_bf16_product, same_work=False),
    },
    "rms_norm": plain(_rms_norm)
    | liger("liger_rms_norm", _liger_rms_norm)
    | quack("rmsnorm", "rmsnorm", _quack_rms_norm),
    "layer_norm": plain(_layer_norm) | liger("liger_layer_norm", _liger_layer_norm),
    "rotary": plain(_rotary) | liger("liger_rope", _liger_rotary),
    "bias_gelu": plain(_bias_gelu),
    "swiglu": plain(_swiglu) | liger("liger_swiglu", _as_is),
    "geglu": plain(_geglu) | liger("liger_geglu", _as_is),
}
"""By the operation's name."""


def peers_of(kernel: Kernel) -> dict[str, Peer]:
    """Return an operation's public implementations that are there; where none is known, its definition by PyTorch."""
    known = PEERS.get(kernel.name) or plain(partial(kernel.function, backend="reference"))
    return {name: peer for name, peer in known.items() if peer.installed}


def absent() -> list[dict[str, Any]]:
    """Return a row for each operation and package that it could be compared with if that were installed."""
    return [
        {"operation": operation, "implementation": name, "state": "not installed"}
        for operation, peers in PEERS.items()
        for name, peer in peers.items()
        if not peer.installed
    ]


def installed() -> dict[str, str | None]:
    """Return the versions of the packages that operations are compared with; None: not installed."""
    return {name: _version(*names) for name, names in PACKAGES.items()}


def _version(module: str, distribution: str) -> str | None:
    if find_spec(module) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown version"
