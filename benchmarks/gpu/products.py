"""Operations that are bound by products."""

from typing import Any

import torch
from torch import Tensor

import megatrain_kernels as kernels
from benchmarks.gpu import peers
from benchmarks.gpu.operation import Operation, sized
from benchmarks.gpu.peers import Options, Tensors
from megatrain_kernels.attention import cases as attention_cases
from megatrain_kernels.grouped_gemm import cases as grouped_gemm_cases
from megatrain_kernels.kernel import Case
from megatrain_kernels.linear_cross_entropy import cases as linear_cross_entropy_cases
from megatrain_kernels.newton_schulz import cases as newton_schulz_cases
from megatrain_kernels.scaled_matmul import cases as scaled_matmul_cases


def _attention(name: str, sizes: str, **options: Any) -> Case:
    return sized(name, "batch q_seq k_seq heads kv_heads head_dim v_dim", sizes, **options)


ATTENTION = Operation(
    name="attention",
    backends=("auto", "triton"),
    timed=kernels.attention,
    cases=attention_cases.CASES,
    small=[
        _attention("causal_64", "2 193 193 4 2 64 64"),
        _attention("causal_128", "1 321 321 2 1 128 128"),
        _attention("full_128", "1 193 193 2 2 128 128", causal=False),
        _attention("window", "1 321 321 2 1 128 128", window=100),
        _attention("documents", "2 321 321 2 1 128 128", documents=5),
        _attention("softcap_256", "1 193 193 2 1 256 256", softcap=5.0),
        _attention("head_96", "1 193 193 2 1 96 96"),
        _attention("latent", "1 193 193 2 2 192 128"),
        _attention("ring_block", "1 150 193 2 1 128 128", q_offset=193),
        _attention("decode", "3 1 321 4 2 128 128", q_offset=320),
    ],
    make_inputs=attention_cases.make_inputs,
    cost=attention_cases.cost,
    gradients=(0, 1, 2),
    peers=peers.ATTENTION,
)

GROUPED_GEMM = Operation(
    name="grouped_gemm",
    backends=("auto", "triton"),
    timed=kernels.grouped_gemm,
    cases=grouped_gemm_cases.CASES,
    small=[
        sized("even", "tokens groups in_size out_size", "300 5 136 72"),
        sized("skewed", "tokens groups in_size out_size", "300 17 72 136", skew=2.0),
        sized("odd_rows", "tokens groups in_size out_size", "99 4 67 45"),
    ],
    make_inputs=grouped_gemm_cases.make_inputs,
    cost=grouped_gemm_cases.cost,
    gradients=(0, 1),
    peers=peers.GROUPED_GEMM,
)

LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    backends=("auto", "triton"),
    timed=kernels.linear_cross_entropy,
    cases=linear_cross_entropy_cases.CASES,
    small=[
        sized("plain", "tokens hidden vocab", "130 96 5003"),
        sized("z_loss", "tokens hidden vocab", "67 96 1031", z_loss=1e-2),
        sized("softcap", "tokens hidden vocab", "67 96 1031", softcap=3.0),
    ],
    make_inputs=linear_cross_entropy_cases.make_inputs,
    cost=linear_cross_entropy_cases.cost,
    gradients=(0, 1),
    peers=peers.LINEAR_CROSS_ENTROPY,
)


def _scaled_inputs(case: Case, *, dtype: torch.dtype, device: str) -> tuple[Tensors, Options]:
    return scaled_matmul_cases.make_inputs(case, device=device), {}


def _scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """Values times the scale of their tile (of 1, `groups` of 128 or the whole row and column), multiplied."""

    def spread(scale: Tensor, shape: torch.Size) -> Tensor:
        for dim in range(scale.ndim):
            times = {1: shape[dim], shape[dim]: 1}.get(scale.shape[dim], 128)
            scale = scale.repeat_interleave(times, dim).narrow(dim, 0, shape[dim])
        return scale

    return (a * spread(scale_a, a.shape)) @ (b * spread(scale_b, b.shape))


SCALED_MATMUL = Operation(
    name="scaled_matmul",
    backends=("auto", "triton"),
    timed=kernels.scaled_matmul,
    cases=scaled_matmul_cases.CASES,
    small=[
        sized("by_tensor", "m k n", "80 272 144", a="tensor", b="tensor"),
        sized("by_row", "m k n", "80 272 144", a="row", b="row"),
        sized("by_block", "m k n", "67 300 150", a="group", b="block"),
        sized("by_group", "m k n", "67 300 150", a="group", b="group"),
    ],
    make_inputs=_scaled_inputs,
    cost=scaled_matmul_cases.cost,
    peers=peers.SCALED_MATMUL,
    reference=_scaled_product,
    dtypes=(torch.bfloat16,),
    ceiling="fp8",
)

NEWTON_SCHULZ = Operation(
    name="newton_schulz",
    timed=kernels.orthogonalize,
    cases=newton_schulz_cases.CASES,
    small=[
        sized("wide", "batch rows cols", "2 67 190"),
        sized("tall", "batch rows cols", "1 190 67"),
        sized("square", "batch rows cols", "1 130 130"),
    ],
    make_inputs=newton_schulz_cases.make_inputs,
    cost=newton_schulz_cases.cost,
    peers=peers.NEWTON_SCHULZ,
    dtypes=(torch.bfloat16,),
    slack=2.0,  # five iterations of three products, each rounded to bf16; 0.8 was seen
)
