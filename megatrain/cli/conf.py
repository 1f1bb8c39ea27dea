"""Where config files lie and which options each group has. Reads directories only, so that help is fast."""

import site
import sysconfig
from pathlib import Path

from megatrain.config.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def shipped_dir() -> Path:
    """Return the project's `conf/`: beside the package in a checkout, under `share/megatrain` when installed.

    Raises:
        UserError: the installation has none.
    """
    shared = [Path(sysconfig.get_path("data")), Path(site.getuserbase()), REPOSITORY.parent]
    for candidate in [REPOSITORY / "conf", *(root / "share" / "megatrain" / "conf" for root in shared)]:
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError("The installed package lacks its config files (share/megatrain/conf); install it again.")


def config_dirs(config_dir: str | None) -> list[Path]:
    """Return the directories searched for config files; the first match wins: the user's own, then the shipped one.

    Raises:
        UserError: the user's directory does not exist.
    """
    if config_dir is None:
        return [shipped_dir()]
    own = Path(config_dir).expanduser().resolve()
    if not own.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such directory.")
    return [own, shipped_dir()]


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """Return each group with its options' names, sorted, as `group=option` takes them."""
    found: dict[str, set[str]] = {}
    for root in config_dirs(config_dir):
        for path in root.glob("*/**/*.yaml"):
            found.setdefault(path.parent.relative_to(root).as_posix(), set()).add(path.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
