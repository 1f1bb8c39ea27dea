"""Rows of JSONL files with tasks, checked."""

import json
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each line that is not blank.

    Raises:
        UserError: the file can't be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


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
