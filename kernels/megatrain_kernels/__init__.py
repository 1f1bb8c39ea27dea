"""Operations of a Transformer, each with its plain definition (`reference.py`) and its fastest path (`op.py`)."""

from megatrain_kernels.attention.op import attention, doc_ids_from_cu_seqlens
from megatrain_kernels.cross_entropy.op import cross_entropy
from megatrain_kernels.geglu.op import geglu
from megatrain_kernels.grouped_gemm.op import grouped_gemm
from megatrain_kernels.grouped_gemm.permute import permute, unpermute, unsort
from megatrain_kernels.layer_norm.op import layer_norm
from megatrain_kernels.linear_cross_entropy.op import linear_cross_entropy
from megatrain_kernels.moe_gate.op import moe_gate
from megatrain_kernels.newton_schulz.op import orthogonalize
from megatrain_kernels.quantization.op import dequantize, quantize
from megatrain_kernels.rms_norm.op import rms_norm
from megatrain_kernels.rotary.op import rotary
from megatrain_kernels.scaled_matmul.op import scaled_matmul
from megatrain_kernels.swiglu.op import swiglu

__all__ = [
    "attention",
    "cross_entropy",
    "dequantize",
    "doc_ids_from_cu_seqlens",
    "geglu",
    "grouped_gemm",
    "layer_norm",
    "linear_cross_entropy",
    "moe_gate",
    "orthogonalize",
    "permute",
    "quantize",
    "rms_norm",
    "rotary",
    "scaled_matmul",
    "swiglu",
    "unpermute",
    "unsort",
]
