"""Triton's path of attention: the launches of its kernels.

The kernels are in `triton_forward.py` and `triton_backward.py`, what these share in `triton_tiles.py`, and their block
sizes in `triton_blocks.py`.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatrain_kernels.backend import cuda_capability, interpreting
from megatrain_kernels.flash_attention.choices import mask_of
from megatrain_kernels.flash_attention.reference import Rule
from megatrain_kernels.flash_attention.triton_backward import delta_kernel, key_kernel, query_kernel
from megatrain_kernels.flash_attention.triton_blocks import (
    INTERPRETED,
    Use,
    chosen,
    config,
    remember,
    size_class,
    space,
    tuning,
)
from megatrain_kernels.flash_attention.triton_forward import forward_kernel
from megatrain_kernels.flash_attention.triton_tiles import DOC_BLOCK, doc_ranges_kernel

LOG2E = math.log2(math.e)
DELTA_BLOCK = 64  # queries
# Blocks of own tokens whose ranges one program finds, and other tokens that it compares at a time.
DOC_GROUPS, DOC_CHUNK = 8, 512

_refused: set[tuple[Any, ...]] = set()
"""Kinds of calls whose kernel with tensor descriptors did not compile: they take plain loads from then on."""

KINDS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, "fused": key_kernel}
"""The kernels whose blocks are chosen."""
_KEY = ["GROUP", "CAUSAL", "WINDOWED", "DOCS", "CAPPED", "DIM", "V_DIM", "size_class"]


@cache
def _timed(kind: str, width: int, itemsize: int, descriptors: bool) -> Any:
    """Return the kernel with all blocks that may be chosen; the first call of a kind times them."""
    tried = [config(sizes, descriptors) for sizes in space(kind, width, itemsize)]
    sums = ["sum_q"] if kind == "fused" else None  # timing must not add to what is added to
    return triton.autotune(tried, key=_KEY, reset_to_zero=sums, cache_results=True)(KINDS[kind])


class Call(NamedTuple):
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
        """Return document ids, and for each DOC_BLOCK of `own` (first, count) what `doc_range` reads of `other`."""
        if self.doc_ids is None:
            unused = self.q.new_empty(0, dtype=torch.int32)
            return unused, unused, unused, unused
        docs, parts = self.doc_ids.contiguous(), triton.cdiv(own[1], DOC_BLOCK.value)
        ranges = tuple(torch.empty(3, docs.shape[0], parts, dtype=torch.int32, device=docs.device))
        grid = (docs.shape[0] * triton.cdiv(parts, DOC_GROUPS),)
        doc_ranges_kernel[grid](docs, *ranges, docs.shape[1], *own, *other, DOC_GROUPS, DOC_CHUNK)
        return docs, *ranges


def _call(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> Call:
    """Make the last dimension contiguous. The interpreter's bfloat16 products are wrong, so there it is float32."""
    if interpreting() and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return Call(q, k, v, doc_ids, rule)


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


def _launch(kind: str, programs: Callable[[Any], int], call: Call, *args: Any) -> None:
    """Run the kernel in `programs(blocks)` programs, with tensor descriptors where that works."""
    constants = call.constants()
    if kind in ("key", "fused"):
        constants["FUSED"] = kind == "fused"

    def run(descriptors: bool) -> None:
        _start(kind, lambda blocks: (programs(blocks),), call, args, constants, descriptors)

    if interpreting():
        KINDS[kind][(programs(INTERPRETED),)](*args, **constants, **INTERPRETED)
        return
    signature = (kind, call.q.itemsize, *constants.values())
    with torch.cuda.device(call.q.device):
        index = torch.cuda.current_device()
        wanted = _has_descriptors(index) and signature not in _refused
        if wanted and _describable((call.q, call.k, call.v)):
            triton.set_allocator(_scratch)
            try:
                return run(True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                _refused.add(signature)
                warnings.warn(f"attention: no tensor descriptors here: {error}", stacklevel=2)
        run(False)


def _start(
    kind: str,
    grid: Callable[[Any], tuple[int]],
    call: Call,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    descriptors: bool,
) -> None:
    """Run the kernel with the blocks of the table, or with the fastest, which the table has afterwards."""
    width, itemsize = max(constants["BLOCK_D"], constants["BLOCK_V"]), call.q.itemsize
    use = Use(
        cuda_capability(call.q.device.index or 0),
        kind,
        width,
        mask_of(call.doc_ids is not None, call.rule),
        call.group > 1,
        size_class(max(call.q.shape[1], call.k.shape[1])),
    )
    if tuning():
        kernel = _timed(kind, width, itemsize, descriptors)
        kernel[grid](*args, **constants)
        if best := getattr(kernel, "best_config", None):
            remember(use, best)
        return
    for sizes in (chosen(use, itemsize), space(kind, width, itemsize)[-1]):
        best = config(sizes, descriptors)
        how = {"num_warps": best.num_warps, "num_stages": best.num_stages, **best.kwargs}
        try:
            KINDS[kind][grid(best.kwargs)](*args, **constants, **how)
            return
        except triton.runtime.errors.OutOfResources as error:  # shared memory of a smaller GPU
            lacking = error
    raise lacking


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
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.chunked_backward` returns; `fused`: in five products, whose last bits vary, for seven."""
    dtype, call = q.dtype, _call(q, k, v, doc_ids, rule)
    grad_out, lse = grad_out.to(call.q.dtype).contiguous(), lse.contiguous()
    delta = _delta(out.to(call.q.dtype).contiguous(), grad_out, grad_lse.contiguous(), call)
    known = (grad_out, lse, delta)
    if fused:
        sum_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        grad_k, grad_v = _key_gradients(call, known, sum_q)
        grad_q = torch.empty(q.shape, dtype=dtype, device=q.device)
        torch.mul(sum_q, rule.scale, out=grad_q)
    else:
        grad_q = _query_gradients(call, known)
        grad_k, grad_v = _key_gradients(call, known, None)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _query_gradients(call: Call, known: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    (batch, q_seq, heads, _), k_seq, rule = call.q.shape, call.k.shape[1], call.rule
    grad_q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    if grad_q.numel():
        docs = call.doc_ranges((rule.q_offset, q_seq), (0, k_seq))
        numbers = (heads, *call.numbers(), rule.scale, *call.factors(), size_class(max(q_seq, k_seq)))
        _launch(
            "query",
            lambda blocks: triton.cdiv(q_seq, blocks["BLOCK_M"]) * batch * heads,
            call,
            *(call.q, call.k, call.v, *known, grad_q, *docs, *call.strides(), *numbers),
        )
    return grad_q


def _key_gradients(
    call: Call, known: tuple[Tensor, Tensor, Tensor], sum_q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values, and add those of queries / scale to `sum_q`, if given."""
    q_seq, (batch, k_seq, kv_heads, _), rule = call.q.shape[1], call.k.shape, call.rule
    grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.k, call.v))
    if grad_k.numel():
        docs = call.doc_ranges((0, k_seq), (rule.q_offset, q_seq))
        numbers = (kv_heads, *call.numbers(), rule.scale, *call.factors(), size_class(max(q_seq, k_seq)))
        sums = grad_k if sum_q is None else sum_q  # read by no one if not fused
        _launch(
            "key" if sum_q is None else "fused",
            lambda blocks: triton.cdiv(k_seq, blocks["BLOCK_N"]) * batch * kv_heads,
            call,
            *(call.q, call.k, call.v, *known, grad_k, grad_v, sums, *docs, *call.strides(), *numbers),
        )
    return grad_k, grad_v


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor, call: Call) -> Tensor:
    delta = torch.empty_like(grad_lse)
    batch, q_seq, heads, v_dim = out.shape
    if delta.numel():
        grid = (triton.cdiv(q_seq, DELTA_BLOCK) * batch * heads,)
        block_v = call.constants()["BLOCK_V"]
        delta_kernel[grid](out, grad_out, grad_lse, delta, heads, q_seq, v_dim, block_v, DELTA_BLOCK)
    return delta
