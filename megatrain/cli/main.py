"""The command `megatrain`: finds the verb, runs it, and turns errors into exit codes.

Exit codes: 0 done; 1 unexpected error (with traceback), or processes that waited in vain for another; 2 invalid config
or input; 3 no intact checkpoint is left; 75 training was stopped by a signal, with everything saved; 130 another verb
was interrupted.
"""

import errno
import os
import sys
from importlib.metadata import PackageNotFoundError, version

from megatrain.cli.completion import candidates, script
from megatrain.cli.help import HELP_FLAGS, command_help, verb_help
from megatrain.cli.verbs import VERBS, find_verb
from megatrain.config.errors import StalledError, StopRequested, UserError
from megatrain.config.nearest import nearest
from megatrain.runtime.ending import tell_launcher
from megatrain.runtime.paths import name_user
from megatrain.runtime.streams import abandon_output, output_is_broken, repair_streams


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: that of the process); return the exit code."""
    repair_streams()
    name_user()
    try:
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        # Every process of a run raises it, but that the first one stands still can be said by others only.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, StalledError):
            print(f"megatrain: {error}", file=sys.stderr)
        tell_launcher(f"megatrain: {error}")
        return error.exit_code
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatrain: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("megatrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        abandon_output()
        return 141
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of a run, a file or a directory: nothing can be there
            print(f"megatrain: {error.filename}: the name is too long for a file", file=sys.stderr)
            return UserError.exit_code
        if not output_is_broken():
            raise
        abandon_output()
        print(f"megatrain: the output can't be written: {error.strerror}", file=sys.stderr)
        return 1


def dispatch(argv: list[str]) -> int:
    """Find and run the verb or flag of a command line.

    Raises:
        UserError: there is no such verb, or the verb reported a mistake of the user.
    """
    if not argv or argv[0] in HELP_FLAGS:
        print(command_help())
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        print(_versions())
        return 0
    if name == "--shell-completion":
        print(script(" ".join(rest)))
        return 0
    if name == "--complete":
        print(*(f"{candidate}\n" for candidate in candidates(" ".join(rest))), sep="", end="")
        return 0
    verb = find_verb(name)
    if verb is None:
        raise UserError(_no_such_verb(name))
    if any(flag in rest for flag in HELP_FLAGS):
        print(verb_help(verb, rest))
        return 0
    _require_directory()
    return verb.run(rest)


def _require_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working directory is gone or closed to this user ({error.strerror}); go to another."
        ) from None


def _no_such_verb(name: str) -> str:
    verbs = [verb.name for verb in VERBS]
    if "=" in name:
        return f"the verb comes first, as in `megatrain train {name}`; verbs: {', '.join(verbs)}."
    near = nearest(name, verbs, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no verb '{name}'.{hint} Verbs: {', '.join(verbs)}; see `megatrain --help`."


def _versions() -> str:
    found = []
    for package in ("megatrain", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} is not installed")
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])
