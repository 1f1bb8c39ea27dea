"""The flags of `megatrain launch`: every key of the cluster's description, and what one launch alone has."""

from argparse import Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any, get_origin

from megatrain.cli.conf import CLUSTERS as FOLDER
from megatrain.cli.conf import config_dirs
from megatrain.cli.options import Parser
from megatrain.config.errors import UserError
from megatrain.config.load import accepts, hints, load, members
from megatrain.config.nearest import nearest
from megatrain.launch.config import CLUSTERS, AnyCluster


def flags_of(kind: str, argv: list[str]) -> tuple[Namespace, dict[str, object], list[str]]:
    """Split a command line into the launch's own flags, the keys of the cluster that it gives, and the rest.

    Raises:
        UserError: a flag has no value, or a wrong one.
    """
    parser = Parser("launch")
    parser.add_argument("--cluster")
    parser.add_argument("--dry-run", action="store_true")
    if kind == "slurm":
        parser.add_argument("--detach", action="store_true")
        parser.add_argument("--status", action="store_true")
        parser.add_argument("--cancel", action="store_true")
        parser.add_argument("--chain", type=_positive, default=1)
        parser.add_argument("--array", type=_positive, default=0)
    cls: type = CLUSTERS[kind]
    known = {name: hint for name, hint in hints(cls).items() if name != "kind"}
    for name, hint in known.items():
        _add(parser, name, hint)
    flags, rest = parser.parse_known_args(argv)
    given = {name: value for name in known if (value := getattr(flags, f"key_{name}")) is not None}
    return flags, given, rest


def read_cluster(kind: str, name: str | None, given: dict[str, object], config_dir: str | None) -> AnyCluster:
    """Return the cluster of a file with the keys that the command line gives; lists are added to the file's.

    Args:
        name: of a file in the directories `cluster` beside the config groups, or the path of one; None: no file.
        config_dir: the user's directory of config files.

    Raises:
        UserError: there is no such file, or it describes another kind.
        ConfigError: a key or value is wrong.
    """
    data = {} if name is None else _read(kind, name, config_dir)
    for key, value in given.items():
        before = data.get(key)
        data[key] = [*before, *value] if isinstance(value, list) and isinstance(before, list) else value
    return load(CLUSTERS[kind], {**data, "kind": kind})


def _positive(text: str) -> int:
    """Return a positive integer, as argparse wants it."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: must be an integer of at least 1")
    return int(text)


def _add(parser: ArgumentParser, name: str, hint: Any) -> None:
    """Add the flag of a key: a switch, a list that may be given several times, or one value."""
    flag, dest = f"--{name.replace('_', '-')}", f"key_{name}"
    action: str | type[Action] = "store"
    if accepts(hint, True):
        action = BooleanOptionalAction
    elif any(get_origin(member) is tuple for member in members(hint)):
        action = "append"
    if action == "store" and not accepts(hint, "any text"):
        parser.add_argument(flag, dest=dest, type=_number_or_text)
    else:
        parser.add_argument(flag, dest=dest, action=action)


def _number_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _read(kind: str, name: str, config_dir: str | None) -> dict[str, Any]:
    import yaml

    path = _find(name, config_dir)
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--cluster {name}: {path} can't be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"--cluster {name}: {path} is not a mapping of keys to values.")
    if data.get("kind") != kind:
        raise UserError(
            f"--cluster {name}: {path} has kind: {data.get('kind', '(none)')}, but this is `launch {kind}`."
        )
    return data


def _find(name: str, config_dir: str | None) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    folders = [root / FOLDER for root in config_dirs(config_dir)]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = nearest(name, known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--cluster {name}: there is no such file.{hint} Known: {', '.join(known)}; your own are DIR/cluster/NAME.yaml "
        "with --config-dir DIR, or name the path of a .yaml file."
    )
