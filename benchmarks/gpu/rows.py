"""Operations that are bound by memory."""

from typing import Any

import torch
from torch import Tensor

import megatrain_kernels as kernels
from benchmarks.gpu import peers
from benchmarks.gpu.operation import Operation, sized
from benchmarks.gpu.peers import Options, Tensors
from megatrain_kernels.cross_entropy import cases as cross_entropy_cases
from megatrain_kernels.geglu import cases as geglu_cases
from megatrain_kernels.kernel import Case
from megatrain_kernels.layer_norm import cases as layer_norm_cases
from megatrain_kernels.moe_gate import cases as moe_gate_cases
from megatrain_kernels.quantization import cases as quantization_cases
from megatrain_kernels.quantization.reference import dequantize_reference, quantize_reference
from megatrain_kernels.rms_norm import cases as rms_norm_cases
from megatrain_kernels.rotary import cases as rotary_cases
from megatrain_kernels.swiglu import cases as swiglu_cases


def _rms_norm(x: Tensor, weight: Tensor, *residual: Tensor, eps: float, backend: str) -> Any:
    return kernels.rms_norm(x, weight, eps, *residual, backend=backend)


def _rms_norm_inputs(case: Case, *, dtype: torch.dtype, device: str) -> tuple[Tensors, Options]:
    """The residual is a tensor like the others: it has a gradient."""
    tensors, options = rms_norm_cases.make_inputs(case, dtype=dtype, device=device)
    residual = options.pop("residual", None)
    return (*tensors, *([] if residual is None else [residual])), options


RMS_NORM = Operation(
    name="rms_norm",
    timed=_rms_norm,
    cases=rms_norm_cases.CASES,
    small=[
        sized("plain", "tokens size", "67 1000", residual=False),
        sized("residual", "tokens size", "67 1000", residual=True),
    ],
    make_inputs=_rms_norm_inputs,
    cost=rms_norm_cases.cost,
    gradients=(0, 1, 2),
    peers=peers.RMS_NORM,
)

LAYER_NORM = Operation(
    name="layer_norm",
    timed=kernels.layer_norm,
    cases=layer_norm_cases.CASES,
    small=[sized("plain", "tokens size", "67 1000"), sized("one_row", "tokens size", "1 33")],
    make_inputs=layer_norm_cases.make_inputs,
    cost=layer_norm_cases.cost,
    gradients=(0, 1, 2),
    peers=peers.LAYER_NORM,
)

ROTARY = Operation(
    name="rotary",
    timed=kernels.rotary,
    cases=rotary_cases.CASES,
    small=[
        sized("grouped", "batch seq heads kv_heads head_dim", "2 67 6 2 64"),
        sized("head_96", "batch seq heads kv_heads head_dim", "1 67 3 1 96"),
    ],
    make_inputs=rotary_cases.make_inputs,
    cost=rotary_cases.cost,
    gradients=(0, 1),
    peers=peers.ROTARY,
)

SWIGLU = Operation(
    name="swiglu",
    timed=kernels.swiglu,
    cases=swiglu_cases.CASES,
    small=[sized("plain", "tokens size", "67 1001")],
    make_inputs=swiglu_cases.make_inputs,
    cost=swiglu_cases.cost,
    gradients=(0, 1),
    peers=peers.SWIGLU,
)

GEGLU = Operation(
    name="geglu",
    timed=kernels.geglu,
    cases=geglu_cases.CASES,
    small=[sized("plain", "tokens size", "67 1001")],
    make_inputs=geglu_cases.make_inputs,
    cost=geglu_cases.cost,
    gradients=(0, 1),
    peers=peers.GEGLU,
)

CROSS_ENTROPY = Operation(
    name="cross_entropy",
    timed=kernels.cross_entropy,
    cases=cross_entropy_cases.CASES,
    small=[
        sized("plain", "tokens vocab", "67 5003"),
        sized("z_loss", "tokens vocab", "67 1031", z_loss=1e-2),
        sized("softcap", "tokens vocab", "67 1031", softcap=3.0),
    ],
    make_inputs=cross_entropy_cases.make_inputs,
    cost=cross_entropy_cases.cost,
    gradients=(0,),
    peers=peers.CROSS_ENTROPY,
)


def _quantized_and_back(x: Tensor, *, backend: str, **options: Any) -> Tensor:
    values, scales = kernels.quantize(x, backend=backend, **options)
    return kernels.dequantize(values, scales, backend=backend, **options)


def _defined_and_back(
    x: Tensor, *, dtype: str, scaling: str, group_size: int = 128, backend: str = ""
) -> Tensor:
    values, scales = quantize_reference(x, dtype, scaling, group_size)
    return dequantize_reference(values, scales, dtype, scaling, group_size)


QUANTIZATION = Operation(
    name="quantization",
    timed=kernels.quantize,
    cases=quantization_cases.CASES,
    small=[
        sized(f"{dtype}_{scaling}", "rows cols", "131 270", dtype=dtype, scaling=scaling)
        for dtype, scaling in (
            ("e4m3", "tensor"),
            ("e4m3", "row"),
            ("e5m2", "group"),
            ("e4m3", "block"),
            ("int8", "row"),
            ("int4", "group"),
        )
    ],
    make_inputs=quantization_cases.make_inputs,
    cost=quantization_cases.cost,
    peers=peers.QUANTIZATION,
    checked=_quantized_and_back,
    reference=_defined_and_back,
    dtypes=(torch.float32,),
)


def _gate(logits: Tensor, *, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Weights, whose order tells the choice, and scores."""
    _, weights, scores = kernels.moe_gate(logits, backend=backend, **options)
    return weights, scores


def _gate_inputs(case: Case, *, dtype: torch.dtype, device: str) -> tuple[Tensors, Options]:
    (logits, _), options = moe_gate_cases.make_inputs(case, dtype=dtype, device=device)
    return (logits,), options


MOE_GATE = Operation(
    name="moe_gate",
    timed=_gate,
    cases=moe_gate_cases.CASES,
    small=[
        sized("softmax", "tokens experts top_k", "67 16 2"),
        sized("groups", "tokens experts top_k", "67 32 4", scores="sigmoid", n_groups=4, top_groups=2),
    ],
    make_inputs=_gate_inputs,
    cost=moe_gate_cases.cost,
    gradients=(0,),
    peers=peers.MOE_GATE,
    dtypes=(torch.float32,),
    timed_dtype=torch.float32,
)
