"""Tensors that pass a few rows at a time come out bit by bit as they went in."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unit.checkpoint.samples import all_bits, make_tensors, targets_for

from megatrain.checkpoint import rows
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.reader import TensorSpec, spec_of
from megatrain.checkpoint.rows import lazy_tensor, read_box, read_pieces, row_pieces
from megatrain.checkpoint.safetensors_file import SafetensorsFile, SafetensorsSource
from megatrain.checkpoint.store import Checkpointer


def some_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if tensor.ndim else tensor


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 1000)


def saved(directory: Path, tensors: dict[str, Tensor]) -> Checkpointer:
    lazy = {name: lazy_tensor(spec_of(each), partial(some_rows, each)) for name, each in tensors.items()}
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save(7, lazy, {})
    return checkpointer


def test_a_checkpoint_of_rows_is_one_of_the_tensors(small_pieces: None, tmp_path: Path) -> None:
    tensors = make_tensors(3)
    checkpointer = saved(tmp_path, tensors)
    assert checkpointer.load(loaded := targets_for(tensors)) is not None
    assert all_bits(loaded) == all_bits(tensors)
    stored = checkpointer.open(7).checked.state_dict_metadata
    assert len(stored["model.layers.0.w"].chunks) == 32  # type: ignore[union-attr]
    assert len(stored["optim.count"].chunks) == 1  # type: ignore[union-attr]


def test_rows_are_read_as_they_are_stored(small_pieces: None, tmp_path: Path) -> None:
    tensors = make_tensors(4)
    reader = saved(tmp_path, tensors).open(7)
    for name, tensor in tensors.items():
        pieces = list(read_pieces(reader, name))
        whole = torch.cat(pieces) if tensor.ndim else pieces[0]
        assert all_bits({name: whole}) == all_bits({name: tensor})
    assert {len(piece) for piece in read_pieces(reader, "model.layers.0.w")} == {2}
    spec = spec_of(tensors["model.layers.0.w"])
    box = read_box(reader, "model.layers.0.w", spec, (5, 90), (11, 6))
    assert torch.equal(box, tensors["model.layers.0.w"][5:16, 90:96])


def test_a_row_larger_than_a_piece_is_a_piece(small_pieces: None) -> None:
    assert list(row_pieces(TensorSpec(torch.float32, torch.Size((3, 400))))) == [(0, 1), (1, 2), (2, 3)]


def test_safetensors_are_written_and_read_by_rows(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in make_tensors(5).items()}
    path = tmp_path / "ours.safetensors"
    with SafetensorsFile(path, {name: spec_of(each) for name, each in tensors.items()}, {}) as file:
        for name, tensor in tensors.items():
            for start in range(0, len(tensor) if tensor.ndim else 1, 3):
                file.write(name, some_rows(tensor, start, start + 3))
            if tensor.ndim and not len(tensor):
                file.write(name, tensor)
    assert all_bits(load_file(path)) == all_bits(tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    source = SafetensorsSource(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        assert all_bits({name: source.rows(name, 0, len(tensor) if tensor.ndim else 0)}) == all_bits(
            {name: tensor}
        )
    assert torch.equal(source.rows("model.layers.0.w", 60, 63), tensors["model.layers.0.w"][60:63])
    (tmp_path / "theirs.safetensors").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|invalid|metadata|MetadataIncompleteBuffer"):
        SafetensorsSource(tmp_path / "theirs.safetensors")
