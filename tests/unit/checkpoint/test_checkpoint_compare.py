"""Planted differences are found where they were planted, in the size that they have, across shards of any form."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from unit.checkpoint.samples import all_bits, make_tensors
from unit.checkpoint.test_checkpoint_inspect import silent
from unit.checkpoint.test_checkpoint_reader import forge

from megatrain.checkpoint import compare as module
from megatrain.checkpoint.compare import Comparison, compare, natural, read_box
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.inspect import Opened, open_checkpoint
from megatrain.checkpoint.store import Checkpointer


def saved(directory: Path, tensors: dict[str, Tensor], state: dict[str, object] | None = None) -> Opened:
    path = Checkpointer(directory, CheckpointConfig()).save(7, tensors, state or {"step": 7}, {"layout": {}})
    return open_checkpoint(path)


def compared(a: Opened, b: Opened, rtol: float = 0.0, only: str = "") -> Comparison:
    return compare(a, b, progress=silent, rtol=rtol, only=only)


def in_shards(directory: Path, name: str, whole: Tensor, pieces: list[tuple[slice, ...]]) -> Opened:
    """A checkpoint that stores `whole` in pieces, as ranks of a layout do."""
    parts = {f"{n}": whole[piece].contiguous() for n, piece in enumerate(pieces)}
    path = Checkpointer(directory, CheckpointConfig()).save(7, parts, {"step": 7})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    chunks, places = [], {}
    for n, piece in enumerate(pieces):
        offsets = torch.Size([each.start or 0 for each in piece] + [0] * (whole.ndim - len(piece)))
        chunks.append(ChunkStorageMetadata(offsets, parts[f"{n}"].shape))
        (place,) = (p for index, p in metadata.storage_data.items() if index.fqn == f"{n}")
        places[MetadataIndex(name, offsets, n)] = place
    metadata.state_dict_metadata = {
        name: TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    }
    metadata.storage_data, metadata.planner_data = places, None
    forge(path, pickle.dumps(metadata))
    return open_checkpoint(path)


def test_the_same_values_are_equal(tmp_path: Path) -> None:
    """NaN, infinities, -0, no elements, no dimensions, transposed and sliced ones among them."""
    found = compared(saved(tmp_path / "a", make_tensors(1)), saved(tmp_path / "b", make_tensors(1)))
    assert found.equal
    assert (found.tensors, found.differences, found.state) == (len(make_tensors(1)), [], {})


def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    opened = saved(tmp_path, make_tensors(3))
    read = {}
    for name, stored in opened.reader.checked.state_dict_metadata.items():
        (box,) = stored.chunks  # type: ignore[union-attr]
        read[name] = read_box(opened.reader, name, box)
    assert all_bits(read) == all_bits(make_tensors(3))


def test_a_planted_difference_is_found_where_it_is(tmp_path: Path) -> None:
    changed = make_tensors(1)
    w = changed["model.layers.0.w"]
    w[3, 5] += 0.25
    w[60, 95] -= 2.0
    found = compared(saved(tmp_path / "a", make_tensors(1)), saved(tmp_path / "b", changed))
    assert not found.equal
    (difference,) = found.differences
    original = make_tensors(1)["model.layers.0.w"].double()
    gaps = (w.double() - original).abs()
    assert (difference.name, difference.differing, difference.elements) == ("model.layers.0.w", 2, 64 * 96)
    assert difference.max_abs == float(gaps.max())
    assert difference.relative == pytest.approx(float(gaps.max() / original.abs().max()), rel=1e-15)
    assert difference.first is not None
    assert difference.largest is not None
    assert (difference.first.index, difference.largest.index) == ((3, 5), (60, 95))
    assert (difference.first.a, difference.first.b) == (float(original[3, 5]), float(w[3, 5]))


@pytest.mark.parametrize(
    ("name", "place", "value", "max_abs"),
    [
        ("model.nan", 0, 1.0, math.inf),
        ("model.nan", 1, -math.inf, math.inf),
        ("model.nan", 2, 0.0, 0.0),
        ("model.nan", 3, 3e-45, 1.401298464324817e-45),
        ("optim.mask", 4, None, 1.0),
        ("optim.count", 2, 0, None),
        ("model.layers.0.bf16", 7, 0.0, None),
        ("model.transposed", 50, 9.0, None),
    ],
)
def test_every_changed_bit_counts(
    tmp_path: Path, name: str, place: int, value: float | None, max_abs: float | None
) -> None:
    """-0 and 0 differ by nothing, and yet they differ; a lost NaN is an infinite difference."""
    changed = make_tensors(1)
    changed[name] = changed[name].clone(memory_format=torch.contiguous_format)
    flat = changed[name].view(-1)
    before = flat[place].item()
    flat[place] = (not before) if value is None else value
    found = compared(saved(tmp_path / "a", make_tensors(1)), saved(tmp_path / "b", changed))
    (difference,) = found.differences
    assert (difference.name, difference.differing) == (name, 1)
    assert difference.max_abs == (abs(before - (value or 0.0)) if max_abs is None else max_abs)


def test_another_nan_differs_by_nothing(tmp_path: Path) -> None:
    changed = make_tensors(1)
    changed["model.nan"].view(torch.int32)[0] += 1
    found = compared(saved(tmp_path / "a", make_tensors(1)), saved(tmp_path / "b", changed))
    assert [(each.name, each.differing, each.max_abs) for each in found.differences] == [
        ("model.nan", 1, 0.0)
    ]


ROWS = [(slice(0, 10),), (slice(10, 24),)]
COLUMNS = [(slice(0, 24), slice(0, 7)), (slice(0, 24), slice(7, 15)), (slice(0, 24), slice(15, 16))]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_shards_of_any_form_are_compared_as_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    whole = torch.arange(24.0 * 16).view(24, 16) + 1
    rows = in_shards(tmp_path / "rows", "model.w", whole, ROWS)
    columns = in_shards(tmp_path / "columns", "model.w", whole, COLUMNS)
    assert compared(rows, columns).equal
    changed = whole.clone()
    changed[9, 15] += 1
    changed[11, 2] += 5
    changed[11, 1] += 3
    other = in_shards(tmp_path / "other", "model.w", changed, COLUMNS)
    for a, b in ((rows, other), (other, rows)):
        (difference,) = compared(a, b).differences
        assert difference.first is not None
        assert difference.largest is not None
        assert (difference.differing, difference.max_abs) == (3, 5.0)
        assert (difference.first.index, difference.largest.index) == ((9, 15), (11, 2))


def test_no_more_than_a_shard_of_each_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(24.0 * 16).view(24, 16)
    sizes = []

    def spy(reader: object, name: str, box: ChunkStorageMetadata) -> Tensor:
        sizes.append(math.prod(box.sizes))
        return read_box(reader, name, box)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read_box", spy)
    a = in_shards(tmp_path / "a", "model.w", whole, [(slice(0, 24),)])
    compared(a, in_shards(tmp_path / "b", "model.w", whole, COLUMNS))
    assert sorted(sizes) == [24, 24, 168, 168, 192, 192]


def test_missing_extra_reshaped_and_other_dtypes(tmp_path: Path) -> None:
    a = {
        "model.a": torch.ones(2, 3),
        "model.x": torch.ones(4),
        "optim.a": torch.ones(3),
        "model.n": torch.ones(2),
    }
    b = {"model.a": torch.ones(3, 2), "ema.y": torch.ones(4), "optim.a": torch.ones(3).double()}
    b["model.n"] = torch.ones(2)
    found = compared(saved(tmp_path / "a", a), saved(tmp_path / "b", b), rtol=1.0)
    assert (found.only_a, found.only_b) == (["model.x"], ["ema.y"])
    assert found.reshaped == {"model.a": ("float32 (2, 3)", "float32 (3, 2)")}
    (difference,) = found.differences
    assert (difference.name, difference.dtype, difference.differing) == ("optim.a", "float32/float64", 0)
    weights = compared(saved(tmp_path / "c", a), saved(tmp_path / "d", b), only="optimizer")
    assert (weights.tensors, weights.only_a, weights.reshaped) == (1, [], {})


def test_rtol_ignores_what_is_small_for_the_tensor(tmp_path: Path) -> None:
    a = {"model.w": torch.tensor([100.0, 1e-3]), "model.v": torch.tensor([1.0, 1.0])}
    b = {"model.w": torch.tensor([100.0, 2e-3]), "model.v": torch.tensor([1.0, 1.001])}
    first = saved(tmp_path / "a", a, {"step": 7, "watch": {"best": 1.0, "n": 3}})
    second = saved(tmp_path / "b", b, {"step": 7, "watch": {"best": 1.00001, "n": 3}})
    assert len(compared(first, second).differences) == 2
    assert compared(first, second).state == {"watch.best": (1.0, 1.00001)}
    found = compared(first, second, rtol=1e-4)
    assert [each.name for each in found.differences] == ["model.v"]
    assert (found.ignored, found.state) == (1, {})
    assert compared(first, second, rtol=1e-2).equal


def test_another_state_is_a_difference(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", make_tensors(1), {"step": 7, "tokens": 10})
    b = saved(tmp_path / "b", make_tensors(1), {"step": 7, "tokens": 11, "more": None})
    found = compared(a, b, rtol=1e-3)
    assert not found.equal
    assert found.state == {"tokens": (10, 11), "more": (None, None)}


def test_names_are_in_natural_order() -> None:
    names = ["model.layers.10.w", "model.layers.2.w", "model.embed"]
    assert sorted(names, key=natural) == ["model.embed", "model.layers.2.w", "model.layers.10.w"]
