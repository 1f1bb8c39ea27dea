"""Whether a checkpoint fits on the disk."""

from pathlib import Path

from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.files import free_bytes
from megatrain.checkpoint.reader import TensorSpec

BYTES_PER_TENSOR = 4096
"""Upper bound on the overhead of a stored tensor (name, header, alignment), in bytes."""
SPARE_BYTES = 64 << 10
"""Space for state, manifest and directories, in bytes."""


def has_space(directory: Path, specs: dict[str, TensorSpec]) -> bool:
    """Tell whether a checkpoint of tensors like `specs` fits on the disk."""
    return free_bytes(directory) >= _needed_bytes(specs)


def require_space(directory: Path, specs: dict[str, TensorSpec]) -> None:
    """Check that a checkpoint of tensors like `specs` fits on the disk.

    Raises:
        CheckpointSaveError: it does not; the message says how many bytes it needs and how many are free.
    """
    needed = _needed_bytes(specs)
    free = free_bytes(directory)
    if free < needed:
        raise CheckpointSaveError(
            f"A checkpoint needs {needed:,} bytes ({needed / 2**30:.2f} GiB), but {free:,} ({free / 2**30:.2f} GiB) "
            f"are free in {directory}. Free some space, or keep fewer checkpoints (checkpoint.keep)."
        )


def _needed_bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes + BYTES_PER_TENSOR for spec in specs.values()) + SPARE_BYTES
