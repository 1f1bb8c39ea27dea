"""What a checkpoint holds beside its manifest: state and table of tensors, decrypted if it is encrypted."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatrain.checkpoint.cipher import NAME, FileCipher, require_cipher
from megatrain.checkpoint.errors import CorruptCheckpointError, UnknownFormatError
from megatrain.checkpoint.files import READ_BYTES, FileRecord
from megatrain.checkpoint.keys import reading_key, writing_key
from megatrain.checkpoint.manifest import (
    ENCRYPTED_FORMAT,
    MAX_JSON_BYTES,
    METADATA_FILE,
    STATE_FILE,
    Manifest,
    check_sizes,
    parse_json,
    read_listed,
)
from megatrain.checkpoint.reader import MAX_METADATA_BYTES, CheckedReader, read_metadata
from megatrain.checkpoint.retention import step_name


def cipher_of(manifest: Manifest, path: Path) -> FileCipher | None:
    """Return what decrypts the files of the checkpoint at `path`; None if they are not encrypted.

    Raises:
        UserError: its key is not given, another one is, or the package is missing.
        UnknownFormatError: it is encrypted in a way that this version does not know.
    """
    if manifest.encryption is None:
        return None
    if manifest.encryption["cipher"] != NAME:
        raise UnknownFormatError(
            f"{path} is encrypted with {manifest.encryption['cipher']}, and this version reads {NAME} alone. It was "
            f"written by {manifest.versions}. Update megatrain to read it."
        )
    key = reading_key(manifest.encryption["key_id"], str(path))
    require_cipher()
    return FileCipher(key, step_name(manifest.step))


def read_contents(path: Path, manifest: Manifest) -> tuple[dict[str, Any], CheckedReader]:
    """Read and check everything of a checkpoint but its tensors; return its state, and a reader of the tensors.

    Raises:
        CorruptCheckpointError: it is damaged.
        UserError: this version or this user can't read it.
    """
    check_sizes(path, manifest)
    cipher = cipher_of(manifest, path)
    table = _plain(path / METADATA_FILE, manifest, MAX_METADATA_BYTES, cipher)
    try:
        checked = read_metadata(table, manifest.files)
    except CorruptCheckpointError as error:  # its hash is right: it was written so
        raise UnknownFormatError(
            f"{path} is not damaged, but of a form that this version does not read: {error}. It was written by "
            f"{manifest.versions}. Read it with these versions, or update megatrain."
        ) from None
    state = parse_json(_plain(path / STATE_FILE, manifest, MAX_JSON_BYTES, cipher), STATE_FILE)
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{STATE_FILE} is not a JSON object")
    return state, CheckedReader(path, checked, cipher)


def new_cipher(encryption: str, step: int) -> FileCipher | None:
    """Return what encrypts the files of a new checkpoint, as `checkpoint.encryption` says; None: nothing does.

    Raises:
        UserError: there is no key, or the package is missing.
    """
    if encryption == "none":
        return None
    require_cipher()
    return FileCipher(writing_key(), step_name(step))


def new_manifest(
    step: int,
    files: dict[str, FileRecord],
    info: dict[str, Any],
    parent: str | None,
    cipher: FileCipher | None,
) -> Manifest:
    """Return the manifest of a new checkpoint whose files `cipher` has encrypted, if it is not None."""
    if cipher is None:
        return Manifest(step=step, files=files, info=info, parent=parent)
    encryption = {"cipher": NAME, "key_id": cipher.key.id}
    return Manifest(
        step=step,
        files=files,
        info=info,
        parent=parent,
        encryption=encryption,
        format_version=ENCRYPTED_FORMAT,
    )


def differing_files(a: Path, old: Manifest, b: Path, new: Manifest) -> list[str]:
    """Return the names of the files that differ between two checkpoints of a step; encrypted ones are decrypted.

    Raises:
        CorruptCheckpointError: a file was changed.
        UserError: a key is not given.
    """
    names = old.files.keys() ^ new.files.keys()
    if old.encryption is None and new.encryption is None:
        return sorted(names | {name for name, _ in old.files.items() ^ new.files.items()})
    first, second = cipher_of(old, a), cipher_of(new, b)
    for name in old.files.keys() & new.files.keys():
        with opened_plain(a / name, first) as x, opened_plain(b / name, second) as y:
            if any(piece != y.read(READ_BYTES) for piece in iter(lambda: x.read(READ_BYTES), b"")) or y.read(
                1
            ):
                names.add(name)
    return sorted(names)


@contextmanager
def opened_plain(path: Path, cipher: FileCipher | None, name: str = "") -> Iterator[BinaryIO]:
    """Open a file to read its plain text in the `with` block.

    Args:
        name: under which it was encrypted; empty: its own.

    Raises:
        CorruptCheckpointError: it was changed; reading raises it too.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        yield cast(
            BinaryIO,
            io.BufferedReader(file) if cipher is None else cipher.reader(file, name or path.name, size),
        )


def check_tags(path: Path, manifest: Manifest) -> None:
    """Decrypt every file of an encrypted checkpoint, which finds what was changed together with its hash.

    Raises:
        CorruptCheckpointError: a file is not what was encrypted; the message names it.
        UserError: the key is not given.
    """
    cipher = cipher_of(manifest, path)
    if cipher is None:
        return
    for name in manifest.files:
        with opened_plain(path / name, cipher) as source:
            while source.read(READ_BYTES):
                pass


def _plain(path: Path, manifest: Manifest, limit: int, cipher: FileCipher | None) -> bytes:
    raw = read_listed(path, manifest, limit=limit)
    return raw if cipher is None else cipher.decrypt(raw, path.name)
