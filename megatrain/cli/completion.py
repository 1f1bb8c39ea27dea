"""Completion of verbs, flags, groups, options, keys and values on the command line of bash, zsh and fish.

A shell's script asks `megatrain --complete LINE`, where LINE is the command line up to the cursor, and gets
the candidates for its last word. Neither Hydra nor PyTorch is imported, so the answer is immediate.
"""

from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatrain.cli.conf import group_options
from megatrain.cli.options import FLAGS
from megatrain.cli.verb import Verb
from megatrain.cli.verbs import VERBS, find_verb
from megatrain.config.errors import UserError
from megatrain.config.load import accepts, config_classes, hint_at, keys, kind_of, members
from megatrain.train.config import Config

BASH = r"""_megatrain() {
    local line=${COMP_LINE:0:COMP_POINT} word candidate
    word=${line##*[[:space:]]}
    COMPREPLY=()
    while IFS= read -r candidate; do
        # Where readline breaks words at =, it replaces only what follows the last one.
        if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then candidate=${candidate#"${word%=*}="}; fi
        COMPREPLY+=("$candidate")
    done < <(megatrain --complete "$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} != *[=./] ]]; then COMPREPLY[0]+=' '; fi
}
complete -o nospace -o default -F _megatrain megatrain"""

ZSH = r"""#compdef megatrain
_megatrain() {
    local -a found
    found=(${(f)"$(megatrain --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -Q -S '' -- $found; else _files; fi
}
compdef _megatrain megatrain"""

FISH = (
    r"""complete -c megatrain -f -a '(megatrain --complete (commandline -cp | string collect) 2>/dev/null)'"""
)

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
TOP_FLAGS = ("--help", "--version", "--shell-completion")


def script(shell: str) -> str:
    """Return a shell's completion script, to be evaluated in its startup file.

    Raises:
        UserError: the shell is not supported.
    """
    if shell not in SCRIPTS:
        known = "|".join(SCRIPTS)
        raise UserError(
            f'write --shell-completion {known}; for bash: eval "$(megatrain --shell-completion bash)"'
        )
    return SCRIPTS[shell]


def candidates(line: str) -> list[str]:
    """Return the candidates for the last word of `line`, a command line up to the cursor."""
    words = line.split()
    word = "" if not words or line[-1].isspace() else words.pop()
    start = next((i + 1 for i, each in enumerate(words) if Path(each).name == "megatrain"), 0)
    before = words[start:]
    if not before:
        offered = [*(verb.name for verb in VERBS), *TOP_FLAGS]
    elif before[0] == "--shell-completion":
        offered = list(SCRIPTS)
    else:
        verb = find_verb(before[0])
        offered = _for_verb(verb, before[1:], word) if verb else []
    return sorted(each for each in dict.fromkeys(offered) if each.startswith(word))


def _for_verb(verb: Verb, before: list[str], word: str) -> list[str]:
    if verb.actions and not before and not word.startswith("-"):
        return [name for name, _ in verb.actions]
    last = before[-1] if before else ""
    if last in ("--cfg", "-c"):
        return ["job", "schema"]
    if last in ("--config-dir", "-cd"):
        return _files(word)
    if word.startswith("-"):
        flags = (*verb.flags, *(FLAGS if verb.takes_config else ()))
        return ["--help", *(flag.split()[0].rstrip(",") for flag, _ in flags)]
    if not verb.takes_config:
        return []
    given = [after for flag, after in pairwise(before) if flag in ("--config-dir", "-cd")]
    groups = group_options(given[-1] if given else None)
    mark = word[: len(word) - len(word.lstrip("+~"))]
    rest = word[len(mark) :]
    found = _values(rest, groups) if "=" in rest else _keys(rest, groups)
    return [mark + each for each in found]


def _keys(word: str, groups: dict[str, list[str]]) -> list[str]:
    """Return the groups, and the keys up to their next dot."""
    sections = {key.rpartition(".")[0] for key in keys(Config)}
    found = [f"{group}=" for group in groups]
    for key in keys(Config):
        if key.startswith(word):
            dot = key.find(".", len(word))
            found.append(key[: dot + 1] if dot >= 0 else f"{key}." if key in sections else f"{key}=")
    return found


def _values(word: str, groups: dict[str, list[str]]) -> list[str]:
    """Return the values that may follow `key=`; after a comma, another value of a sweep."""
    key, _, value = word.partition("=")
    hint = hint_at(Config, key)
    if key in groups:
        options = groups[key]
    elif hint is None or config_classes(hint):
        options = []
    elif accepts(hint, "any text"):
        return [f"{key}={path}" for path in _files(value)]
    else:
        options = _choices(key, hint)
    done = value[: value.rfind(",") + 1]
    return [f"{key}={done}{option}" for option in options]


def _choices(key: str, hint: Any) -> list[str]:
    """Return the values of a leaf that can be enumerated."""
    section = hint_at(Config, key.rpartition(".")[0])
    if key.endswith(".kind") and len(config_classes(section)) > 1:
        return [kind_of(cls) for cls in config_classes(section)]
    found: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            found += map(str, get_args(member))
        elif member is bool:
            found += ["true", "false"]
        elif member is NoneType:
            found.append("null")
    return found


def _files(start: str) -> list[str]:
    """Return the paths that begin with `start`, directories with a trailing slash."""
    parent, slash, name = start.rpartition("/")
    try:
        entries = sorted(Path(parent + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    shown = [
        entry for entry in entries if entry.name.startswith(name or "") and (name or entry.name[0] != ".")
    ]
    return [f"{parent}{slash}{entry.name}{'/' if entry.is_dir() else ''}" for entry in shown]
