"""Attention's launchers through Triton's own binder: what a GPU would be asked to compile, on a machine without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import contextlib
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from megatrain_kernels.flash_attention import triton as launcher, triton_hopper
from megatrain_kernels.flash_attention.reference import Rule

driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda index: 0, get_active_torch_device=lambda: torch.device("cpu")))
torch.cuda.device, torch.cuda.current_device = lambda index: contextlib.nullcontext(), lambda: 0
triton.set_allocator = lambda function: None
launcher._has_descriptors, launcher.cuda_capability = lambda index: True, lambda index: (9, 0)

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def compile(*args, **constants):
            assert self.kernel.warmup(*args, grid=grid, **constants).asm["cubin"]
            print(self.kernel.__name__)
        return compile

def run(kernel, programs, *args, warps, **constants):
    Compiled(kernel)[(programs,)](*args, num_warps=warps, maxnreg=triton_hopper.REGISTERS, **constants)

triton_hopper.run, triton_hopper.processors = run, lambda x: 132
triton_hopper.prepare_kernel = Compiled(triton_hopper.prepare_kernel)
for name in ("doc_ranges_kernel", "delta_kernel"):
    setattr(launcher, name, Compiled(getattr(launcher, name)))
launcher.KINDS |= {name: Compiled(kernel) for name, kernel in launcher.KINDS.items()}

rule = Rule(True, 0.125, None, None, 0)
for batch, seq, heads, kv_heads, documents in ((1, 128, 1, 1, False), (2, 200, 4, 2, True)):
    q = torch.randn(batch, seq, heads, 64, dtype=torch.bfloat16)
    k = torch.randn(batch, seq, kv_heads, 64, dtype=torch.bfloat16)
    docs = torch.zeros(batch, seq, dtype=torch.int64) if documents else None
    for module, options in ((triton_hopper, ({},)), (launcher, ({}, {"fused": True}))):
        out, lse = module.attention_forward(q, k, k, docs, rule)
        for each in options:
            module.attention_backward(q, k, k, out, lse, out, lse, docs, rule, **each)
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_every_launch_compiles(tmp_path: Path) -> None:
    """Sizes of one, which Triton turns into constants, among them."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names.count("forward_kernel") == 4
    assert names.count("key_kernel") == 4
    assert names.count("query_kernel") == names.count("backward_kernel") == names.count("prepare_kernel") == 2
