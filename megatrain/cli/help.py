"""The help texts of the command and of every verb, made from the table of verbs and the config classes."""

import shutil
import textwrap

from megatrain.cli.conf import group_options
from megatrain.cli.options import FLAGS, Options, parse_options
from megatrain.cli.verb import Verb
from megatrain.cli.verbs import VERBS
from megatrain.config.docs import Key, describe
from megatrain.config.load import flatten
from megatrain.config.schema import ConfigError, shown
from megatrain.train.config import Config

HELP_FLAGS = ("--help", "-h")
HELP = ("--help, -h", "this text")
HELP_WITH_KEYS = (
    "--help, -h",
    "this text; with --all, every key with its value, type and meaning",
)
TOP_FLAGS = (
    ("--help, -h", "this text; `megatrain VERB --help` describes a verb"),
    ("--version", "versions of MegaTrain, Python and PyTorch"),
    ("--shell-completion SHELL", "print the completion script of bash, zsh or fish"),
)
USUAL = (
    "run.name", "data.path", "seq_len", "global_batch_size", "micro_batch_size", "optim.lr", "train.steps",
    "train.stop_at", "train.seed", "train.resume", "train.precision", "checkpoint.every", "log.wandb",
)  # fmt: skip
"""The keys that the short help lists."""


def command_help() -> str:
    """Return what `megatrain --help` prints."""
    verbs = [(verb.name, verb.summary) for verb in VERBS]
    return "\n\n".join(
        [
            "usage: megatrain VERB [group=option] [key=value] [flags]",
            _wrapped("Train Transformers. The parallel layout affects speed and memory, not results."),
            _table("Verbs", verbs),
            _table("Flags", TOP_FLAGS),
            _table("Examples", [verb.examples[0] for verb in VERBS]),
        ]
    )


def verb_help(verb: Verb, argv: list[str]) -> str:
    """Return what `megatrain VERB --help [--all] [overrides]` prints; the values are those that the verb would use."""
    parts = [f"usage: megatrain {verb.name} {verb.usage}", _wrapped(_sentence(verb.summary))]
    if verb.actions:
        parts.append(_table("Actions", verb.actions))
    if verb.takes_config:
        actions = [name for name, _ in verb.actions]
        rest = [word for word in argv if word not in (*HELP_FLAGS, "--all", *actions)]
        parts += _config_help(parse_options(verb.name, rest), every_key="--all" in argv)
    flags = (*verb.flags, *((*FLAGS, HELP_WITH_KEYS) if verb.takes_config else (HELP,)))
    return "\n\n".join([*parts, _table("Flags", flags), _table("Examples", verb.examples)])


def _config_help(options: Options, *, every_key: bool) -> list[str]:
    groups = [(group, " ".join(names)) for group, names in group_options(options.config_dir).items()]
    values, said = _values(options)
    keys = describe(Config)
    chosen = keys if every_key else [key for key in keys if key.path in USUAL]
    title = "Keys" if every_key else "Most used keys (all of them: --help --all)"
    return [
        _table("Config groups (write group=option)", groups),
        _key_list(f"{title}, {said}", chosen, values),
    ]


def _values(options: Options) -> tuple[dict[str, object], str]:
    """Return the composed value of each key, and a description of where the values come from.

    Raises:
        ConfigError: the overrides are wrong; one that is missing is none of that.
    """
    from megatrain.cli.compose import (  # imports Hydra, which is slow; not needed by `--help` alone
        Source,
        compose,
    )
    from megatrain.cli.mistakes import must_be_given

    source = Source(options.config_dir, options.config_name, options.starts_from_base)
    given = " ".join(options.overrides)
    try:
        return flatten(
            compose(options.overrides, source)
        ), f"with {'the values of ' + given if given else 'their defaults'}"
    except ConfigError as error:
        if any(problem.rule != must_be_given(problem.field).rule for problem in error.problems):
            raise
        problems = "; ".join(str(problem).rstrip(".") for problem in error.problems)
        alone = Source(options.config_dir, options.config_name)
        return flatten(compose([], alone)), f"with their defaults ({problems})"


def _key_list(title: str, keys: list[Key], values: dict[str, object]) -> str:
    """Return `path = value  (type)` of each key with its meaning below; keys of other kinds have their defaults."""
    lines = [_wrapped(f"{title}:")]
    for key in keys:
        only = f"  [{'|'.join(key.only)} only]" if key.only else ""
        value = shown(values[key.path]) if key.path in values else key.default
        lines.append(_wrapped(f"{key.path} = {value}  ({key.type}){only}", indent=2, hang=6))
        if key.doc:
            lines.append(_wrapped(key.doc, indent=6, hang=6))
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str:
    """Lay out two columns; a first one that is too wide gets its own line."""
    width = min(max(len(left) for left, _ in rows), _columns() // 3)
    lines = [_wrapped(f"{title}:")]
    for left, right in rows:
        if len(left) > width:
            lines += [f"  {left}", _wrapped(right, indent=width + 4, hang=width + 4)]
        else:
            lines.append(_wrapped(f"{left:<{width}}  {right}", indent=2, hang=width + 4))
    return "\n".join(lines)


def _columns() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 110))


def _wrapped(text: str, *, indent: int = 0, hang: int = 0) -> str:
    return textwrap.fill(
        text,
        _columns(),
        initial_indent=" " * indent,
        subsequent_indent=" " * hang,
        break_on_hyphens=False,
        break_long_words=False,
        drop_whitespace=True,
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
