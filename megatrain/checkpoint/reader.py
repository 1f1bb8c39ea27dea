"""Reads what torch.distributed.checkpoint wrote, without trusting it.

Its `.metadata` file is a pickle, which may run any code when it is loaded; here only the few classes that it
really consists of can be made from it. It may name files anywhere; here only files of the checkpoint are read. It is
silent about keys that were not asked for, about other dtypes, and about holes; here each is an error.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatrain.checkpoint.errors import CheckpointMismatchError, Damage
from megatrain.checkpoint.files import WORKERS, FileRecord
from megatrain.checkpoint.writer import as_itself

MAX_METADATA_BYTES = 1 << 30
MAX_LISTED = 8

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
"""All that a metadata file may refer to. None of it does more than hold values."""

# fmt: off
OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
))
# fmt: on
"""The steps that a metadata file is built by. Left out are, for instance, those that ask for any amount of memory."""


class MetadataUnpickler(pickle.Unpickler):
    """Makes objects of `ALLOWED` only; everything else is refused before it is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


class Kind(NamedTuple):
    """What must agree between a saved tensor and the one that it is read into."""

    dtype: torch.dtype
    size: torch.Size

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.dtype.itemsize * math.prod(self.size)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.size)}"


class CheckedReader(FileSystemReader):
    """Reads the files of a checkpoint by metadata that was already checked."""

    def __init__(self, directory: Path, checked: Metadata) -> None:
        super().__init__(directory)
        self.checked = checked

    def kinds(self) -> dict[str, Kind]:
        """All tensors by name."""
        stored = self.checked.state_dict_metadata.items()
        return {name: Kind(tensor.properties.dtype, tensor.size) for name, tensor in stored}  # type: ignore[union-attr]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """`WORKERS` files at once."""
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
    """The checked content of a `.metadata` file of a checkpoint that consists of `files`.

    Raises:
        Damage: it holds anything but tensors that lie wholly in `files`.
    """
    try:
        if strange := {opcode.name for opcode, _, _ in pickletools.genops(raw)} - OPCODES:
            raise pickle.UnpicklingError(f"it uses {', '.join(sorted(strange))}")
        found = MetadataUnpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a broken pickle may raise anything
        raise Damage(f".metadata is refused: {error or type(error).__name__}") from None
    try:
        _check_metadata(found, files)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise Damage(f".metadata is not of the expected form ({error})") from None
    return found


def read_tensors(reader: CheckedReader, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors`, in place; of a DTensor this process's part only. No other process is needed."""
    with as_itself():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def check_same_tensors(saved: Metadata, wanted: Mapping[str, Kind], *, only: str = "") -> None:
    """Compare names, shapes and dtypes of the saved tensors (those whose name starts with `only`) and `wanted`.

    Raises:
        CheckpointMismatchError: lists the differences of each kind.
    """
    have = {name: tensor for name, tensor in saved.state_dict_metadata.items() if name.startswith(only)}
    problems = [f"{name}: not in the checkpoint" for name in sorted(wanted.keys() - have.keys())]
    problems += [f"{name}: in the checkpoint only" for name in sorted(have.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & have.keys()):
        stored = have[name]
        assert isinstance(stored, TensorStorageMetadata)  # nothing else passes _check_metadata
        was, now = Kind(stored.properties.dtype, stored.size), wanted[name]
        if was != now:
            problems.append(f"{name}: {was} in the checkpoint, {now} here")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointMismatchError(
            f"The checkpoint does not hold the tensors of this model and optimizer:{shown}{more}\n"
            "Give the config the values that it was saved with, or start another run with run.name=..."
        )


def _check_metadata(found: Any, files: dict[str, FileRecord]) -> None:
    if not isinstance(found, Metadata):
        raise TypeError(f"it holds a {type(found).__name__}")
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise TypeError("its table of places holds something else")
        if place.relative_path not in files:
            raise Damage(
                f".metadata refers to {str(place.relative_path)[:80]!r}, which is not in the manifest"
            )
        if place.transform_descriptors:
            raise Damage(f"{index.fqn} is stored with a transformation")
        if not 0 <= place.offset <= place.offset + place.length <= files[place.relative_path].size:
            raise Damage(f"{index.fqn} lies outside {place.relative_path}")
    for name, tensor in found.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise Damage(f"{name} is not a tensor; only tensors are read")
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in found.storage_data:
                raise Damage(f"{name} has a part that is stored nowhere")
        _check_coverage(name, tensor.size, tensor.chunks)


def _check_coverage(name: str, size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """The chunks lie inside the tensor, do not overlap, and together are as large: so each element is there once."""
    boxes = [
        [(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
    ]
    for box in boxes:
        inside = all(0 <= a <= b <= limit for (a, b), limit in zip(box, size, strict=True))
        if not inside:
            raise Damage(f"{name} has a part outside its shape {tuple(size)}")
    volume = sum(math.prod(chunk.sizes) for chunk in chunks)
    if volume != math.prod(size) or not chunks:
        raise Damage(f"{name} is not complete: {volume:,} of {math.prod(size):,} elements are stored")
    if len(boxes) > 1 and _overlap(boxes):
        raise Damage(f"{name} has parts that overlap")


def _overlap(boxes: list[list[tuple[int, int]]]) -> bool:
    """Whether two of the boxes share an element; a sweep along the dimension that is cut most often."""
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
