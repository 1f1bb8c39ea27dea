"""The kernels of quantization and of scaled products compile to machine code of GPUs, which needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# A process of its own: in this one Triton may interpret.
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatrain_kernels.quantization.reference import FORMATS, SMALLEST_SCALE
from megatrain_kernels.quantization.triton import dequantize_kernel, quantize_kernel
from megatrain_kernels.scaled_mm.triton import scaled_matmul_kernel

def build(kernel, capability, tensors, warps=4, **constants):
    types = {name: "i32" for name in kernel.arg_names} | tensors | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, places)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 3})
    return made.asm["cubin"] and made.asm["ptx"]

for dtype, flags in (("e4m3", "GIVEN"), ("e5m2", "WHOLE"), ("int8", ""), ("int4", "PACKED")):
    form = FORMATS[dtype]
    constants = {"MANTISSA": form.mantissa, "BIAS": form.bias, "PACKED": flags == "PACKED"}
    tensors = {"x": "*bf16", "values": "*u8", "scales": "*fp32", "given": "*fp32"}
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128} if flags == "WHOLE" else {"BLOCK_M": 4, "BLOCK_N": 1024}
    both = constants | blocks
    limits = {"LARGEST": form.largest, "SMALLEST": SMALLEST_SCALE}
    chosen = {"GIVEN": flags == "GIVEN", "WHOLE": flags == "WHOLE"}
    assert build(quantize_kernel, 80, tensors, 8, **both, **limits, **chosen)
    tensors = {"values": "*u8", "scales": "*fp32", "out": "*bf16"}
    assert build(dequantize_kernel, 80, tensors, **both)

for capability, left, rows in ((89, "*fp8e4nv", 1), (90, "*fp8e5", 1), (90, "*fp8e4nv", 128)):
    tensors = {"a": left, "b": "*fp8e4nv", "out": "*bf16", "scale_a": "*fp32", "scale_b": "*fp32"}
    constants = {"A_ROWS": rows, "B_ROWS": 128, "GROUP": 128, "UPCAST": False}
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
    unit = {"a_col": 1, "b_col": 1}
    ptx = build(scaled_matmul_kernel, capability, tensors, 8, **constants, **blocks, **unit)
    assert ("wgmma" if capability == 90 else "mma.sync") in ptx
    assert "e4m3" in ptx
print("built")
constants |= {"BLOCK_K": 16}
build(scaled_matmul_kernel, 90, tensors, 8, **constants, BLOCK_M=128, BLOCK_N=128)  # which the interpreter would run
"""


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """And what no GPU can run does not: the last line."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    call = [sys.executable, "-c", COMPILE]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "built", done.stderr
    assert done.returncode != 0
    assert "32" in done.stderr
