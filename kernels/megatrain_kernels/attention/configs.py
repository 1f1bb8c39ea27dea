"""Block sizes that the kernels of attention are tuned over, and the fixed ones of Triton's interpreter."""

from functools import cache
from typing import Any

import triton

_Sizes = tuple[int, int, int, int]  # BLOCK_M (queries), BLOCK_N (keys), warps, stages of the load pipeline

# By kernel and width of the head (a power of two), for 16-bit types. Few, since each is compiled and timed once for
# each kind of call; the last of each line needs so little shared memory that it fits every GPU with tensor cores.
_SPACE: dict[str, dict[int, list[_Sizes]]] = {
    "forward": {
        64: [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    },
    "query": {
        64: [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
        256: [(64, 32, 8, 2), (32, 32, 4, 1)],
    },
    "key": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
        128: [(64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
    },
}
_FLOAT32: list[_Sizes] = [(32, 32, 8, 1)]  # registers are scarce: larger blocks spill them
_KEY = ["GROUP", "CAUSAL", "WINDOWED", "DOCS", "CAPPED", "DIM", "V_DIM", "size_class"]

INTERPRETED = {"BLOCK_M": 64, "BLOCK_N": 32, "TMA": False}


def size_class(seq: int) -> int:
    """Lengths of one class share their tuning."""
    return sum(seq >= edge for edge in (1024, 8192))


def configs(kind: str, width: int, itemsize: int, tma: bool) -> list[triton.Config]:
    """The space of one kernel: `kind` is forward, query or key; `width` the wider head size, a power of two."""
    sizes = _FLOAT32 if itemsize == 4 else _SPACE[kind][max(64, width)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TMA": each}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in sizes
        for each in ((False, True) if tma else (False,))
    ]


@cache
def tuned(kernel: Any, kind: str, width: int, itemsize: int, tma: bool) -> Any:
    """The kernel with its choice of blocks: timed at the first call of a kind, then kept in Triton's disk cache."""
    return triton.autotune(configs(kind, width, itemsize, tma), key=_KEY, cache_results=True)(kernel)
