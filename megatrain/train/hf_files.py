"""A new directory in Hugging Face's format: that it appears at once, and the files beside the weights."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.tokenizer import HuggingFaceTokenizer
from megatrain.data.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    step: int
    files: int
    parameters: int


def require_new(target: Path) -> None:
    """Refuse a directory with files in it.

    Raises:
        UserError: it has some, or is no directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already. Remove it, or export to another directory.")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to write to, which becomes `target` if all goes well, and is removed otherwise.

    Raises:
        UserError: it can't be written.
    """
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Write the tokenizer if Hugging Face has a format for it; return its entries in config.json."""
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save_pretrained(target)
    return {"eos_token_id": tokenizer.eos_id}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")
