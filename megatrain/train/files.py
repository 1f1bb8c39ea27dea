"""The config and the tokenizer in the run directory, and whether they are those that its checkpoints were made with."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError
from megatrain.config.load import flatten, load
from megatrain.config.schema import ConfigError, shown
from megatrain.config.text import from_yaml, to_yaml
from megatrain.train.config import Config

CONFIG_FILE = "config.yaml"
TOKENIZER = "tokenizer"
IMPORT_FILE = "import.json"
"""File in which an imported run records its source. Its model is the one in its `config.yaml`."""


def run_directory(cfg: Config) -> Path:
    """Return the directory of the run."""
    return Path(cfg.run.dir) / cfg.run.name


def read_config(directory: Path) -> Config:
    """Return the config that the run in `directory` was last started with.

    Raises:
        UserError: there is none, or this version can't read it.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG_FILE}")
    try:
        return from_yaml(Config, path.read_text())
    except ConfigError as error:
        raise UserError(f"{path} can't be read:\n{error}") from None


def write_config(directory: Path, cfg: Config) -> None:
    """Write the config atomically: a reader sees the old one or the new one."""
    partial = directory / f".{CONFIG_FILE}.tmp"
    partial.write_text(to_yaml(cfg))
    os.replace(partial, directory / CONFIG_FILE)


def new_run_id() -> str:
    """Draw the identity of a run. It is the one random value that no seed gives: equal runs are different runs."""
    return uuid.uuid4().hex[:12]


def tokenizer_digest(directory: Path) -> str:
    """Return the SHA-256 of the names and bytes of the files of a run's tokenizer."""
    total = hashlib.sha256()
    for path in sorted((directory / TOKENIZER).iterdir()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def saved_config(info: dict[str, Any], checkpoint: Path) -> Config | None:
    """Return the config that a checkpoint was saved under, from its manifest's `info`; None if it has none.

    Raises:
        UserError: this version can't read it.
    """
    if "config" not in info:
        return None
    try:
        return load(Config, info["config"])
    except ConfigError as error:
        raise UserError(f"the config in {checkpoint} can't be read:\n{error}") from None


def require_own_checkpoint(info: dict[str, Any], checkpoint: Path, run_id: str) -> None:
    """Refuse a checkpoint of another run, from its manifest's `info`.

    Raises:
        UserError: its run has another id.
    """
    found = info.get("run_id", run_id)
    if found != run_id:
        name = info.get("config", {}).get("run", {}).get("name", "?")
        raise UserError(
            f"{checkpoint} belongs to another run ({name!r}, id {found}) than {checkpoint.parent.parent} "
            f"(id {run_id}). Move it away, or start a new run from its weights: checkpoint.adopt={checkpoint} "
            "run.name=..."
        )


def require_unchanged(directory: Path, cfg: Config, info: dict[str, Any], checkpoint: Path) -> None:
    """Check that the config and the tokenizer of a run are those that `checkpoint` was saved with, from its `info`.

    Args:
        cfg: what `read_config` returned.

    Raises:
        UserError: the checkpoint is another run's, or config.yaml or the tokenizer was changed since.
    """
    require_own_checkpoint(info, checkpoint, cfg.run.id)
    saved = saved_config(info, checkpoint)
    if saved is not None and saved.model != cfg.model:
        was, now = flatten(saved.model), flatten(cfg.model)
        keys = [key for key in was | now if was.get(key) != now.get(key)]
        listed = "\n".join(
            f"  model.{key}: {shown(was.get(key))} in the checkpoint, {shown(now.get(key))} there"
            for key in keys
        )
        raise UserError(
            f"{directory / CONFIG_FILE} describes another model than {checkpoint} was trained with:\n{listed}\n"
            "Restore these values."
        )
    tokenizer = info.get("tokenizer_sha256")
    if tokenizer is not None and tokenizer != tokenizer_digest(directory):
        raise UserError(
            f"{directory / TOKENIZER} was changed since {checkpoint} was saved: its hash is wrong. Restore it from a "
            "copy, or resume the run, which writes it anew."
        )
