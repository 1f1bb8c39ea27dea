"""Locations of the config files and the options of each group; reads directories only, so that help is fast."""

import site
import sysconfig
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded

REPOSITORY = Path(__file__).resolve().parents[2]


CLUSTERS = "cluster"
"""Directory of the cluster files, which are no part of a run's config."""


def shipped_dir() -> Path:
    """Return the project's `conf/`: beside the package in a checkout, under `share/megatrain` when installed.

    Raises:
        UserError: the installation lacks it.
    """
    shared = [Path(sysconfig.get_path("data")), Path(site.getuserbase()), REPOSITORY.parent]
    for candidate in [REPOSITORY / "conf", *(root / "share" / "megatrain" / "conf" for root in shared)]:
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError("The installed package lacks its config files (share/megatrain/conf); reinstall it.")


def config_dirs(config_dir: str | None) -> list[Path]:
    """Return the directories searched for config files; the first match wins: the user's, then the built-in one.

    Raises:
        UserError: the user's directory does not exist.
    """
    if config_dir is None:
        return [shipped_dir()]
    own = Path(expanded(config_dir)).resolve()
    if not own.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such directory.")
    return [own, shipped_dir()]


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """Return each config group with the sorted names of its options, as used in `group=option`."""
    found: dict[str, set[str]] = {}
    for root in config_dirs(config_dir):
        for path in root.glob("*/**/*.yaml"):
            if path.parent.name == CLUSTERS:
                continue
            found.setdefault(path.parent.relative_to(root).as_posix(), set()).add(path.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
