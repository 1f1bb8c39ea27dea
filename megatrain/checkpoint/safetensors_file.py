"""Safetensors files, written and read a few rows of a tensor at a time: neither is ever in memory as a whole.

The format (https://huggingface.co/docs/safetensors): the length of the header as 8 bytes, little-endian; the header,
JSON that gives each tensor its dtype, shape and place; the values, row-major, little-endian, without gaps.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from megatrain.checkpoint.cipher import SUFFIX, EncryptingWriter, FileCipher
from megatrain.checkpoint.reader import TensorSpec
from megatrain.config.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
HEADER_ALIGNMENT = 8
PIECE_BYTES = 16 << 20
"""Bytes that are handed to the file at a time."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsFile:
    """A new safetensors file that will hold the tensors of `specs`, which may be written in any order.

    With a cipher its name ends with `.enc`, and the tensors, all of one dtype, are written in the order of `specs`.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        cipher: FileCipher | None = None,
    ) -> None:
        self._places: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._specs = dict(specs)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, spec in sorted(
            specs.items(), key=lambda each: -each[1].dtype.itemsize
        ):  # so each is aligned
            if spec.dtype not in DTYPES:
                raise UserError(
                    f"{name} has the dtype {spec.dtype}, which the safetensors format does not have"
                )
            self._places[name] = end
            place = [end, end + spec.nbytes]
            header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.size), "data_offsets": place}
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self._start = HEADER_ALIGNMENT + len(text)
        self._file: BinaryIO | EncryptingWriter
        if cipher is None:
            self._file = path.open("xb")
        else:
            self._file = cipher.writer(path.with_name(path.name + SUFFIX).open("xb"), path.name)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, rows: Tensor) -> None:
        """Write a tensor of the dtype and shape that were announced, or its next rows."""
        spec, done = self._specs[name], self._done.get(name, 0)
        assert (rows.dtype, rows.shape[1:]) == (spec.dtype, spec.size[1:]), (
            f"{name} is another tensor than announced"
        )
        assert done + rows.nbytes <= spec.nbytes, f"{name} has more rows than announced"
        assert sys.byteorder == "little"
        self._file.seek(self._start + self._places[name] + done)
        raw = rows.detach().contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(raw), PIECE_BYTES):
            self._file.write(raw[start : start + PIECE_BYTES])
        self._done[name] = done + rows.nbytes

    @property
    def is_complete(self) -> bool:
        """Whether every announced tensor was written."""
        return all(self._done.get(name, -1) == spec.nbytes for name, spec in self._specs.items())

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            assert self.is_complete, "a tensor was announced and not written"


class SafetensorsSource:
    """Tensors of a safetensors file, read without mapping it into memory, where every page read would count."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header.

        Raises:
            SafetensorError: it is no safetensors file, or damaged.
            OSError: it can't be read.
            UserError: it has a dtype that this version does not know.
        """
        self.specs: dict[str, TensorSpec] = {}
        self._path = path
        self._places: dict[str, int] = {}
        with safe_open(path, framework="pt"):  # checks every field of the header; reads no tensor
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        kinds = {name: dtype for dtype, name in DTYPES.items()}
        for name, field in header.items():
            if field["dtype"] not in kinds:
                raise UserError(f"{path}: {name} has the dtype {field['dtype']}, which is not known")
            self.specs[name] = TensorSpec(kinds[field["dtype"]], torch.Size(field["shape"]))
            self._places[name] = HEADER_ALIGNMENT + size + field["data_offsets"][0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop`; of a tensor without dimensions, all of it."""
        spec = self.specs[name]
        shape = (stop - start, *spec.size[1:]) if spec.size else ()
        row_bytes = spec.dtype.itemsize * math.prod(spec.size[1:])
        found = torch.empty(shape, dtype=spec.dtype)
        if not found.nbytes:
            return found
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._places[name] + (start * row_bytes if spec.size else 0))
            buffer = found.flatten().view(torch.uint8).numpy().data
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise OSError(f"{self._path} ended while it was read")
                done += count
        return found

    def whole(self, name: str) -> Tensor:
        """Return a tensor with all its rows."""
        size = self.specs[name].size
        return self.rows(name, 0, size[0] if size else 0)


def into_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> Iterator[dict[str, TensorSpec]]:
    """Yield the tensors of each file: as many as fit into `shard_bytes`, at least one, in the given order."""
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in specs.items():
        if shard and size + spec.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += spec.nbytes
    yield shard


def shard_names(count: int) -> list[str]:
    """Return the usual file names of `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]


def write_shards(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int,
    metadata: Mapping[str, str],
    cipher: FileCipher | None = None,
) -> int:
    """Write `tensors`, which come in the order of `specs`, into files of about `shard_bytes`; return their number.

    A large tensor may come as several pairs, each with its next rows.

    Several files get an index (`model.safetensors.index.json`), which says in which of them a tensor is.

    Args:
        cipher: encrypts the files, whose tensors are all of one dtype then; the index stays readable.

    Raises:
        UserError: the format lacks a dtype.
        OSError: the disk is full, for instance.
    """
    shards = list(into_shards(specs, shard_bytes))
    names = shard_names(len(shards))
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with SafetensorsFile(directory / name, shard, metadata, cipher) as file:
            while not file.is_complete:
                file.write(*next(source))
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)
