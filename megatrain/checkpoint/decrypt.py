"""Plain copies of what was encrypted: a checkpoint, or a directory with encrypted files as `export` writes it."""

import dataclasses
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatrain.checkpoint.cipher import SUFFIX, FileCipher, key_of, require_cipher
from megatrain.checkpoint.contents import cipher_of, opened_plain
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import FileRecord, make_directory, sync_directory, write_file, write_stream
from megatrain.checkpoint.inspect import Progress, naming
from megatrain.checkpoint.keys import reading_key, writing_key
from megatrain.checkpoint.manifest import MANIFEST_FILE, PLAIN_FORMAT, check_sizes, read_manifest
from megatrain.checkpoint.retention import step_name
from megatrain.config.errors import UserError

EXPORT = "export"
"""Scope of encrypted files that are no part of a checkpoint."""


def export_cipher() -> FileCipher:
    """Return what encrypts the files of an export.

    Raises:
        UserError: there is no key, or the package is missing.
    """
    require_cipher()
    return FileCipher(writing_key(), EXPORT)


def decrypt_checkpoint(source: Path, directory: Path, *, progress: Progress) -> Path:
    """Write a plain copy of an encrypted checkpoint into `directory`, by one rename; return its path.

    Raises:
        UserError: it is not encrypted, the key is not given, or the copy can't be written.
        DamagedCheckpointError: it is damaged.
    """
    with naming(source):
        manifest = read_manifest(source)
        check_sizes(source, manifest)
        cipher = cipher_of(manifest, source)
        if cipher is None:
            raise UserError(f"{source} is not encrypted. Copy it with `megatrain checkpoint copy`.")
        target = directory / step_name(manifest.step)
        with _new_directory(target) as partial:
            files: dict[str, FileRecord] = {}
            for done, name in enumerate(manifest.files):
                progress("decrypting", done / len(manifest.files))
                files[name] = _decrypt(source / name, partial / name, name, cipher)
            plain = dataclasses.replace(manifest, files=files, encryption=None, format_version=PLAIN_FORMAT)
            write_file(partial / MANIFEST_FILE, plain.render())
    return target


def decrypt_directory(source: Path, target: Path, *, progress: Progress) -> int:
    """Write a copy of `source` as the new directory `target`, its encrypted files decrypted; return their number.

    Raises:
        UserError: there are none, the key is not given, or `target` can't be written.
        DamagedCheckpointError: a file is damaged, renamed, or exchanged for another.
    """
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else []
    sealed = [path for path in files if path.name.endswith(SUFFIX)]
    if not sealed:
        raise UserError(f"{source} is neither a checkpoint nor a directory with encrypted files (*{SUFFIX})")
    require_cipher()
    with naming(source), _new_directory(target) as partial:
        for done, path in enumerate(files):
            progress("decrypting", done / len(files))
            if path in sealed:
                name = path.name.removesuffix(SUFFIX)
                _decrypt(path, partial / name, name, FileCipher(reading_key(key_of(path), str(path)), EXPORT))
            else:
                shutil.copyfile(path, partial / path.name)
    return len(sealed)


def _decrypt(source: Path, target: Path, name: str, cipher: FileCipher) -> FileRecord:
    with opened_plain(source, cipher, name) as plain:
        return write_stream(plain, target, seen=lambda size: None)


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to write to, which becomes `target` if all goes well, and is removed otherwise.

    Raises:
        UserError: `target` exists, or can't be written.
        CorruptCheckpointError: what is read is damaged.
    """
    if os.path.lexists(target):
        raise UserError(
            f"{target} exists already, and nothing is overwritten. Remove it, or choose another name."
        )
    partial = target.absolute().parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    try:
        make_directory(partial.parent)
        partial.mkdir()
        yield partial
        sync_directory(partial)
        os.rename(partial, target)
        sync_directory(partial.parent)
    except CorruptCheckpointError:
        raise
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
