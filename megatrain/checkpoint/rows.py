"""Tensors that are saved and read a few rows at a time, so that one larger than memory passes through it."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatrain.checkpoint.reader import CheckedReader, TensorSpec, read_tensors

PIECE_BYTES = 64 << 20
"""Bytes of a tensor's rows that are handled at a time, unless a single row is larger."""


_last = threading.local()
"""The piece that a thread read last. It is written when the thread asks for the next one, and its memory is given back
then: torch's writer keeps a reference to a piece of each tensor until a file is complete."""


def lazy_tensor(spec: TensorSpec, read: Callable[[int, int], Tensor]) -> Tensor:
    """Return a tensor without values, whose rows a save asks `read(start, stop)` for, piece by piece.

    The checkpoint has the pieces as shards. `read` is called by several threads.
    """
    stand_in = _without_values(spec)
    stand_in.__create_write_items__ = lambda name, _: [
        _write_item(name, spec, *rows) for rows in row_pieces(spec)
    ]
    stand_in.__get_tensor_shard__ = lambda index: _read_shard(spec, read, index)
    stand_in.one_by_one = True  # for `write_tensors`
    return stand_in


def read_pieces(reader: CheckedReader, name: str) -> Iterator[Tensor]:
    """Yield the rows of a stored tensor in order, as many at a time as are stored together.

    A tensor that is not stored by rows alone comes whole. So no byte is read twice.
    """
    stored = reader.checked.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)  # nothing else passes read_metadata
    spec = TensorSpec(stored.properties.dtype, stored.size)
    if not spec.size:
        whole = torch.empty((), dtype=spec.dtype)
        read_tensors(reader, {name: whole})
        yield whole
        return
    bounds = {
        bound for chunk in stored.chunks for bound in (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
    }
    ordered = sorted(bounds | {0, spec.size[0]})
    for start, stop in zip(ordered, ordered[1:] or ordered, strict=False):
        rest = spec.size[1:]
        yield read_box(reader, name, spec, (start, *(0 for _ in rest)), (stop - start, *rest))


def read_box(
    reader: CheckedReader, name: str, spec: TensorSpec, offsets: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Return the part of a stored tensor of that place and size, which has at least one dimension."""
    part = torch.empty(tuple(sizes), dtype=spec.dtype)
    place = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    stand_in = _without_values(spec)
    stand_in.__create_chunk_list__ = lambda: [place]
    stand_in.__get_tensor_shard__ = lambda index: part
    read_tensors(reader, {name: stand_in})
    return part


def row_pieces(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield start and end of the pieces of a tensor's rows, of about `PIECE_BYTES` each."""
    if not spec.size:
        yield 0, 0
        return
    row_bytes = max(1, spec.dtype.itemsize * math.prod(spec.size[1:]))
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, max(spec.size[0], 1), step):
        yield start, min(start + step, spec.size[0])


def _without_values(spec: TensorSpec) -> Any:
    return torch.empty((), dtype=spec.dtype).expand(spec.size)  # of one element, not of a meta tensor's none


def _write_item(name: str, spec: TensorSpec, start: int, stop: int) -> WriteItem:
    offsets = torch.Size((start, *(0 for _ in spec.size[1:]))) if spec.size else torch.Size()
    sizes = torch.Size((stop - start, *spec.size[1:])) if spec.size else torch.Size()
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=spec.dtype),
            size=spec.size,
        ),
    )


def _read_shard(spec: TensorSpec, read: Callable[[int, int], Tensor], index: MetadataIndex) -> Tensor:
    start = index.offset[0] if index.offset else 0
    stop = next(stop for first, stop in row_pieces(spec) if first == start)
    found = torch.empty((stop - start, *spec.size[1:]) if spec.size else (), dtype=spec.dtype)
    found.copy_(read(start, stop))  # into memory of its own, whatever `read` returns
    before: Tensor | None = getattr(_last, "piece", None)
    if before is not None:
        before.untyped_storage().resize_(0)
    _last.piece = found
    return found
