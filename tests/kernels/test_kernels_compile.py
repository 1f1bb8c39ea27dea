"""Kernels compile to machine code of GPUs, which needs no GPU; the interpreter would take more."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# A process of its own: in this one Triton may interpret.
COMPILE = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatrain_kernels.xent import triton as loss
from megatrain_kernels.router import triton as gate

steps = {"row_step": "i32", "gradient_step": "i64", "size": "i32", "first": "i64", "rows": "i32", "ignore_index": "i32"}
floats = {name: "fp32" for name in ("z_loss", "cap", "inner", "scale", "small")}
tensors = {name: "*fp32" for name in ("bias", "weights", "scores", "grad_weights", "grad_scores", "grad_logits")}
tensors |= {"whole": "*fp32", "losses": "*fp32", "out": "*fp32", "targets": "*i64", "indices": "*i64"}
known = tensors | steps | floats | {"tokens": "i32", "experts": "i32"}

def build(kernel, capability, dtype, **constants):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = known | {"logits": "*" + dtype, "gradient": "*" + dtype} | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, places)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["cubin"]

for (capability, dtype), on in itertools.product([(80, "fp32"), (90, "bf16")], (False, True)):
    flags = {"CAPPED": on, "SHARED": not on, "GRADIENT": on or dtype == "bf16"}
    for kernel in (loss.losses_kernel, loss.partials_kernel):
        assert build(kernel, capability, dtype, BLOCK=1024, **flags)
for capability, on in ((80, True), (90, False)):
    flags = {"SIGMOID": on, "BIASED": on, "NORMALIZE": on, "GROUPS": 4 if on else 1, "TOP_GROUPS": 2 if on else 1}
    for kernel in (gate.gate_kernel, gate.gate_backward_kernel):
        assert build(kernel, capability, "fp32", TOP_K=3, SLOTS=4, ROWS=8, WIDTH=64, **flags)
print("built")
build(loss.partials_kernel, 90, "bf16", BLOCK=100, CAPPED=False)  # which the interpreter would run
"""


# All other kernels once each, for sm_90; a number is a size or a stride unless it is named here.
REST = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatrain_kernels.flash_attention import triton_backward, triton_forward, triton_tiles
from megatrain_kernels.gated import triton as gated
from megatrain_kernels.gelu import triton as gelu
from megatrain_kernels.grouped_mm import triton as grouped
from megatrain_kernels.newton_schulz import triton as newton_schulz
from megatrain_kernels.norm import triton as norm
from megatrain_kernels.optimizer import triton as optimizer
from megatrain_kernels.rope import triton as rope

FLOATS = {"eps", "slope", "cubic", "alpha", "beta", "sign", "scale", "factor", "inner", "root",
          "density"}
FLOAT32 = {"mean", "inverse", "weight_parts", "bias_parts", "cos", "sin", "lse", "delta", "grad_lse", "sum_q", "base",
           "weights", "grad_weights"}
RANGES = dict.fromkeys(("doc_lows", "doc_highs", "doc_mixed", "lows", "highs", "mixed"), "*i32")
INTEGERS = {"sizes": "*i64", "docs": "*i64", "order": "*i64", "place": "*i64"} | RANGES
POINTERS = INTEGERS | {name: "*fp32" for name in FLOAT32} | {name: "*bf16" for name in (
    "x", "placed", "residual", "weight", "bias", "out", "total", "grad", "grad_total", "grad_x", "gate", "up",
    "grad_gate", "grad_up", "q", "k", "v", "q_out", "k_out", "w", "a", "b", "grad_out", "grad_q", "grad_k", "grad_v")}
FLAGS = {"CENTERED": True, "BIASED": True, "ADDED": True, "GELU": True, "TANH": False, "ROWS": 4,
         "WEIGHTED": True, "GRADIENT": True,
         "Q_HEADS": 8, "K_HEADS": 2, "HALF": 32,
         "GROUPS": 8, "PRECISION": "tf32", "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK": 128, "DEPTH": 32,
         "GROUP": 4, "CAUSAL": True, "WINDOWED": True, "DOCS": True, "CAPPED": True, "FUSED": True, "DIM": 48,
         "V_DIM": 64, "BLOCK_D": 64, "BLOCK_V": 64, "TMA": False, "CHUNK": 512}

def build(kernel):
    constants = {name: value for name, value in FLAGS.items() if name in kernel.arg_names}
    known = POINTERS | dict.fromkeys(constants, "constexpr")
    if "symmetric" in kernel.__name__:
        known["inner"] = "i32"
    types = {name: known.get(name, "fp32" if name in FLOATS else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    return compile(ASTSource(kernel, types, places), target=target, options={"num_warps": 4}).asm["cubin"]

modules = (triton_forward, triton_backward, triton_tiles, gated, gelu, grouped, newton_schulz, norm, rope)
kernels = {f"{m.__name__}.{n}": k for m in modules for n, k in vars(m).items() if n.endswith("_kernel")}
for name, kernel in kernels.items():
    assert build(kernel), name
print(len(kernels))

import re
import triton.language as tl
from megatrain_kernels.optimizer.cases import RULES
from megatrain_kernels.stochastic import GOLDEN, MIX_1, MIX_2

def build_step(how, state, even):
    # Compiles the update of one rule, and returns the widths of its loads and stores.
    kernel = optimizer.step_kernel
    constants = {
        "RULE": how.rule, "BETA1": how.beta1, "BETA2": how.beta2, "EPS": how.eps, "NESTEROV": how.nesterov,
        "CLIPPED": True, "STOCHASTIC": state == tl.bfloat16, "COUNTED": True, "COPIED": True,
        "MOMENTS": len(how.moments), "EVEN": even, "WEIGHT": tl.float32, "GRADIENT": tl.float32, "STATE": state,
        "COPY": tl.bfloat16, "BLOCKS": 8, "BLOCK": 128, "ZERO": 127, "LEAST": 2.0**-126, "STEP": GOLDEN,
        "MIX_1": MIX_1, "MIX_2": MIX_2,
    }
    tables = {"owners": "*i32", "addresses": "*i64", "sizes": "*i64"} | dict.fromkeys(("lr", "kept", "decay"), "fp32")
    known = dict.fromkeys(constants, "constexpr") | tables
    types = {name: known.get(name, "*fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return re.findall("(?:ld|st).global(?:.v([24]))?.b(?:8|16|32) ", made.asm["ptx"])

for rule, state, even in (
    ("adamw", tl.float32, True), ("adamw", tl.bfloat16, False), ("adamw", tl.uint8, True),
    ("lion", tl.bfloat16, True), ("lion", tl.uint8, False), ("sgd", tl.float32, False),
):
    # Whole blocks are moved by 16 bytes: weight, gradient and states.
    widths = build_step(RULES[rule], state, even)
    assert ("4" in widths) == even, (rule, state, even, widths)
print("built")
"""


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_all_other_kernels_compile(tmp_path: Path) -> None:
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REST], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["18", "built"]), done.stderr


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """And what no GPU can run does not: the last line."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    call = [sys.executable, "-c", COMPILE]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "built", done.stderr
    assert done.returncode != 0
    assert "power of 2" in done.stderr
