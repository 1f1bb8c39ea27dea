"""Nothing that a checkpoint says is executed, and nothing outside its folder is read."""

import hashlib
import io
import json
import os
import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from unit.checkpoint.samples import targets_for, two_checkpoints

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CorruptCheckpointError, UnknownFormatError
from megatrain.checkpoint.files import FileRecord
from megatrain.checkpoint.manifest import Manifest, parse_json, read_bounded, read_manifest
from megatrain.checkpoint.reader import MetadataUnpickler, read_metadata
from megatrain.checkpoint.store import Checkpointer

FILES = {"__0_0_0.distcp": FileRecord(1 << 20, "0" * 64)}


def metadata_of(size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Metadata:
    """One tensor "w" stored in chunks (offsets, sizes), as torch describes it."""
    return Metadata(
        state_dict_metadata={
            "w": TensorStorageMetadata(
                properties=TensorProperties(dtype=torch.float32),
                size=torch.Size(size),
                chunks=[ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
            )
        },
        storage_data={
            MetadataIndex("w", offsets, n): _StorageInfo("__0_0_0.distcp", 1000 * n, 1000)
            for n, (offsets, _) in enumerate(chunks)
        },
    )


def forge(checkpoint: Path, metadata: bytes) -> None:
    """Replace the metadata and make the manifest agree, as somebody with bad intentions would."""
    (checkpoint / ".metadata").write_bytes(metadata)
    old = read_manifest(checkpoint)
    record = FileRecord(len(metadata), hashlib.sha256(metadata).hexdigest())
    new = Manifest(step=old.step, files={**old.files, ".metadata": record}, info=old.info, parent=None)
    (checkpoint / "manifest.json").write_bytes(new.render())


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_malicious_metadata_file_is_refused_where_torch_executes_it(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path / "checkpoints")
    path, mark = tmp_path / "checkpoints" / "step-00000200", tmp_path / "executed"
    found = pickle.loads((path / ".metadata").read_bytes())
    found.planner_data = Touch(mark)
    forge(path, pickle.dumps(found))

    with pytest.raises(UnknownFormatError, match=rf"posix\.{os.mkdir.__name__}"):
        checkpointer.latest()
    assert not mark.exists()

    dcp.FileSystemReader(path).read_metadata()
    assert mark.exists()  # the very same file, read by torch


@pytest.mark.parametrize(
    "attack",
    [
        # by opcodes that the metadata of torch uses too
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x0b_get_layout\x93\x8c\x02os\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93.",
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x02os\x93.",
        # by others
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02P1\n.",  # a persistent id
        b"\x82\x01.",  # an extension code
        b"Nr\xff\xff\xff\x0f.",  # room for 268 million memos
        b"\x96\x00\x00\x00\x00\x08\x00\x00\x00.",  # 32 GiB of zeros
        b"",
        b".",
        b"garbage",
        b"(" * 100_000,
        b"\x80\x04" + b"]" * 1000 + b"e" * 1000 + b".",
    ],
)
def test_other_pickles_are_refused(attack: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="refused"):
        read_metadata(attack, FILES)


def test_what_torch_writes_needs_no_more_than_the_listed_classes(tmp_path: Path) -> None:
    """Every dtype that a checkpoint of tensors can hold."""
    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int4, torch.complex64, torch.bool]
    for dtype in dtypes:
        raw = pickle.dumps(TensorProperties(dtype=dtype))
        assert MetadataUnpickler(io.BytesIO(raw)).load().dtype == dtype


def test_metadata_as_torch_makes_it_passes() -> None:
    whole = metadata_of((4, 6), [((0, 0), (4, 6))])
    assert read_metadata(pickle.dumps(whole), FILES) == whole
    for size, chunks in (
        ((), [((), ())]),
        ((0, 3), [((0, 0), (0, 3))]),
        ((4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]),
        ((5,), [((0,), (3,)), ((3,), (2,)), ((5,), (0,))]),  # an uneven cut leaves a rank with nothing
    ):
        read_metadata(pickle.dumps(metadata_of(size, chunks)), FILES)


@pytest.mark.parametrize(
    ("size", "chunks", "message"),
    [
        ((4, 6), [((0, 0), (2, 6))], "not complete"),
        ((4, 6), [], "not complete"),
        ((0,), [], "not complete"),
        ((4, 6), [((0, 0), (2, 6)), ((1, 0), (2, 6))], "overlap"),
        ((4, 6), [((0, 0), (4, 3)), ((0, 2), (2, 6)), ((0, 1), (0, 0))], "outside"),
        ((2, 2, 2), [((0, 0, 0), (2, 2, 1)), ((0, 0, 1), (1, 2, 1)), ((0, 1, 1), (2, 1, 1))], "overlap"),
        ((4, 6), [((0, 0), (2, 6)), ((3, 0), (2, 6))], "outside"),
        ((4, 6), [((-1, 0), (4, 6))], "outside"),
        ((4, 6), [((0, 0), (24, -1)), ((0, 0), (4, 6))], "outside"),
        ((4, 6), [((0,), (4,))], "expected form"),
    ],
)
def test_holes_and_overlaps_are_found(
    size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        read_metadata(pickle.dumps(metadata_of(size, chunks)), FILES)


def test_coverage_agrees_with_counting_every_element() -> None:
    """Random boxes in a small tensor, against an array in which each box counts its elements."""
    draw = torch.Generator().manual_seed(0)
    verdicts = []
    for _ in range(2000):
        size = tuple(torch.randint(1, 4, (2,), generator=draw).tolist())
        boxes = []
        for _ in range(int(torch.randint(1, 4, (1,), generator=draw))):
            start = [int(torch.randint(0, n, (1,), generator=draw)) for n in size]
            length = [
                int(torch.randint(1, n - a + 1, (1,), generator=draw))
                for a, n in zip(start, size, strict=True)
            ]
            boxes.append((tuple(start), tuple(length)))
        count = torch.zeros(size)
        for (a, b), (c, d) in boxes:
            count[a : a + c, b : b + d] += 1
        covered = bool((count == 1).all())
        verdicts.append(covered)
        try:
            read_metadata(pickle.dumps(metadata_of(size, boxes)), FILES)
            accepted = True
        except CorruptCheckpointError:
            accepted = False
        assert accepted == covered, (size, boxes)
    assert 100 < sum(verdicts) < 1900  # both verdicts occur


@pytest.mark.parametrize(
    "place", ["/etc/hostname", "../step-00000100/__0_0_0.distcp", "link", "a\0b", "x" * 300]
)
def test_files_outside_the_checkpoint_are_not_read(tmp_path: Path, place: str) -> None:
    checkpointer = two_checkpoints(tmp_path)
    path = tmp_path / "step-00000200"
    (path / "link").symlink_to("/etc/hostname")
    found = pickle.loads((path / ".metadata").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = place
    forge(path, pickle.dumps(found))
    with pytest.raises(UnknownFormatError, match="not in the manifest"):
        checkpointer.latest()


def test_a_checkpoint_of_an_unknown_form_is_not_condemned(tmp_path: Path) -> None:
    """A later version of torch may pickle its metadata otherwise: all hashes are right, and nothing is moved."""
    checkpointer = two_checkpoints(tmp_path)
    for step in (100, 200):
        path = tmp_path / f"step-{step:08d}"
        forge(path, pickle.dumps(pickle.loads((path / ".metadata").read_bytes()), protocol=0))
    with pytest.raises(
        UnknownFormatError, match="not damaged, but of a form that this version does not read"
    ):
        checkpointer.latest()
    assert checkpointer.steps() == [100, 200]
    assert not (tmp_path / "quarantine").exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "..", ".", "a/b", "a\0b", "x" * 300, "", "link"])
def test_the_manifest_can_list_plain_names_only(tmp_path: Path, name: str) -> None:
    checkpointer = two_checkpoints(tmp_path)
    path = tmp_path / "step-00000200"
    (path / "link").symlink_to("/etc/hostname")
    old = read_manifest(path)
    size = os.stat("/etc/hostname").st_size
    files = {**old.files, name: FileRecord(size, "0" * 64)}
    (path / "manifest.json").write_bytes(Manifest(step=200, files=files, info={}, parent=None).render())
    newest = checkpointer.latest()
    assert newest is not None
    assert newest.step == 100
    assert "plain file" in newest.warnings[0]


def test_a_damaged_pickle_is_refused_whatever_it_says() -> None:
    """Bytes changed at random, so that opcodes, names and lengths are hit: refused, or still sound."""
    good = pickle.dumps(metadata_of((4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]))
    draw = random.Random(0)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert isinstance(read_metadata(bytes(data), FILES), Metadata)
        except CorruptCheckpointError:
            refused += 1
    assert refused > 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kibibytes


def test_only_tensors_are_read(tmp_path: Path) -> None:
    """torch loads everything else by an unrestricted pickle."""
    found = metadata_of((2,), [((0,), (2,))])
    found.state_dict_metadata["w"] = BytesStorageMetadata()
    with pytest.raises(CorruptCheckpointError, match="refused"):
        read_metadata(pickle.dumps(found), FILES)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 10), (0, -5), (1 << 20, 1), (0, (1 << 20) + 1), ("0", 1)]
)
def test_places_outside_a_file_are_refused(offset: int, length: int) -> None:
    found = metadata_of((2,), [((0,), (2,))])
    for info in found.storage_data.values():
        info.offset, info.length = offset, length
    with pytest.raises(CorruptCheckpointError):
        read_metadata(pickle.dumps(found), FILES)


@pytest.mark.parametrize(
    "field",
    [
        {"storage_data": None},
        {"storage_data": {"w": 1}},
        {"storage_data": {}},
        {"state_dict_metadata": {"w": 3}},
        {"state_dict_metadata": None},
    ],
)
def test_metadata_of_another_form_is_refused(field: dict[str, Any]) -> None:
    found = metadata_of((2,), [((0,), (2,))])
    for name, value in field.items():
        setattr(found, name, value)
    with pytest.raises(CorruptCheckpointError):
        read_metadata(pickle.dumps(found), FILES)
    with pytest.raises(CorruptCheckpointError):
        read_metadata(pickle.dumps({"w": 1}), FILES)


def test_json_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="not JSON"):
        parse_json(b"[" * 1_000_000, "state.json")
    with pytest.raises(CorruptCheckpointError, match="not JSON"):
        parse_json(b"1" * 100_000, "state.json")
    big = tmp_path / "state.json"
    with big.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpointError, match="are not read"):
        read_bounded(big)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # kibibytes


@pytest.mark.parametrize(
    "change",
    [
        {"step": "200"},
        {"files": []},
        {"files": {"state.json": {"size": 1}}},
        {"files": {"state.json": {"size": "1", "sha256": "0" * 64}}},
        {"files": {"state.json": {"size": 1, "sha256": "../"}}},
        {"files": {}},
        {"info": None},
        {"surprise": 1},
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its own hash is right, so the form itself is what is found wrong."""
    checkpointer = two_checkpoints(tmp_path)
    file = tmp_path / "step-00000200" / "manifest.json"
    fields = {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"} | change
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    fields["sha256"] = hashlib.sha256(body).hexdigest()
    file.write_text(json.dumps(fields, sort_keys=True, indent=1) + "\n")
    newest = checkpointer.latest()
    assert newest is not None
    assert newest.step == 100
    assert "its own hash" not in newest.warnings[0]


def test_a_malicious_tensor_is_not_executed(tmp_path: Path) -> None:
    """The payload is a pickle too; it is read by torch's own restricted loader."""
    directory = tmp_path / "checkpoints"
    checkpointer = Checkpointer(directory, CheckpointConfig())
    path = checkpointer.save(1, {"w": torch.zeros(3)}, {})
    payload = io.BytesIO()
    torch.save({"w": Touch(tmp_path / "executed")}, payload)
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(payload.getvalue())
    old = read_manifest(path)
    record = FileRecord(len(payload.getvalue()), hashlib.sha256(payload.getvalue()).hexdigest())
    info = pickle.loads((path / ".metadata").read_bytes())
    for place in info.storage_data.values():
        place.length = record.size
    files = {**old.files, shard.name: record}
    (path / "manifest.json").write_bytes(Manifest(step=1, files=files, info={}, parent=None).render())
    forge(path, pickle.dumps(info))
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        checkpointer.load(targets_for({"w": torch.zeros(3)}))
    assert not (tmp_path / "executed").exists()
