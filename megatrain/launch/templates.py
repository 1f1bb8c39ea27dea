"""The templates of `launchers/`, filled in."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from megatrain.config.errors import UserError


def render(path: Path, values: Mapping[str, object]) -> str:
    """Return the text of a template (Jinja2) with `values` in it; a value that is missing is an error.

    Comments of a template are `{##` to `##}`, since `${#name}` means something in a shell.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["q"] = shlex.quote
    return environment.get_template(path.name).render(**values)


def new_folder(directory: Path) -> Path:
    """Make `directory`/launch/N for the files of a launch, N being the next number; a launch keeps its files.

    Raises:
        UserError: it can't be made.
    """
    parent = directory / "launch"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            number = max((int(each.name) for each in parent.iterdir() if each.name.isdigit()), default=0) + 1
            try:
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:  # another launch was faster
                continue
    except OSError as error:
        raise UserError(f"{parent} can't be made: {error.strerror}") from None


def newest_folder(directory: Path) -> Path:
    """Return the folder of the latest launch.

    Raises:
        UserError: there is none.
    """
    found = [each for each in (directory / "launch").glob("*") if each.name.isdigit()]
    if not found:
        raise UserError(f"{directory} has not been launched: there is no {directory / 'launch'}.")
    return max(found, key=lambda each: int(each.name))
