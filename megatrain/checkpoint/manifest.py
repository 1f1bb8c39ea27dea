"""`manifest.json`: the list of a checkpoint's files with sizes and hashes, so that any changed byte is detected.

The manifest carries a SHA-256 of itself, and is valid only if rendering its fields gives the same bytes again.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import WORKERS, FileRecord, hash_file
from megatrain.config.errors import UserError

PLAIN_FORMAT = 1
ENCRYPTED_FORMAT = 2
FORMAT_VERSION = ENCRYPTED_FORMAT
"""The latest format that is read."""
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
METADATA_FILE = ".metadata"
MAX_JSON_BYTES = 64 << 20
PLAIN_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]{1,200}")  # no separator, no "." and ".."
SHA256 = re.compile(r"[0-9a-f]{64}")
KEY_ID = re.compile(r"[0-9a-f]{16}")


def installed_versions() -> dict[str, str]:
    """Return the versions of MegaTrain, PyTorch and Python; PyTorch is not imported, which takes seconds."""
    found = {"python": platform.python_version()}
    for package in ("megatrain", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "unknown"
    return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed checkpoint. Every file but the manifest itself is in `files`, by its plain name."""

    step: int
    files: dict[str, FileRecord]
    info: dict[str, Any]
    """Metadata of the run: layout, config digest, data fingerprint."""
    parent: str | None
    """Name of the checkpoint that the run loaded or saved before this one."""
    versions: dict[str, str] = field(default_factory=installed_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format_version: int = PLAIN_FORMAT
    encryption: dict[str, str] | None = None
    """`cipher` and `key_id`, if every listed file is encrypted."""

    def render(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        files = {name: record._asdict() for name, record in sorted(self.files.items())}
        fields = asdict(self) | {"files": files}
        if self.encryption is None:
            del fields["encryption"]
        return _render(fields)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, but not the files that it lists.

    Raises:
        CorruptCheckpointError: the manifest is missing or changed, or its step is not that of the directory's name.
        UserError: it was written by a later version of megatrain.
    """
    if directory.is_symlink():
        raise CorruptCheckpointError("it is a symbolic link")
    manifest = parse_manifest(read_bounded(directory / MANIFEST_FILE), place=str(directory))
    if directory.name != f"step-{manifest.step:08d}":
        raise CorruptCheckpointError(f"{MANIFEST_FILE} belongs to step {manifest.step}")
    return manifest


def parse_manifest(raw: bytes, *, place: str) -> Manifest:
    """Parse and check the bytes of the manifest of the checkpoint in `place`.

    Raises:
        CorruptCheckpointError: it was changed.
        UserError: it was written by a later version of megatrain.
    """
    fields = parse_json(raw, MANIFEST_FILE)
    if not isinstance(fields, dict) or _render(fields) != raw:
        raise CorruptCheckpointError(f"{MANIFEST_FILE} was changed: its own hash is wrong")
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{place} was written by a later version of megatrain (format {version}, this one reads up to "
            f"{FORMAT_VERSION}; {fields.get('versions')}). Update megatrain to read it."
        )
    return _from_fields(fields)


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Check that every listed file is a plain file of the listed size.

    Raises:
        CorruptCheckpointError: a file differs; the message names the first.
    """
    for name, record in manifest.files.items():
        size = file_size(directory / name)
        if size != record.size:
            raise CorruptCheckpointError(f"{name} has {size:,} bytes instead of {record.size:,}")


def check_hashes(directory: Path, manifest: Manifest) -> None:
    """Check the SHA-256 of every listed file.

    Raises:
        CorruptCheckpointError: a hash is wrong; the message names the first file.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        hashed = pool.map(hash_file, [directory / name for name in manifest.files])
    for (name, record), found in zip(manifest.files.items(), hashed, strict=True):
        if found != record.sha256:
            raise CorruptCheckpointError(_changed(name))


def read_listed(path: Path, manifest: Manifest, *, limit: int) -> bytes:
    """Return all bytes of a small listed file, at most `limit`. Its hash is always checked, since its content is used.

    Raises:
        CorruptCheckpointError: the file is missing, too large, or was changed.
    """
    raw = read_bounded(path, limit)
    if hashlib.sha256(raw).hexdigest() != manifest.files[path.name].sha256:
        raise CorruptCheckpointError(_changed(path.name))
    return raw


def read_bounded(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return all bytes of a plain file of at most `limit` bytes.

    Raises:
        CorruptCheckpointError: the file is missing, larger, or not a plain file.
    """
    size = file_size(path)
    if size > limit:
        raise CorruptCheckpointError(f"{path.name} has {size:,} bytes; more than {limit:,} are not read")
    return path.read_bytes()


def file_size(path: Path) -> int:
    """Return the size of a plain file in bytes.

    Raises:
        CorruptCheckpointError: the file is missing or not a plain file (a link may lead anywhere).
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCheckpointError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpointError(f"{path.name} is not a plain file")
    return status.st_size


def parse_json(raw: bytes, name: str) -> Any:
    """Parse `raw`, the content of the file `name`.

    Raises:
        CorruptCheckpointError: it is not JSON, or nested too deeply to have been written here.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{name} is not JSON ({type(error).__name__})") from None


def encode_state(state: dict[str, Any]) -> bytes:
    """Return the bytes of `state.json`.

    Raises:
        ValueError: `state` does not survive a round trip through JSON.
    """
    encoded = json.dumps(state, indent=1)
    if json.loads(encoded) != state:
        raise ValueError(
            "The state does not survive a round trip through JSON (non-string keys, tuples, NaN)."
        )
    return encoded.encode() + b"\n"


def _changed(name: str) -> str:
    return f"{name} was changed: its hash is wrong"


def _render(fields: dict[str, Any]) -> bytes:
    """Render `fields` as canonical JSON, with the hash of all other fields as `sha256`."""
    body = {key: value for key, value in fields.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, sort_keys=True, indent=1).encode() + b"\n"


def _from_fields(fields: dict[str, Any]) -> Manifest:
    """Build a manifest of fields whose hash is right, but whose values are not trusted yet."""
    try:
        files = {name: FileRecord(**record) for name, record in fields["files"].items()}
        given = {key: value for key, value in fields.items() if key != "sha256"}
        manifest = Manifest(**given | {"files": files})
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{MANIFEST_FILE} has unexpected or missing fields ({error})") from None
    if not isinstance(manifest.step, int) or not isinstance(manifest.info, dict):
        raise CorruptCheckpointError(f"{MANIFEST_FILE} has fields of the wrong type")
    if manifest.encryption is not None and not _is_encryption(manifest.encryption):
        raise CorruptCheckpointError(f"{MANIFEST_FILE} does not say how its files are encrypted")
    for name, (size, sha256) in files.items():
        if not PLAIN_NAME.fullmatch(name):
            raise CorruptCheckpointError(
                f"{MANIFEST_FILE} lists {name[:80]!r}, which is not a plain file name"
            )
        if not isinstance(size, int) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise CorruptCheckpointError(f"{MANIFEST_FILE} has no size and hash for {name}")
    if missing := {STATE_FILE, METADATA_FILE} - files.keys():
        raise CorruptCheckpointError(f"{MANIFEST_FILE} does not list {', '.join(sorted(missing))}")
    return manifest


def _is_encryption(value: object) -> bool:
    """Return whether `value` is what `Manifest.encryption` may be."""
    return (
        isinstance(value, dict)
        and value.keys() == {"cipher", "key_id"}
        and all(isinstance(each, str) for each in value.values())
        and KEY_ID.fullmatch(value["key_id"]) is not None
    )
