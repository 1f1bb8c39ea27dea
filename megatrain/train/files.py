"""The config in the run directory, written when the run starts and read when it resumes."""

import os
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.config.schema import ConfigError
from megatrain.config.text import from_yaml, to_yaml
from megatrain.train.config import Config

CONFIG_FILE = "config.yaml"
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
