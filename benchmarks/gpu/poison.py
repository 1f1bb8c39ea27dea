"""Memory in which what a kernel does not write is seen: it holds NaN before the call."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAN_BYTE = 0xFF  # four, two or one of them are NaN in float32, bfloat16, float16 and both kinds of fp8
SMALL_BLOCKS = 64
"""Of 1 MiB, the largest that PyTorch's allocator keeps apart from larger ones."""


def fill_free_memory(device: torch.device, size: int) -> None:
    """Leave `size` bytes of NaN, and many small blocks of it, where the device's next tensors are put.

    On a CPU nothing is kept between tensors: there `deterministic` does the same.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    sizes = [size, *([1 << 20] * SMALL_BLOCKS)]
    held = [torch.full((each,), NAN_BYTE, dtype=torch.uint8, device=device) for each in sizes]
    torch.cuda.synchronize(device)
    del held


@contextmanager
def deterministic() -> Iterator[None]:
    """Have PyTorch take its deterministic paths, and fill new tensors with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
