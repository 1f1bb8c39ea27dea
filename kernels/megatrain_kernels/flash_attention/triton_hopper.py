"""Attention on a Hopper GPU, by the kernels in `triton_hopper_forward.py` and `triton_hopper_backward.py`.

Heads of 64 and 128 in 16 bits, without soft-cap. The last bits of the gradients of queries vary from call to call.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatrain_kernels.flash_attention.reference import Rule
from megatrain_kernels.flash_attention.triton import DELTA_BLOCK, Call
from megatrain_kernels.flash_attention.triton_backward import prepare_kernel
from megatrain_kernels.flash_attention.triton_hopper_backward import WARPS, backward_kernel
from megatrain_kernels.flash_attention.triton_hopper_forward import GROUPS, ROWS, forward_kernel

KEYS = 128  # of a block
QUERIES = 64  # of a block of the backward pass
STAGES = 2
REGISTERS = 168  # a thread at the start: three groups of four warps share a multiprocessor's 65,536


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def described(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Return a descriptor of `tensor` in tiles of `block`, which lie in shared memory as tensor cores read them."""
    swizzle = 0 if tensor.ndim == 2 else 128  # statistics are read by threads, not by tensor cores
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=swizzle, element_bitwidth=8 * tensor.itemsize, rank=tensor.ndim
    )
    return TensorDescriptor(tensor, list(tensor.shape), _strides(tensor), list(block), layout)


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides; of a dimension of size 1, where any is right, one that a descriptor takes."""
    sizes = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [*(step if size > 1 else 16 for size, step in sizes), 1]


def _fit(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy whose address and strides a descriptor takes: multiples of 16 bytes."""
    steps = [step * tensor.itemsize for step in _strides(tensor)[:-1]]
    dense = tensor.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)
    return (
        tensor
        if dense and tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def run(kernel: Any, programs: int, *args: Any, warps: int, **constants: Any) -> None:
    """Start a kernel."""
    device = next(each.device for each in args if isinstance(each, Tensor))
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants, num_warps=warps, maxnreg=REGISTERS)


def processors(x: Tensor) -> int:
    """Return how many programs the tensor's device runs at a time."""
    return _processors(x.device.index)


def _constants(call: Call) -> dict[str, Any]:
    rule = call.rule
    flags = {"CAUSAL": rule.causal, "WINDOWED": rule.window is not None, "DOCS": call.doc_ids is not None}
    return {"GROUP": call.group, **flags, "D": call.q.shape[3], "N": KEYS, "STAGES": STAGES}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Return what `torch.chunked_forward` returns, for float16 and bfloat16."""
    call = Call(_fit(q), _fit(k), _fit(v), doc_ids, rule)
    (batch, q_seq, heads, dim), k_seq = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_seq, dtype=torch.float32, device=q.device)
    if lse.numel():
        tiles = triton.cdiv(q_seq, GROUPS.value * ROWS.value) * batch * heads
        rows, keys = (1, ROWS.value, 1, dim), (1, KEYS, 1, dim)
        run(
            forward_kernel,
            min(tiles, processors(q)),
            *(
                described(call.q, rows),
                described(call.k, keys),
                described(call.v, keys),
                described(out, rows),
                lse,
            ),
            *call.doc_ranges((rule.q_offset, q_seq), (0, k_seq)),
            *(call.factors()[0], batch, heads, *call.numbers()),
            warps=4,
            **_constants(call),
        )
    return out, lse


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
    call = Call(_fit(q), _fit(k), _fit(v), doc_ids, rule)
    (batch, q_seq, _, dim), (_, k_seq, kv_heads, _) = q.shape, k.shape
    sum_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    if sum_q.numel() and grad_k.numel():
        grad_out = _fit(grad_out.to(q.dtype).contiguous())
        statistics = _statistics(out.contiguous(), lse, grad_out, grad_lse)
        queries, keys = (1, QUERIES, 1, dim), (1, KEYS, 1, dim)
        run(
            backward_kernel,
            triton.cdiv(k_seq, KEYS) * batch * kv_heads,
            *(described(call.q, queries), described(call.k, keys), described(call.v, keys)),
            *(described(grad_out, queries), described(sum_q, queries), described(grad_k, keys)),
            described(grad_v, keys),
            *(described(each, (1, QUERIES)) for each in statistics),
            *call.doc_ranges((0, k_seq), (rule.q_offset, q_seq)),
            *(call.factors()[0], rule.scale, batch, kv_heads, *call.numbers()),
            warps=WARPS.value,
            M=QUERIES,
            **_constants(call),
        )
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    torch.mul(sum_q, rule.scale, out=grad_q)
    return grad_q, grad_k, grad_v


def _statistics(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp in base 2 and delta, `(batch · heads, queries)`, in whole blocks of queries."""
    batch, q_seq, heads, dim = out.shape
    padded = triton.cdiv(q_seq, QUERIES) * QUERIES
    base, delta = torch.empty(2, batch * heads, padded, dtype=torch.float32, device=out.device)
    grid = (triton.cdiv(padded, DELTA_BLOCK) * batch * heads,)
    given = (out, grad_out, lse.contiguous(), grad_lse.contiguous(), base, delta)
    prepare_kernel[grid](*given, heads, q_seq, padded, dim, dim, DELTA_BLOCK)
    return base, delta
