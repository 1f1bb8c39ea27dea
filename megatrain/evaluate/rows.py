"""Rows of JSONL files with tasks, checked."""

import json
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError


def read_lines(path: Path, *, what: str) -> list[tuple[str, str]]:
    """Return (place, line) of each line that is not blank.

    Args:
        what: a line is, in the plural.

    Raises:
        UserError: the file can't be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None
    kept = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise UserError(f"{path} has no {what}")
    return kept


def parse_object(where: str, line: str) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        UserError: it is none.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    return row


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each line that is not blank.

    Raises:
        UserError: the file can't be read, or a line is not a JSON object.
    """
    return [(where, parse_object(where, line)) for where, line in read_lines(path, what="rows")]


def text_of(where: str, row: dict[str, Any], name: str) -> str:
    """Return a text of a row.

    Raises:
        UserError: the row has none of that name.
    """
    value = row.get(name)
    if not isinstance(value, str):
        said = "is missing" if name not in row else f"is {type(value).__name__}, not text"
        raise UserError(f"{where}: {name!r} {said}; the row has {', '.join(map(repr, row)) or 'nothing'}")
    return value


def texts_of(where: str, row: dict[str, Any], name: str) -> list[str]:
    """Return a row's list of texts, or its single one as a list.

    Raises:
        UserError: the row has none of that name.
    """
    value = row.get(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise UserError(f"{where}: {name!r} must be a text or a list of texts")
    return value
