"""Operations of a Transformer, each with its definition in plain PyTorch and its fastest path on this machine.

A new operation is a folder and one line here, which also puts it into `kernel.KERNELS`.
"""

from megatrain_kernels.flash_attention.op import attention as attention
from megatrain_kernels.gated.op import geglu as geglu
from megatrain_kernels.gated.op import swiglu as swiglu
from megatrain_kernels.gelu.op import bias_gelu as bias_gelu
from megatrain_kernels.grouped_mm.op import grouped_gemm as grouped_gemm
from megatrain_kernels.grouped_mm.permute import permute as permute
from megatrain_kernels.grouped_mm.permute import unpermute as unpermute
from megatrain_kernels.grouped_mm.permute import unsort as unsort
from megatrain_kernels.linear_xent.op import linear_cross_entropy as linear_cross_entropy
from megatrain_kernels.newton_schulz.op import orthogonalize as orthogonalize
from megatrain_kernels.norm.op import layer_norm as layer_norm
from megatrain_kernels.norm.op import rms_norm as rms_norm
from megatrain_kernels.optimizer.op import optimizer_step as optimizer_step
from megatrain_kernels.quantization.op import dequantize as dequantize
from megatrain_kernels.quantization.op import quantize as quantize
from megatrain_kernels.rope.op import rotary as rotary
from megatrain_kernels.router.op import moe_gate as moe_gate
from megatrain_kernels.scaled_mm.op import scaled_matmul as scaled_matmul
from megatrain_kernels.xent.op import cross_entropy as cross_entropy
