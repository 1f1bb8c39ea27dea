"""Row kernels and grouped products at the shapes of published models fit into the registers of an sm_90.

All but the backward pass of norms over 16,384 elements (Llama 3 405B), which keeps six values of each in registers.

The launchers run as they do on a GPU, on tensors without data; what they would start is compiled instead, which needs
no GPU, and the machine code is asked for its registers, its stack (where registers that do not fit are spilled) and its
shared memory. The table is printed: `pytest -s` shows it.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# A process of its own: in this one Triton may interpret.
SCRIPT = """
import json, re, subprocess, tempfile
from pathlib import Path
import torch, triton
from torch import bfloat16, float32, int64
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatrain_kernels.gated import triton as gated
from megatrain_kernels.gelu import triton as gelu
from megatrain_kernels.grouped_mm import triton as grouped
from megatrain_kernels.newton_schulz import triton as newton_schulz
from megatrain_kernels.norm import triton as norm
from megatrain_kernels.rope import triton as rope
from megatrain_kernels.router import triton as router
from megatrain_kernels.router.reference import GateRule
from megatrain_kernels.xent import triton as xent
from megatrain_kernels.xent.reference import LossOptions

READER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {bfloat16: "*bf16", float32: "*fp32", int64: "*i64"}
H100 = type("H100", (), {"multi_processor_count": 132})
torch.cuda.get_device_properties = lambda _: H100
found, case = {}, ""

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.build

    def build(self, *args, num_warps=4, num_stages=3, **constants):
        given = dict(zip(self.kernel.arg_names, args)) | constants
        types, places, facts = {}, {}, {}
        for n, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if parameter.is_constexpr or (value == 1 if isinstance(value, int) else False):
                types[parameter.name], places[(n,)] = "constexpr", value
                continue
            types[parameter.name] = (
                TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
            )
            if aligned and not parameter.do_not_specialize:
                facts[(n,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, places, facts)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run([READER, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers, stack = (int(re.search(word + r":(\\d+)", said).group(1)) for word in ("REG", "STACK"))
        found[f"{case} {self.kernel.__name__}"] = [registers, stack, made.metadata.shared]

for module in (gated, gelu, grouped, newton_schulz, norm, rope, router, xent):
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Compiled(kernel))

def x(*shape, dtype=bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

for size in (768, 1600, 4096, 8192, 16384):
    for centered in (False, True):
        case = f"norm {size} " + ("layer" if centered else "rms")
        bias = x(size) if centered else None
        norm.normalize(x(8192, size), x(8192, size), x(size), bias, 1e-5, centered=centered)
        mean = x(8192 if centered else 0, dtype=float32)
        given = (x(8192, size), x(8192, size), x(8192, size), x(size), mean, x(8192, dtype=float32))
        norm.gradients(*given, centered=centered, biased=centered)
for size in (1792, 8192, 14336):
    for is_gelu in (False, True):
        case = f"gated {size} " + ("geglu" if is_gelu else "swiglu")
        gated.gated_forward(*[x(8192, size)] * 2, gelu=is_gelu)
        gated.gated_backward(*[x(8192, size)] * 3, gelu=is_gelu)
for size, tanh in ((3072, True), (6400, True), (4096, False)):
    case = f"bias_gelu {size}"
    gelu.bias_gelu_forward(x(16384, size), x(size), tanh=tanh)
    gelu.bias_gelu_backward(x(16384, size), x(16384, size), x(size), tanh=tanh)
for heads, kv_heads, dim in ((32, 8, 64), (32, 8, 128), (128, 8, 128)):
    case = f"rotary {heads} {kv_heads} {dim}"
    tables = [x(8192, dim // 2, dtype=float32)] * 2
    rope.rotate(x(1, 8192, heads, dim), x(1, 8192, kv_heads, dim), *tables, back=False)
for vocab, softcap in ((50257, None), (128256, None), (256000, 30.0)):
    case = f"cross_entropy {vocab}"
    logits, targets = x(1024, vocab), x(1024, dtype=int64)
    options = LossOptions(-100, 1e-4, softcap)
    xent.losses(logits, targets, options, whole=None, gradient=logits)
    xent.partials(logits, targets, options)
for groups, inner, outer in ((8, 4096, 14336), (256, 7168, 2048)):
    case = f"grouped {groups} {inner} {outer}"
    sizes = x(groups, dtype=int64)
    grouped.rows_product(x(65536, inner), x(groups, outer, inner), sizes)
    grouped.outer_product(x(65536, outer), x(65536, inner), sizes)
for size in (2048, 7168):
    case = f"permute {size}"
    order, place, weights = x(65536, dtype=int64), x(8192, 8, dtype=int64), x(8192, 8, dtype=float32)
    grouped.spread(x(8192, size), order, 8, weights=weights, rows=x(65536, size))
    grouped.combine(x(65536, size), place, weights=weights)
for experts, top_k in ((8, 2), (256, 8)):
    case = f"moe_gate {experts}"
    rule = GateRule(top_k, "softmax", True, 1.0, 1, 1)
    logits, picked = x(8192, experts, dtype=float32), x(8192, top_k, dtype=float32)
    router.gate(logits, None, rule)
    router.gate_backward(x(8192, top_k, dtype=int64), logits, picked, logits, rule)
case = "orthogonalize 4096"
newton_schulz.symmetric_product(x(1, 4096, 4096), alpha=2.0, beta=1.0)
print(json.dumps(found))
"""


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_registers_and_shared_memory_suffice(tmp_path: Path) -> None:
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, int, int]] = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{'kernel':50} registers  stack bytes  shared bytes")
    for name, (registers, stack, shared) in found.items():
        print(f"{name:50} {registers:9} {stack:12} {shared:13}")
    assert len(found) > 50
    spilled = {name for name, (_, stack, _) in found.items() if stack}
    assert spilled <= {f"norm 16384 {kind} backward_kernel" for kind in ("rms", "layer")}
    assert all(stack <= 512 for _, stack, _ in found.values())
    assert max(shared for _, _, shared in found.values()) <= 227 * 1024  # what a program may have there
