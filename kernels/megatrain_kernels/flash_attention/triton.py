"""Triton's path of attention: the launches of its kernels, and the block sizes that they are tuned over.

The kernels are in `triton_forward.py` and `triton_backward.py`, and what these share in `triton_tiles.py`.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.flash_attention.reference import Rule
from megatrain_kernels.flash_attention.triton_backward import delta_kernel, key_kernel, query_kernel
from megatrain_kernels.flash_attention.triton_forward import forward_kernel
from megatrain_kernels.flash_attention.triton_tiles import DOC_BLOCK, doc_ranges_kernel

LOG2E = math.log2(math.e)
DELTA_BLOCK = 64  # queries
# Blocks of own tokens whose ranges one program finds, and other tokens that it compares at a time.
DOC_GROUPS, DOC_CHUNK = 8, 512

_refused: set[tuple[Any, ...]] = set()
"""Kinds of calls whose kernel with tensor descriptors did not compile: they take plain loads from then on."""

_Sizes = tuple[int, int, int, int]  # BLOCK_M (queries), BLOCK_N (keys), warps, stages of the load pipeline

# By kernel and width of the head (a power of two), for 16-bit types. Few, since each is compiled and timed once for
# each kind of call; the last of each line needs so little shared memory that it fits every GPU with tensor cores.
_SPACE: dict[str, dict[int, list[_Sizes]]] = {
    "forward": {
        64: [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    },
    "query": {
        64: [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
        256: [(64, 32, 8, 2), (32, 32, 4, 1)],
    },
    "key": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
        128: [(64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
    },
}
_FLOAT32: list[_Sizes] = [(32, 32, 8, 1)]  # registers are scarce: larger blocks spill them
_KEY = ["GROUP", "CAUSAL", "WINDOWED", "DOCS", "CAPPED", "DIM", "V_DIM", "size_class"]

INTERPRETED = {"BLOCK_M": 64, "BLOCK_N": 32, "TMA": False}


def size_class(seq: int) -> int:
    """Return the class of a sequence length; lengths of one class share their tuning."""
    return sum(seq >= edge for edge in (1024, 8192))


def configs(kind: str, width: int, itemsize: int, tma: bool) -> list[triton.Config]:
    """Return the tuning space: `kind` is forward, query or key; `width` the wider head size, a power of two."""
    sizes = _FLOAT32 if itemsize == 4 else _SPACE[kind][max(64, width)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TMA": each}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in sizes
        for each in ((False, True) if tma else (False,))
    ]


@cache
def tuned(kernel: Any, kind: str, width: int, itemsize: int, tma: bool) -> Any:
    """Return the kernel with autotuned blocks: timed at the first call of a kind, then kept in Triton's disk cache."""
    return triton.autotune(configs(kind, width, itemsize, tma), key=_KEY, cache_results=True)(kernel)


class _Call(NamedTuple):
    """What all kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    doc_ids: Tensor | None
    rule: Rule

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[2] // self.k.shape[2]

    def strides(self) -> list[int]:
        """Return the strides of batch, sequence and head, for q, k and v."""
        return [step for t in (self.q, self.k, self.v) for step in t.stride()[:3]]

    def numbers(self) -> tuple[int, int, int, int]:
        """Return q_seq, k_seq, q_offset and window."""
        return self.q.shape[1], self.k.shape[1], self.rule.q_offset, self.rule.window or 0

    def factors(self) -> tuple[float, float]:
        """Return factor and inner of `triton_tiles.raw_scores`."""
        cap = self.rule.softcap
        if cap is None:
            return self.rule.scale * LOG2E, 0.0
        return cap * LOG2E, 2 * LOG2E * self.rule.scale / cap

    def constants(self) -> dict[str, Any]:
        """Return the constants that kernels are compiled for."""
        dim, v_dim = self.q.shape[3], self.v.shape[3]
        return {
            "GROUP": self.group,
            "CAUSAL": self.rule.causal,
            "WINDOWED": self.rule.window is not None,
            "DOCS": self.doc_ids is not None,
            "CAPPED": self.rule.softcap is not None,
            "DIM": dim,
            "V_DIM": v_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_V": max(16, triton.next_power_of_2(v_dim)),
        }

    def doc_ranges(self, own: tuple[int, int], other: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return document ids, and for each DOC_BLOCK of `own` (first, count) the range of `other` to visit."""
        if self.doc_ids is None:
            unused = self.q.new_empty(0, dtype=torch.int32)
            return unused, unused, unused
        docs, parts = self.doc_ids.contiguous(), triton.cdiv(own[1], DOC_BLOCK.value)
        lows, highs = (
            torch.empty(docs.shape[0], parts, dtype=torch.int32, device=docs.device) for _ in range(2)
        )
        grid = (docs.shape[0] * triton.cdiv(parts, DOC_GROUPS),)
        doc_ranges_kernel[grid](docs, lows, highs, docs.shape[1], *own, *other, DOC_GROUPS, DOC_CHUNK)
        return docs, lows, highs


def _call(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> _Call:
    """Make the last dimension contiguous. The interpreter's bfloat16 products are wrong, so there it is float32."""
    if interpreting() and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _Call(q, k, v, doc_ids, rule)


@cache
def _has_descriptors(index: int) -> bool:
    """Return whether the device copies tiles by descriptor (TMA), and Triton offers that."""
    offered = hasattr(triton.language, "make_tensor_descriptor") and hasattr(triton, "set_allocator")
    return offered and torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def _describable(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether addresses and strides are multiples of 16 bytes, as descriptors need."""
    steps = (step * t.itemsize for t in tensors for step in t.stride()[:3])
    return all(step % 16 == 0 for step in steps) and all(t.data_ptr() % 16 == 0 for t in tensors)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(kernel: Any, kind: str, programs: Callable[[Any], int], call: _Call, *args: Any) -> None:
    """Run `kernel` in `programs(blocks)` programs, with tensor descriptors where that works."""
    constants = call.constants()

    def grid(blocks: Any) -> tuple[int]:
        return (programs(blocks),)

    if interpreting():
        kernel[grid](*args, **constants, **INTERPRETED)
        return
    width, itemsize = max(constants["BLOCK_D"], constants["BLOCK_V"]), call.q.itemsize
    signature = (kind, itemsize, *constants.values())
    with torch.cuda.device(call.q.device):
        index = torch.cuda.current_device()
        wanted = _has_descriptors(index) and signature not in _refused
        if wanted and _describable((call.q, call.k, call.v)):
            triton.set_allocator(_scratch)
            try:
                tuned(kernel, kind, width, itemsize, True)[grid](*args, **constants)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                _refused.add(signature)
                warnings.warn(f"attention: no tensor descriptors here: {error}", stacklevel=2)
        tuned(kernel, kind, width, itemsize, False)[grid](*args, **constants)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Return what `torch.chunked_forward` returns, for float16, bfloat16 and float32."""
    call = _call(q, k, v, doc_ids, rule)
    (batch, q_seq, heads, _), k_seq = q.shape, k.shape[1]
    out = torch.empty(batch, q_seq, heads, v.shape[3], dtype=call.q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_seq, dtype=torch.float32, device=q.device)
    if lse.numel():
        docs = call.doc_ranges((rule.q_offset, q_seq), (0, k_seq))
        numbers = (heads, *call.numbers(), *call.factors(), size_class(max(q_seq, k_seq)))
        _launch(
            forward_kernel,
            "forward",
            lambda blocks: triton.cdiv(q_seq, blocks["BLOCK_M"]) * batch * heads,
            call,
            *(call.q, call.k, call.v, out, lse, *docs, *call.strides(), *numbers),
        )
    return out.to(q.dtype), lse


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    doc_ids: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.chunked_backward` returns."""
    dtype, call = q.dtype, _call(q, k, v, doc_ids, rule)
    q, k, v = call.q, call.k, call.v
    (batch, q_seq, heads, _), (_, k_seq, kv_heads, _) = q.shape, k.shape
    grad_out, lse = grad_out.to(q.dtype).contiguous(), lse.contiguous()
    delta = _delta(out.to(q.dtype).contiguous(), grad_out, grad_lse.contiguous(), call)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    numbers = (*call.numbers(), rule.scale, *call.factors(), size_class(max(q_seq, k_seq)))
    if grad_q.numel():
        docs = call.doc_ranges((rule.q_offset, q_seq), (0, k_seq))
        _launch(
            query_kernel,
            "query",
            lambda blocks: triton.cdiv(q_seq, blocks["BLOCK_M"]) * batch * heads,
            call,
            *(q, k, v, grad_out, lse, delta, grad_q, *docs, *call.strides(), heads, *numbers),
        )
    if grad_k.numel():
        docs = call.doc_ranges((0, k_seq), (rule.q_offset, q_seq))
        _launch(
            key_kernel,
            "key",
            lambda blocks: triton.cdiv(k_seq, blocks["BLOCK_N"]) * batch * kv_heads,
            call,
            *(q, k, v, grad_out, lse, delta, grad_k, grad_v, *docs, *call.strides(), kv_heads, *numbers),
        )
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor, call: _Call) -> Tensor:
    delta = torch.empty_like(grad_lse)
    batch, q_seq, heads, v_dim = out.shape
    if delta.numel():
        grid = (triton.cdiv(q_seq, DELTA_BLOCK) * batch * heads,)
        block_v = call.constants()["BLOCK_V"]
        delta_kernel[grid](out, grad_out, grad_lse, delta, heads, q_seq, v_dim, block_v, DELTA_BLOCK)
    return delta
