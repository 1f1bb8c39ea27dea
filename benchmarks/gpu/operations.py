"""The operations that are checked and timed: how each is called, on which inputs, and what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import megatrain_kernels as kernels
from benchmarks.gpu import peers
from benchmarks.gpu.peers import Options, Peer, Tensors
from megatrain_kernels.attention import cases as attention_cases
from megatrain_kernels.cross_entropy import cases as cross_entropy_cases
from megatrain_kernels.grouped_gemm import cases as grouped_gemm_cases
from megatrain_kernels.kernel import Case, Cost
from megatrain_kernels.linear_cross_entropy import cases as linear_cross_entropy_cases
from megatrain_kernels.quantization import cases as quantization_cases
from megatrain_kernels.quantization.reference import dequantize_reference, quantize_reference
from megatrain_kernels.scaled_matmul import cases as scaled_matmul_cases

BOTH = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Operation:
    """One operation of `megatrain_kernels`. Its functions take the tensors of `make_inputs`, then the options."""

    name: str
    timed: Callable[..., Any]
    """`timed(*tensors, backend=..., **options)`."""
    cases: Sequence[Case]
    """Timed on a GPU."""
    small: Sequence[Case]
    """Checked everywhere, and timed where there is no GPU. No size is a multiple of a block."""
    make_inputs: Callable[..., tuple[Tensors, Options]]
    """`make_inputs(case, dtype=..., device=...)`."""
    cost: Callable[..., Cost]
    gradients: tuple[int, ...] = ()
    """Places of the tensors that have a gradient."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    checked: Callable[..., Any] | None = None
    """What is compared with the reference, if not what is timed."""
    reference: Callable[..., Any] | None = None
    """`reference(*tensors, **options)` in float64; None: `timed` with backend="reference"."""
    dtypes: tuple[torch.dtype, ...] = BOTH
    """Types in which it is checked. Timed is bf16."""
    ceiling: str = "bf16"
    """Kind of products whose measured rate bounds it."""
    slack: float = 1.0
    """Factor on the tolerance, where errors grow inside by nature."""


def _case(name: str, names: str, sizes: str, **options: Any) -> Case:
    return Case(name, dict(zip(names.split(), map(int, sizes.split()), strict=True)), options)


def _attention(name: str, sizes: str, **options: Any) -> Case:
    return _case(name, "batch q_seq k_seq heads kv_heads head_dim v_dim", sizes, **options)


ATTENTION = Operation(
    name="attention",
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
    timed=kernels.grouped_gemm,
    cases=grouped_gemm_cases.CASES,
    small=[
        _case("even", "tokens groups in_size out_size", "300 5 136 72"),
        _case("skewed", "tokens groups in_size out_size", "300 17 72 136", skew=2.0),
        _case("odd_rows", "tokens groups in_size out_size", "99 4 67 45"),
    ],
    make_inputs=grouped_gemm_cases.make_inputs,
    cost=grouped_gemm_cases.cost,
    gradients=(0, 1),
    peers=peers.GROUPED_GEMM,
)

CROSS_ENTROPY = Operation(
    name="cross_entropy",
    timed=kernels.cross_entropy,
    cases=cross_entropy_cases.CASES,
    small=[
        _case("plain", "tokens vocab", "67 5003"),
        _case("z_loss", "tokens vocab", "67 1031", z_loss=1e-2),
        _case("softcap", "tokens vocab", "67 1031", softcap=3.0),
    ],
    make_inputs=cross_entropy_cases.make_inputs,
    cost=cross_entropy_cases.cost,
    gradients=(0,),
    peers=peers.CROSS_ENTROPY,
)

LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    timed=kernels.linear_cross_entropy,
    cases=linear_cross_entropy_cases.CASES,
    small=[
        _case("plain", "tokens hidden vocab", "130 96 5003"),
        _case("z_loss", "tokens hidden vocab", "67 96 1031", z_loss=1e-2),
        _case("softcap", "tokens hidden vocab", "67 96 1031", softcap=3.0),
    ],
    make_inputs=linear_cross_entropy_cases.make_inputs,
    cost=linear_cross_entropy_cases.cost,
    gradients=(0, 1),
    peers=peers.LINEAR_CROSS_ENTROPY,
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
        _case(f"{dtype}_{scaling}", "rows cols", "131 270", dtype=dtype, scaling=scaling)
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
    timed=kernels.scaled_matmul,
    cases=scaled_matmul_cases.CASES,
    small=[
        _case("by_tensor", "m k n", "80 272 144", a="tensor", b="tensor"),
        _case("by_row", "m k n", "80 272 144", a="row", b="row"),
        _case("by_block", "m k n", "67 300 150", a="group", b="block"),
        _case("by_group", "m k n", "67 300 150", a="group", b="group"),
    ],
    make_inputs=_scaled_inputs,
    cost=scaled_matmul_cases.cost,
    peers=peers.SCALED_MATMUL,
    reference=_scaled_product,
    dtypes=(torch.bfloat16,),
    ceiling="fp8",
)

OPERATIONS = (
    ATTENTION,
    GROUPED_GEMM,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    QUANTIZATION,
    SCALED_MATMUL,
)
