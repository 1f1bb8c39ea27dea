"""Comparison of two checkpoints, whatever the layouts that wrote them, shard by shard: no model is in memory.

Elements are equal if their bits are: NaN equals itself, and -0 is not 0.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatrain.checkpoint.inspect import Opened, Progress, kind_of, naming
from megatrain.checkpoint.reader import CheckedReader, TensorSpec
from megatrain.checkpoint.writer import original_errors

BLOCK = 1 << 20
"""Elements that are compared at a time; the temporaries in float64 are no larger."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Pair = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a tensor and its values in both checkpoints."""

    index: tuple[int, ...]
    a: float
    b: float


@dataclass(slots=True)
class TensorDifference:
    """How a tensor differs between two checkpoints that both have it in the same shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of both, or `a/b` where they differ."""
    elements: int
    differing: int = 0
    """Elements whose bits, or in different dtypes whose values, differ."""
    max_abs: float = 0.0
    """Largest difference of two elements; inf if one of them alone is not finite."""
    scale: float = 0.0
    """Largest finite magnitude of an element in the first checkpoint."""
    first: Element | None = None
    """First differing element in row-major order."""
    largest: Element | None = None

    @property
    def relative(self) -> float:
        """`max_abs` as a share of the largest element of the first checkpoint."""
        return self.max_abs / self.scale if self.scale else math.inf if self.max_abs else 0.0


@dataclass(slots=True)
class Comparison:
    """Result of comparing two checkpoints; `rtol` is the share up to which a difference is ignored."""

    rtol: float
    tensors: int = 0
    """Tensors in both."""
    differences: list[TensorDifference] = field(default_factory=list)
    """Those that differ by more than `rtol`, in the order of their names."""
    ignored: int = 0
    """Tensors that differ by at most `rtol`."""
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Dtype and shape of tensors whose shapes differ."""
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    state: dict[str, Pair] = field(default_factory=dict)
    """Keys of state.json that differ."""
    info: dict[str, Pair] = field(default_factory=dict)
    """What else the manifests say: layout, versions, ... It may differ between equal checkpoints."""

    @property
    def equal(self) -> bool:
        """Whether the two hold the same state of training, up to `rtol`."""
        return not (self.differences or self.reshaped or self.only_a or self.only_b or self.state)

    @property
    def largest(self) -> TensorDifference | None:
        """The tensor with the largest difference in proportion to its values."""
        return max(self.differences, key=lambda each: (each.relative, each.differing), default=None)


def compare(a: Opened, b: Opened, *, progress: Progress, rtol: float = 0.0, only: str = "") -> Comparison:
    """Compare the tensors and the state of two checkpoints, the hashes of which the caller has checked.

    Args:
        only: a kind of `inspect.KINDS`, to compare the tensors of that kind and nothing else.
        rtol: largest accepted difference in proportion to the largest element of the tensor.

    Raises:
        DamagedCheckpointError: a file changed while it was read.
    """
    found = Comparison(rtol)
    ours, theirs = (_specs(each.reader, only) for each in (a, b))
    found.only_a = sorted(ours.keys() - theirs.keys(), key=natural)
    found.only_b = sorted(theirs.keys() - ours.keys(), key=natural)
    common = sorted(ours.keys() & theirs.keys(), key=natural)
    found.tensors = len(common)
    total, done = sum(ours[name].nbytes for name in common) or 1, 0
    for name in common:
        progress("comparing", done / total)
        done += ours[name].nbytes
        if ours[name].size != theirs[name].size:
            found.reshaped[name] = (str(ours[name]), str(theirs[name]))
            continue
        difference = _compare_tensor(a, b, name)
        if difference.differing or ours[name].dtype != theirs[name].dtype:
            is_small = difference.relative <= rtol and ours[name].dtype == theirs[name].dtype and rtol > 0
            found.ignored += is_small
            if not is_small:
                found.differences.append(difference)
    if not only:
        found.state = _pairs(a.state, b.state, rtol)
        found.info = _pairs(_facts(a), _facts(b), 0.0)
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def close(a: Any, b: Any, rtol: float) -> bool:
    """Return whether two values are the same, or are numbers that differ by at most `rtol` of the larger one."""
    if isinstance(a, int | float) and isinstance(b, int | float) and rtol > 0:
        return math.isclose(a, b, rel_tol=rtol)
    return bool(a == b) or (a != a and b != b)  # NaN


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested mappings under its dotted key."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from flat(each, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def read_box(reader: CheckedReader, name: str, box: ChunkStorageMetadata) -> Tensor:
    """Return the elements of a tensor within `box`, of whichever shards hold them."""
    stored = reader.checked.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)  # nothing else passes the reader's checks
    target = torch.empty(box.sizes, dtype=stored.properties.dtype)
    plan = LoadPlan(create_read_items_for_chunk_list(name, stored, [box]))
    reader.set_up_storage_reader(reader.checked, True)
    with original_errors():
        reader.read_data(plan, _BoxPlanner(target))
    return target


class _BoxPlanner(DefaultLoadPlanner):
    """A planner that puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the target that an item fills."""
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the tensor that was filled is a view of the target."""


def _specs(reader: CheckedReader, only: str) -> dict[str, TensorSpec]:
    specs = reader.tensor_specs().items()
    return {name: spec for name, spec in specs if not only or kind_of(name) == only}


def _compare_tensor(a: Opened, b: Opened, name: str) -> TensorDifference:
    """Compare one tensor over the smaller shards of the two, one at a time."""
    stored = [each.reader.checked.state_dict_metadata[name] for each in (a, b)]
    assert all(isinstance(each, TensorStorageMetadata) for each in stored)
    boxes = max((each.chunks for each in stored), key=len)  # type: ignore[union-attr]
    ours, theirs = (each.reader.tensor_specs()[name] for each in (a, b))
    names = [str(each.dtype).removeprefix("torch.") for each in (ours, theirs)]
    size = tuple(ours.size)
    found = TensorDifference(name, size, "/".join(dict.fromkeys(names)), math.prod(size))
    for box in boxes:
        if math.prod(box.sizes):
            with naming(a.path):
                x = read_box(a.reader, name, box)
            with naming(b.path):
                y = read_box(b.reader, name, box)
            _compare_box(found, x.flatten(), y.flatten(), box)
    return found


def _compare_box(found: TensorDifference, x: Tensor, y: Tensor, box: ChunkStorageMetadata) -> None:
    """Add to `found` how the values in `box` differ, `x` and `y`, both flattened."""
    for start in range(0, len(x), BLOCK):
        one, two = x[start : start + BLOCK], y[start : start + BLOCK]
        values, others = _wide(one), _wide(two)
        sizes = values.abs()
        found.scale = max(found.scale, float(sizes.where(sizes.isfinite(), 0).max()))
        differ = _bits(one) != _bits(two) if one.dtype == two.dtype else values != others
        differ = differ.view(len(one), -1).any(1)
        if not differ.any():
            continue
        found.differing += int(differ.sum())
        gap = (values - others).abs()
        same = (values == others) | (values.isnan() & others.isnan())
        gap = gap.nan_to_num(nan=math.inf, posinf=math.inf).where(~same, 0)
        first, most = int(differ.int().argmax()), int(gap.where(differ, -1).argmax())
        at_first = Element(_index(start + first, box), *_values(one, two, first))
        if found.first is None or at_first.index < found.first.index:
            found.first = at_first
        if found.largest is None or float(gap[most]) > found.max_abs:
            found.max_abs = float(gap[most])
            found.largest = Element(_index(start + most, box), *_values(one, two, most))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _bits(values: Tensor) -> Tensor:
    """Return the values `(n,)` as integers of their bits, `(n,)` or `(n, parts)`."""
    size = values.dtype.itemsize
    return values.view(BITS[size]) if size in BITS else values.view(torch.uint8).view(-1, size)


def _values(x: Tensor, y: Tensor, place: int) -> tuple[float, float]:
    return x[place].item(), y[place].item()


def _index(place: int, box: ChunkStorageMetadata) -> tuple[int, ...]:
    """Return the index in the tensor of the element at `place` in the flattened box."""
    found = []
    for offset, size in zip(reversed(box.offsets), reversed(box.sizes), strict=True):
        place, rest = divmod(place, size)
        found.append(offset + rest)
    return tuple(reversed(found))


def _facts(opened: Opened) -> dict[str, Any]:
    manifest = opened.manifest
    return {"step": manifest.step, "parent": manifest.parent, "versions": manifest.versions} | manifest.info


def _pairs(a: dict[str, Any], b: dict[str, Any], rtol: float) -> dict[str, Pair]:
    """Return the dotted keys whose values differ; None where one lacks the key."""
    ours, theirs = dict(flat(a)), dict(flat(b))
    keys = dict.fromkeys([*ours, *theirs])
    return {
        key: (ours.get(key), theirs.get(key))
        for key in keys
        if not close(ours.get(key), theirs.get(key), rtol) or (key in ours) != (key in theirs)
    }
