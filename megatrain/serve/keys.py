"""API keys: from the environment, or a file; never from a command line, which every user of a machine can read."""

from collections.abc import Mapping
from pathlib import Path

from megatrain.config.errors import UserError

VARIABLE = "MEGATRAIN_API_KEYS"
SHORTEST = 16
"""Characters: what is shorter can be guessed."""


def read_keys(environment: Mapping[str, str], file: Path | None) -> list[str]:
    """Return the keys of the variable `VARIABLE`, separated by spaces or commas, and those of a file's lines.

    Raises:
        UserError: the file can't be read or has none, or a key is too short or not of visible ASCII characters.
    """
    found = [(VARIABLE, key) for key in environment.get(VARIABLE, "").replace(",", " ").split()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"serve: --api-keys {file}: {said}") from None
        kept = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not kept:
            raise UserError(f"serve: --api-keys {file} has no key; write one a line")
        found += [(str(file), key) for key in kept]
    for where, key in found:
        if len(key) < SHORTEST or not all("!" <= character <= "~" for character in key):
            raise UserError(
                f"serve: a key of {where} is refused: a key has at least {SHORTEST} visible ASCII characters. Make "
                "one: openssl rand -hex 24"
            )
    return [key for _, key in found]
