"""Reader of torch.distributed.checkpoint directories that other programs wrote, trusted as little as our own."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import FileRecord
from megatrain.checkpoint.manifest import METADATA_FILE
from megatrain.checkpoint.reader import (
    ALLOWED,
    MAX_METADATA_BYTES,
    CheckedReader,
    MetadataUnpickler,
    check_metadata,
    require_plain,
)
from megatrain.config.errors import UserError


class _Unread:
    """An object of a class that is not known here: its values are dropped, and its class is never imported."""

    def __init__(self, *values: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _ForeignUnpickler(MetadataUnpickler):
    """An unpickler of what else such a table may hold, such as the plans that were followed to write it."""

    allowed = ALLOWED | {(metadata.__name__, "BytesStorageMetadata"): metadata.BytesStorageMetadata}

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed object of that name, or a class without any effect."""
        return self.allowed.get((module, name), _Unread)


def open_foreign(directory: Path) -> CheckedReader:
    """Return a reader of the tensors in `directory`; anything else there is not looked at. There are no hashes.

    Raises:
        UserError: the table of tensors is missing, damaged, or more than plain values.
    """
    path = directory / METADATA_FILE
    try:
        if (size := path.stat().st_size) > MAX_METADATA_BYTES:
            raise UserError(f"{path} has {size:,} bytes; more than {MAX_METADATA_BYTES:,} are not read")
        raw = path.read_bytes()
        files = {name: FileRecord((directory / name).stat().st_size, "") for name in os.listdir(directory)}
    except OSError as error:
        raise UserError(f"{directory} can't be read: {error}") from None
    try:
        require_plain(raw)
        found: Any = _ForeignUnpickler(io.BytesIO(raw)).load()
        kept = {
            name: each
            for name, each in found.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
        }
        found.storage_data = {
            index: place for index, place in found.storage_data.items() if index.fqn in kept
        }
        found.state_dict_metadata = kept
        check_metadata(found, files)
    except (
        CorruptCheckpointError,
        pickle.UnpicklingError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
    ) as error:
        raise UserError(f"{path} is refused: {error}") from None
    return CheckedReader(directory, found)
