"""The help texts of the command and of every verb, made from the table of verbs and the config classes."""

import shutil
import textwrap

from megatrain.cli.conf import group_options
from megatrain.cli.options import FLAGS, parse_options
from megatrain.cli.verbs import VERBS, Verb
from megatrain.config.docs import Key, describe
from megatrain.train.config import Config

HELP_FLAGS = ("--help", "-h")
HELP = ("--help, -h", "this text")
HELP_WITH_KEYS = ("--help, -h", "this text; with --all also every key with its type, default and meaning")
TOP_FLAGS = (
    ("--help, -h", "this text; `megatrain VERB --help` has a verb's"),
    ("--version", "versions of MegaTrain, Python and PyTorch"),
    ("--shell-completion SHELL", "print the completion script of bash, zsh or fish"),
)
USUAL = (
    "run.name", "data.path", "seq_len", "global_batch_size", "micro_batch_size", "optim.lr", "train.steps",
    "train.stop_at", "train.seed", "train.resume", "train.precision", "checkpoint.every", "log.wandb",
)  # fmt: skip
"""The keys that a short help names."""


def command_help() -> str:
    """What `megatrain --help` prints."""
    verbs = [(verb.name, verb.summary) for verb in VERBS]
    return "\n\n".join(
        [
            "usage: megatrain VERB [group=option] [key=value] [flags]",
            _wrapped("Trains Transformers; the parallel layout is only a performance choice."),
            _table("Verbs", verbs),
            _table("Flags", TOP_FLAGS),
            _table("Examples", [verb.examples[0] for verb in VERBS]),
        ]
    )


def verb_help(verb: Verb, argv: list[str]) -> str:
    """What `megatrain VERB --help [--all] [--config-dir DIR]` prints."""
    parts = [f"usage: megatrain {verb.name} {verb.usage}", _wrapped(_sentence(verb.summary))]
    if verb.takes_config:
        rest = [word for word in argv if word not in (*HELP_FLAGS, "--all")]
        parts += _config_help(parse_options(verb.name, rest).config_dir, every_key="--all" in argv)
    flags = (*verb.flags, *((*FLAGS, HELP_WITH_KEYS) if verb.takes_config else (HELP,)))
    return "\n\n".join([*parts, _table("Flags", flags), _table("Examples", verb.examples)])


def _config_help(config_dir: str | None, *, every_key: bool) -> list[str]:
    groups = [(group, " ".join(options)) for group, options in group_options(config_dir).items()]
    keys = describe(Config)
    chosen = keys if every_key else [key for key in keys if key.path in USUAL]
    title = "Keys" if every_key else "Keys used most (all of them: --help --all)"
    what = (
        "write group=option"
        if every_key
        else "write group=option; `megatrain train --cfg job` shows what comes out"
    )
    return [_table(f"Config groups ({what})", groups), _key_list(title, chosen)]


def _key_list(title: str, keys: list[Key]) -> str:
    """`path  type = default`, and below it the meaning."""
    lines = [_wrapped(f"{title}:")]
    for key in keys:
        only = f"  [{'|'.join(key.only)} only]" if key.only else ""
        lines.append(_wrapped(f"{key.path} = {key.default}  ({key.type}){only}", indent=2, hang=6))
        if key.doc:
            lines.append(_wrapped(key.doc, indent=6, hang=6))
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str:
    """Two columns; a first column that is too wide stands on its own line."""
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
