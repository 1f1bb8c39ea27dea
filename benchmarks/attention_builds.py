"""What attention's kernels compile to, read without a GPU: registers, spills, shared memory, serialized products.

    python -m benchmarks.attention_builds --out benchmarks/results/attention_builds.json

compiles every kernel with every block size that it may take, for the shapes of published models, with the
compiler and the assembler that Triton brings. Such figures say what can't be fast (a spill inside a loop, products that
wait for each other), and nothing of how fast the rest is.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before kernels are decorated

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.attention_blocks import SHAPES
from megatrain_kernels.flash_attention import triton as launcher
from megatrain_kernels.flash_attention import triton_hopper
from megatrain_kernels.flash_attention.triton_blocks import space
from megatrain_kernels.flash_attention.triton_hopper_backward import backward_kernel
from megatrain_kernels.flash_attention.triton_hopper_forward import forward_kernel

MASKS = {
    "causal": {"CAUSAL": True},
    "full": {"CAUSAL": False},
    "window": {"CAUSAL": True, "WINDOWED": True},
    "documents": {"CAUSAL": True, "DOCS": True},
}
HOPPER = {"hopper_forward": forward_kernel, "hopper_backward": backward_kernel}
ALL_KINDS = (*launcher.KINDS, *HOPPER)
POINTERS = {
    "docs": "*i64",
    "doc_lows": "*i32",
    "doc_highs": "*i32",
    "doc_mixed": "*i32",
    "lows": "*i32",
    "highs": "*i32",
    "mixed": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    "sum_q": "*fp32",
}
FLOATS = {"factor", "inner", "scale"}


@dataclass(frozen=True)
class Build:
    """One kernel with one choice of blocks for one shape and mask."""

    kind: str
    shape: str
    mask: str
    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool
    capability: int = 90


@dataclass(frozen=True)
class Facts:
    """What the assembler says of a build."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    """Products of a warp group wait for one another (ptxas' warnings C7510 to C7515)."""
    products: int
    """Asynchronous products (wgmma) in the code; others: `mma.sync`, on sm_90 a loss."""
    synchronous_products: int
    loop: int
    """Instructions of the shortest loop with products: blocks that need no mask, where most time goes."""
    loop_spills: int
    """Loads and stores of spilled registers in it."""
    seconds: float


def builds(shapes: Iterable[str], masks: Iterable[str], capability: int = 90) -> list[Build]:
    """List the builds that a GPU of the capability would choose from."""
    found = []
    for kind, shape, mask in itertools.product(launcher.KINDS, shapes, masks):
        for sizes in space(kind, SHAPES[shape][2], 2):
            found.append(Build(kind, shape, mask, *sizes, capability >= 90, capability))
    if capability == 90:
        keys, stages = triton_hopper.KEYS, triton_hopper.STAGES
        for shape, mask in itertools.product(shapes, masks):
            found.append(Build("hopper_forward", shape, mask, 128, keys, 4, stages, True))
            found.append(Build("hopper_backward", shape, mask, triton_hopper.QUERIES, keys, 8, stages, True))
    return found


def compiled(build: Build) -> Facts:
    """Compile one build and read what came out."""
    source, options = _hopper(build) if build.kind.startswith("hopper") else _plain(build)
    started = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    seconds = time.perf_counter() - started
    ptx = made.asm["ptx"]
    said = _assembled(ptx, build.capability)
    loop = min(_loops(made.asm["cubin"], build.capability), key=len)
    return Facts(
        registers=int(re.findall(r"Used (\d+) registers", said)[-1]),
        spilled_bytes=max(int(each) for each in re.findall(r"(\d+) bytes spill stores", said)),
        shared_bytes=made.metadata.shared,
        serialized=bool(re.search(r"C75\d\d", said)),
        products=ptx.count("wgmma.mma_async"),
        synchronous_products=ptx.count("mma.sync"),
        loop=len(loop),
        loop_spills=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
        seconds=seconds,
    )


def _plain(build: Build) -> tuple[ASTSource, dict[str, int]]:
    """Return a Triton kernel with the types of a call, and how it is compiled."""
    kernel, (heads, kv_heads, dim) = launcher.KINDS[build.kind], SHAPES[build.shape]
    constants = _flags(build) | {
        "GROUP": heads // kv_heads, "CAPPED": False, "FUSED": build.kind == "fused", "DIM": dim, "V_DIM": dim,
        "BLOCK_D": dim, "BLOCK_V": dim, "BLOCK_M": build.block_m, "BLOCK_N": build.block_n, "TMA": build.descriptors,
    }  # fmt: skip
    types = {name: _type(name) for name in kernel.arg_names}
    options = {"num_warps": build.warps, "num_stages": build.stages}
    return _source(ASTSource, kernel, types, constants), options


def _hopper(build: Build) -> tuple[ASTSource, dict[str, int]]:
    """Return a Gluon kernel with the types of a call, and how it is compiled."""
    kernel = HOPPER[build.kind]
    heads, kv_heads, dim = SHAPES[build.shape]
    constants = _flags(build) | {
        "GROUP": heads // kv_heads, "D": dim, "M": build.block_m, "N": build.block_n, "STAGES": build.stages
    }  # fmt: skip
    types = {name: _type(name) for name in kernel.arg_names}
    rows = build.block_m // 2 if build.kind == "hopper_forward" else build.block_m
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            flat = name in ("lse_desc", "delta_desc")
            block = [1, rows] if flat else [1, build.block_n if name[-6] in "kv" else rows, 1, dim]
            wide = flat or name == "sum_desc"
            layout = gl.NVMMASharedLayout(
                swizzle_byte_width=0 if flat else 128, element_bitwidth=32 if wide else 16, rank=len(block)
            )
            types[name] = f"tensordesc<{'fp32' if wide else 'bf16'}{block},{layout!r}>"
    options = {"num_warps": build.warps, "maxnreg": triton_hopper.REGISTERS}
    return _source(GluonASTSource, kernel, types, constants), options


def _flags(build: Build) -> dict[str, Any]:
    return {"CAUSAL": True, "WINDOWED": False, "DOCS": False} | MASKS[build.mask]


def _type(name: str) -> str:
    number = name.endswith(
        ("_row", "_step", "_head", "seq", "heads", "_class", "offset", "window", "batches")
    )
    return "fp32" if name in FLOATS else "i32" if number else POINTERS.get(name, "*bf16")


def _source(made: Any, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """Return a kernel with a call's types; addresses and strides are multiples of 16, as they are in real calls."""
    place = {name: (at,) for at, name in enumerate(kernel.arg_names)}
    constants = {name: value for name, value in constants.items() if name in place}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [
        name for name, kind in types.items() if kind[0] == "*" or name.endswith(("_row", "_step", "_head"))
    ]
    attributes = {place[name]: [["tt.divisibility", 16]] for name in aligned}
    source: ASTSource = made(
        kernel, types, {place[name]: value for name, value in constants.items()}, attributes
    )
    return source


def _assembled(ptx: str, capability: int) -> str:
    """Return what the assembler says of `ptx`; Triton's own call of it throws that away."""
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "kernel.ptx"
        path.write_text(ptx)
        call = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}",
            path,
            "-o",
            "/dev/null",
        ]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
    return done.stderr


def _loops(cubin: bytes, capability: int) -> list[list[str]]:
    """Return the instructions of each innermost loop of a build that multiplies: up to a jump back to its beginning."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(get_ptxas(capability).path).parent / "nvdisasm"
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            lines.append(line)
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(lines)))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [lines[first:last] for first, last in inner]
    return [loop for loop in found if any("MMA" in line for line in loop)]


def main() -> None:
    """Compile in all cores and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument(
        "--capability", type=int, default=90, choices=(80, 90, 100), help="default: %(default)s"
    )
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=ALL_KINDS)
    parser.add_argument("--first", action="store_true", help="only the first of each kernel's block sizes")
    options = parser.parse_args()
    listed = [
        each
        for each in builds(options.shapes, options.masks, options.capability)
        if each.kind in options.kinds
    ]
    if options.first:
        listed = list({(each.kind, each.shape, each.mask): each for each in reversed(listed)}.values())
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for build, facts in zip(listed, pool.map(compiled, listed), strict=True):
            rows.append(asdict(build) | asdict(facts))
            print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "triton": triton.__version__,
    }
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
