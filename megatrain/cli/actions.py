"""What verbs share: the choice of an action, progress that leaves standard output alone, and runs behind a URL."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.cli.verbs import find_verb
from megatrain.config.errors import UserError
from megatrain.config.nearest import nearest
from megatrain.config.paths import expanded
from megatrain.runtime.urls import is_url

if TYPE_CHECKING:
    from megatrain.observe.display import Display


def run_action(verb: str, actions: Mapping[str, Callable[[list[str]], int]], argv: list[str]) -> int:
    """Run the action that the first word names with the other words; return the exit code.

    Raises:
        UserError: there is no such action.
    """
    known = find_verb(verb)
    assert known is not None
    assert [name for name, _ in known.actions] == list(actions)
    if not argv or argv[0] not in actions:
        near = nearest(argv[0], actions, 1) if argv else ()
        hint = f" Did you mean {near[0]}?" if near else ""
        found = f"there is no action '{argv[0]}'.{hint}" if argv else "say what to do."
        raise UserError(f"{verb}: {found} Actions: {', '.join(actions)}; see `megatrain {verb} --help`.")
    return actions[argv[0]](argv[1:])


@contextlib.contextmanager
def progress_display(as_json: bool, *, shows: bool = True) -> "Iterator[Display]":
    """Show progress on standard error, if this process `shows` it, so that standard output has the result alone."""
    from megatrain.observe.display import make_display

    with contextlib.redirect_stdout(sys.stderr):
        display = make_display("off" if not shows else "plain" if as_json else "auto")
        try:
            yield display
        finally:
            display.close()


def run_here(place: str) -> Path:
    """Return a run directory of this machine: the path `place`, or a copy in the cache of the run at that URL.

    Raises:
        UserError: there is no run at the URL, or it can't be reached.
    """
    if not is_url(place):
        return Path(expanded(place))
    from megatrain.train.durable import local_run

    with progress_display(as_json=False) as display:
        directory, warnings = local_run(place, progress=display.phase)
    for warning in warnings:
        print(warning, file=sys.stderr)
    return directory


def strict_json(value: Any) -> Any:
    """Return `value` with null for the numbers that JSON lacks (nan, inf)."""
    if isinstance(value, dict):
        return {str(key): strict_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
