"""Keys that encrypt files at rest: where they come from, and how one is named without being shown.

A key comes from the environment alone: no config, record, log or command line ever holds one.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatrain.config.errors import UserError

KEY_VARIABLE = "MEGATRAIN_KEY"
KEY_FILE_VARIABLE = "MEGATRAIN_KEY_FILE"
KEY_TEXT = re.compile(r"[0-9a-fA-F]{64}")
MAX_KEY_FILE_BYTES = 1 << 16
HOW_TO_GIVE = (
    f"Put 64 hexadecimal digits (`openssl rand -hex 32` draws some) into a file that only you can read, and its path "
    f"into {KEY_FILE_VARIABLE}; or the digits into {KEY_VARIABLE}"
)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of 256 bits. Its text form shows the id alone."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """Name of the key, 16 hexadecimal digits, from which the key can't be found."""
        return hashlib.sha256(b"megatrain key id\0" + self.secret).hexdigest()[:16]


def writing_key() -> Key:
    """Return the key with which new files are encrypted: the first that is given.

    Raises:
        UserError: none is given, or what is given is no key.
    """
    if not (keys := given_keys()):
        raise UserError(f"Encryption needs a key, and none is given. {HOW_TO_GIVE}.")
    return keys[0]


def reading_key(key_id: str, place: str) -> Key:
    """Return the given key with that id, to read what is in `place`.

    Raises:
        UserError: it is not among those that are given, or what is given is no key.
    """
    keys = given_keys()
    for key in keys:
        if key.id == key_id:
            return key
    if not keys:
        raise UserError(f"{place} is encrypted with the key {key_id}, and no key is given. {HOW_TO_GIVE}.")
    others = "the given one is" if len(keys) == 1 else "the given ones are"
    raise UserError(
        f"{place} was encrypted with the key {key_id}; {others} {', '.join(key.id for key in keys)}. Give the right "
        f"one in {KEY_FILE_VARIABLE} or {KEY_VARIABLE}; a key file may hold several, one a line."
    )


def is_given(key_id: str) -> bool:
    """Return whether the key with that id is given.

    Raises:
        UserError: what is given is no key.
    """
    return any(key.id == key_id for key in given_keys())


def given_keys() -> list[Key]:
    """Return the keys of this process's environment; of a key file one a line, the first for new files.

    Raises:
        UserError: what is given is no key, or the file can't be read; the message does not repeat it.
    """
    text, path = os.environ.get(KEY_VARIABLE, ""), os.environ.get(KEY_FILE_VARIABLE, "")
    if text and path:
        raise UserError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set. Unset one of them.")
    if text:
        return _parsed(text, KEY_VARIABLE)
    return _parsed(_read(Path(path)), path) if path else []


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_KEY_FILE_BYTES)
        return raw.decode("ascii", errors="replace")
    except OSError as error:
        raise UserError(f"{KEY_FILE_VARIABLE}: the key file can't be read: {error}") from None


def _parsed(text: str, place: str) -> list[Key]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not all(KEY_TEXT.fullmatch(line) for line in lines):
        raise UserError(
            f"{place}: a key has 64 hexadecimal digits, and a key file one key a line. {HOW_TO_GIVE}."
        )
    return [Key(bytes.fromhex(line)) for line in lines]
