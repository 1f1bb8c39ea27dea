"""Reader of torch.distributed.checkpoint files that does not trust them.

Torch's `.metadata` file is a pickle, which can run arbitrary code when it is loaded and can name any file. Here it can
only create objects of the few classes that it legitimately contains, and only files of the checkpoint are read. Torch's
own reader ignores unrequested tensors, mismatched dtypes and holes; here each of these is an error.
"""

import io
import math
import os
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatrain.checkpoint.cipher import FileCipher
from megatrain.checkpoint.errors import CheckpointMismatchError, CorruptCheckpointError
from megatrain.checkpoint.files import WORKERS, FileRecord
from megatrain.checkpoint.writer import original_errors

MAX_METADATA_BYTES = 1 << 30
MAX_LISTED = 8
"""Maximum number of differences listed in an error message."""

_METADATA_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"tensors of layout {name!r} are not read")
    return torch.strided


ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _METADATA_CLASSES},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    (filesystem.__name__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
}
"""All that a metadata file may refer to: classes that only hold values."""

# fmt: off
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
))
# fmt: on
"""Pickle instructions that a metadata file may use. Others, such as those
that can claim any amount of memory, are refused."""


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that refuses everything outside `allowed` before it is imported or called."""

    allowed: Mapping[tuple[str, str], Any] = ALLOWED

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed object of that name.

        Raises:
            pickle.UnpicklingError: it is not in `allowed`.
        """
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


class TensorSpec(NamedTuple):
    """Dtype and global shape of a tensor, which must match between a saved tensor and its destination."""

    dtype: torch.dtype
    size: torch.Size

    @property
    def nbytes(self) -> int:
        """Size of the full tensor over all ranks, in bytes."""
        return self.dtype.itemsize * math.prod(self.size)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.size)}"


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return dtype and global shape of a tensor or DTensor."""
    return TensorSpec(tensor.dtype, tensor.shape)


class DecryptingFileSystem(FileSystem):
    """File system for torch.distributed.checkpoint that reads encrypted files."""

    def __init__(self, cipher: FileCipher) -> None:
        self._cipher = cipher

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file to read its plain text; `mode` is "rb"."""
        with Path(path).open("rb", buffering=0) as file:
            yield self._cipher.reader(file, Path(path).name, Path(path).stat().st_size)


class CheckedReader(FileSystemReader):
    """A reader of a checkpoint's tensor files whose metadata has been checked."""

    def __init__(self, directory: Path, checked: Metadata, cipher: FileCipher | None = None) -> None:
        super().__init__(directory)
        self.checked = checked
        self.fs: FileSystem = FileSystem() if cipher is None else DecryptingFileSystem(cipher)

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every stored tensor, by name."""
        stored = self.checked.state_dict_metadata.items()
        return {name: TensorSpec(tensor.properties.dtype, tensor.size) for name, tensor in stored}  # type: ignore[union-attr]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked metadata; torch calls this instead of reading the file."""
        return self.checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned pieces, `WORKERS` files in parallel."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        read = partial(super().read_data, planner=planner)
        with ThreadPoolExecutor(WORKERS) as pool:
            for part in [pool.submit(read, replace(plan, items=items)) for items in by_file.values()]:
                part.result()
        future: Future[None] = Future()
        future.set_result(None)
        return future


def read_metadata(raw: bytes, files: dict[str, FileRecord]) -> Metadata:
    """Parse and check `raw`, the `.metadata` file of a checkpoint that consists of `files`.

    Raises:
        CorruptCheckpointError: it describes anything but complete tensors stored in `files`.
    """
    try:
        require_plain(raw)
        found = MetadataUnpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a broken pickle may raise anything
        raise CorruptCheckpointError(f".metadata is refused: {error or type(error).__name__}") from None
    try:
        check_metadata(found, files)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise CorruptCheckpointError(f".metadata is not of the expected form ({error})") from None
    return found


def require_plain(raw: bytes) -> None:
    """Refuse a pickle with instructions that a metadata file does not need.

    Raises:
        pickle.UnpicklingError: it has some; or any other error, if it is broken.
    """
    if strange := {opcode.name for opcode, _, _ in pickletools.genops(raw)} - OPCODES:
        raise pickle.UnpicklingError(f"it uses {', '.join(sorted(strange))}")


def read_tensors(reader: CheckedReader, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors` in place, only the local shard of each DTensor, without communication."""
    with original_errors():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def check_same_tensors(
    saved: Metadata, wanted: Mapping[str, TensorSpec], *, only: str | tuple[str, ...] = ""
) -> None:
    """Compare names, shapes and dtypes of the saved tensors whose names start with `only` with `wanted`.

    Raises:
        CheckpointMismatchError: they differ; the message lists how.
    """
    have = {name: tensor for name, tensor in saved.state_dict_metadata.items() if name.startswith(only)}
    problems = [f"{name}: not in the checkpoint" for name in sorted(wanted.keys() - have.keys())]
    problems += [f"{name}: only in the checkpoint" for name in sorted(have.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & have.keys()):
        stored = have[name]
        assert isinstance(stored, TensorStorageMetadata)  # nothing else passes check_metadata
        was, now = TensorSpec(stored.properties.dtype, stored.size), wanted[name]
        if was != now:
            problems.append(f"{name}: {was} in the checkpoint, {now} here")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointMismatchError(
            f"The checkpoint does not match the tensors of this model and optimizer:{shown}{more}\n"
            "Restore the config values that it was saved with, or start another run with run.name=..."
        )


def check_metadata(found: Any, files: dict[str, FileRecord]) -> None:
    """Check that unpickled metadata describes nothing but complete tensors stored inside `files`.

    Raises:
        CorruptCheckpointError: it does not.
        TypeError: it is not metadata; or another error of a form that was not expected.
    """
    if not isinstance(found, Metadata):
        raise TypeError(f"it holds a {type(found).__name__}")
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise TypeError("its storage locations have an unexpected type")
        if place.relative_path not in files:
            raise CorruptCheckpointError(
                f".metadata refers to {str(place.relative_path)[:80]!r}, which is not in the manifest"
            )
        if place.transform_descriptors:
            raise CorruptCheckpointError(f"{index.fqn} is stored with a transformation")
        if not 0 <= place.offset <= place.offset + place.length <= files[place.relative_path].size:
            raise CorruptCheckpointError(f"{index.fqn} lies outside of {place.relative_path}")
    for name, tensor in found.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise CorruptCheckpointError(f"{name} is not a tensor; only tensors are read")
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in found.storage_data:
                raise CorruptCheckpointError(f"{name} has a shard that is stored nowhere")
        _check_coverage(name, tensor.size, tensor.chunks)


def _check_coverage(name: str, size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """Check that every element of the tensor is stored exactly once.

    This holds if its chunks lie inside it, do not overlap, and have as many elements in total.

    Raises:
        CorruptCheckpointError: an element is missing or stored twice.
    """
    boxes = [
        [(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
    ]
    for box in boxes:
        inside = all(0 <= a <= b <= limit for (a, b), limit in zip(box, size, strict=True))
        if not inside:
            raise CorruptCheckpointError(f"{name} has a shard outside its shape {tuple(size)}")
    volume = sum(math.prod(chunk.sizes) for chunk in chunks)
    if volume != math.prod(size) or not chunks:
        raise CorruptCheckpointError(
            f"{name} is not complete: {volume:,} of {math.prod(size):,} elements are stored"
        )
    if len(boxes) > 1 and _overlap(boxes):
        raise CorruptCheckpointError(f"{name} has shards that overlap")


def _overlap(boxes: list[list[tuple[int, int]]]) -> bool:
    """Return whether two boxes share an element, by a sweep along the dimension with the most distinct starts."""
    full = [box for box in boxes if all(a < b for a, b in box)]
    sweep = max(range(len(boxes[0])), key=lambda dim: len({box[dim][0] for box in full}), default=0)
    active: list[list[tuple[int, int]]] = []
    for box in sorted(full, key=lambda box: box[sweep]):
        active = [other for other in active if other[sweep][1] > box[sweep][0]]
        for other in active:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return True
        active.append(box)
    return False
