"""Writer of tensors by torch.distributed.checkpoint that hashes every file and loses no error."""

import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megatrain.checkpoint.cipher import FileCipher
from megatrain.checkpoint.files import WORKERS, FileRecord, HashingWriter

PART = ".tmp"
"""End of the name of a file that torch renames when it is complete."""


class HashingFileSystem(FileSystem):
    """File system for torch.distributed.checkpoint that records size and hash of every file written."""

    def __init__(self, cipher: FileCipher | None = None) -> None:
        """Write files as they are, or encrypted; the hashes are of the bytes on the disk."""
        self.records: dict[str, FileRecord] = {}
        self._cipher = cipher
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a new, hashed file; `mode` is "wb"."""
        stream = HashingWriter(Path(path))
        try:
            name = Path(path).name.removesuffix(PART)
            taker = stream if self._cipher is None else self._cipher.writer(stream, name)
            yield taker
            taker.close()
        finally:
            stream.abandon()
            self.failure = self.failure or stream.failure
        assert stream.record is not None
        self.records[Path(path).name] = stream.record

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: the directory is there, and one that was removed with the run is not made anew."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, and its record with it."""
        os.rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class HashingStorageWriter(FileSystemWriter):
    """A writer of `WORKERS` files in parallel on each rank, each with its own hash.

    Torch's own threads lose the errors of all but the first and commit what they wrote; these do not.
    """

    def __init__(self, directory: Path, cipher: FileCipher | None = None) -> None:
        super().__init__(directory, thread_count=1, sync_files=False, overwrite=False)  # the stream syncs
        self.fs: HashingFileSystem = HashingFileSystem(cipher)

    def storage_meta(self) -> StorageMeta:
        """Return metadata without the path: the directory is renamed, and pickled paths depend on Python's version."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the planned tensors of this rank."""
        # the option is per thread or global, depending on torch's version; `without_crc` restores the latter
        with ThreadPoolExecutor(WORKERS, initializer=set_crc32_options, initargs=(False,)) as pool:
            write = partial(super().write_data, planner=planner)
            parts = [pool.submit(write, part) for part in _split(plan, WORKERS)]
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for part in parts for result in part.result().value()])
        return future


def _split(plan: SavePlan, files: int) -> list[SavePlan]:
    """Split a rank's plan into one non-empty plan per file."""
    return [
        replace(
            plan,
            items=items,
            storage_data=replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{n}_"),
        )
        for n, items in enumerate(split_evenly(plan.items, files))
    ]


def split_evenly(items: list[WriteItem], parts: int) -> list[list[WriteItem]]:
    """Partition `items` into up to `parts` non-empty lists of about equal bytes, deterministically."""
    lists: list[list[WriteItem]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for item in sorted(items, key=_bytes_of, reverse=True):
        smallest = sizes.index(min(sizes))
        lists[smallest].append(item)
        sizes[smallest] += _bytes_of(item) + 1
    return [part for part in lists if part]


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None  # only tensors are saved
    chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
    return math.prod(chunk.sizes) * dtype.itemsize


def write_tensors(
    directory: Path, tensors: dict[str, Tensor], group: Any = None, cipher: FileCipher | None = None
) -> dict[str, FileRecord]:
    """Write `tensors` into the empty `directory` and return the records of this process's files, all synced.

    Args:
        cipher: encrypts each file as it is written; None: files are written as they are.
        group: process group that writes together, each rank its own shards of DTensors; None for this process alone.

    Raises:
        OSError: the original error of the system, which torch would replace by its own.
    """
    writer = HashingStorageWriter(directory, cipher)
    if any(hasattr(tensor, "one_by_one") for tensor in tensors.values()):
        writer.per_thread_copy_ahead = 0  # a tensor is written before the next is asked for
    try:
        with without_crc(), original_errors():
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except Exception as error:
        if writer.fs.failure is not None:
            raise writer.fs.failure from error
        raise
    return writer.fs.records


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise the original error instead of torch's CheckpointException, which `except Exception` does not catch.

    Also silence the warning about a single process.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


@contextmanager
def without_crc() -> Iterator[None]:
    """Disable torch.save's CRC-32, which no reader checks; the SHA-256 of the file replaces it."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
