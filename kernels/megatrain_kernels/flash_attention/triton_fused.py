"""Attention with a backward pass of five products for seven; the last bits of its gradients vary from call to call."""

from functools import partial

from megatrain_kernels.flash_attention import triton
from megatrain_kernels.flash_attention.triton import attention_forward

__all__ = ["attention_backward", "attention_forward"]

attention_backward = partial(triton.attention_backward, fused=True)
