"""Importing this tells torch's FlopCounterMode how many FLOPs the operators of attention take.

Apart from the operators, since torch's counter imports Triton: a fifth of a second that only those who count pay.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import megatrain_kernels.attention.registered  # noqa: F401  # makes the operators known


def _flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], per_qk: int, per_v: int) -> int:
    pairs = q[0] * q[2] * q[1] * k[1]
    return 2 * pairs * (per_qk * q[3] + per_v * v[3])


@register_flop_formula(torch.ops.megatrain.attention)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """As torch counts its own attention: all pairs, whatever the mask."""
    return _flops(q, k, v, 1, 1)


@register_flop_formula(torch.ops.megatrain.attention_backward)
def _backward_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Scores again, dQ and dK; dP and dV."""
    return _flops(q, k, v, 3, 2)
