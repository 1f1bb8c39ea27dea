"""The machine's ceilings, measured: the bandwidth of copies and the best rate of plain matrix products."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.peers import absent
from benchmarks.gpu.steps import Row, Setting, Step

SIZES = (4096, 8192, 16384)
"""Of square products; the best counts."""
SMALL_SIZES = (128,)
KINDS = ("bf16", "tf32", "fp8")


def steps(setting: Setting) -> list[Step]:
    """List one step that says which peers are missing, one for copies and one for each type of products."""
    found = [
        Step({"part": "peers", "what": "peers that are not installed"}, absent),
        Step({"ceiling": "copy"}, partial(_copy, setting)),
    ]
    return found + [Step({"ceiling": kind}, partial(_products, setting, kind)) for kind in KINDS]


def _copy(setting: Setting) -> list[Row]:
    """Measure the copy bandwidth in GB/s, bytes read and bytes written together."""
    size = 1 << (20 if setting.small else 31)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    ms = setting.clock.median_ms(lambda: target.copy_(source))
    return [{"ceiling": "copy", "gbps": 2 * size / ms / 1e6, "ms": ms}]


def _products(setting: Setting, kind: str) -> list[Row]:
    """Measure square products of one type, in TFLOP/s."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 where there are tensor cores; of this step only
    try:
        rows = []
        for size in SMALL_SIZES if setting.small else SIZES:
            ms = setting.clock.median_ms(_product(kind, size, setting.device))
            rows.append({"ceiling": kind, "size": size, "tflops": 2 * size**3 / ms / 1e9, "ms": ms})
        return rows
    finally:
        torch.set_float32_matmul_precision(before)


def _product(kind: str, size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if kind == "fp8":
        one = torch.ones((), device=device)
        left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return partial(torch.mm, a.to(dtype), b.to(dtype))
