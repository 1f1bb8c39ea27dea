"""The prompts of `megatrain generate`, and how each is to be continued."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.config.ranges import Range
from megatrain.evaluate.rows import parse_object, read_lines

INTEGERS = {
    "tokens": Range(at_least=0),
    "top_k": Range(at_least=1),
    "seed": Range(at_least=0),
    "logprobs": Range(at_least=0),
    "batch": Range(at_least=1),
    "draft_tokens": Range(at_least=1),
    "tp": Range(at_least=1),
    "pp": Range(at_least=1),
    "dp": Range(at_least=1),
    "stride": Range(at_least=1),
    "limit": Range(at_least=1),
    "shots": Range(at_least=0),
}
FLOATS = {
    "temperature": Range(at_least=0),
    "top_p": Range(at_least=0, at_most=1),
    "min_p": Range(at_least=0, at_most=1),
    "repetition_penalty": Range(above=0),
}
NUMBERS = INTEGERS | FLOATS
OF_A_PROMPT = ("tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Options that a line of a JSONL file may have for its prompt."""


def check_numbers(verb: str, options: Namespace) -> None:
    """Refuse numbers that are out of their range.

    Raises:
        UserError: one is; the message names the flag.
    """
    for name, allowed in NUMBERS.items():
        value = getattr(options, name, None)
        if value is not None and (rule := allowed.broken_rule(value)):
            raise UserError(f"{verb}: --{name.replace('_', '-')} {value}: {rule}")


def check_text(what: str, text: str) -> str:
    """Return a text of the command line.

    Raises:
        UserError: it is not UTF-8.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"generate: the {what} is not UTF-8")
    return text


def rows_of(options: Namespace) -> list[dict[str, Any]]:
    """Return for each prompt its text, as `prompt`, its stop texts, and the options of `OF_A_PROMPT`.

    Raises:
        UserError: a file can't be read, or a prompt has options that are wrong.
    """
    common = {name: getattr(options, name) for name in OF_A_PROMPT}
    common["stop"] = tuple(check_text("stop text", each) for each in options.stop)
    if any(not each for each in common["stop"]):
        raise UserError("generate: --stop '': a stop text must have at least one character")
    rows = [{"prompt": check_text("prompt", each)} for each in options.prompts]
    if options.file is not None:
        rows += _read(Path(expanded(options.file)))
    return [common | row for row in (rows or [{"prompt": ""}])]


def _read(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path, what="prompts")
    if path.suffix == ".jsonl":
        return [_json_row(where, line) for where, line in lines]
    return [{"prompt": line} for _, line in lines]


def _json_row(where: str, line: str) -> dict[str, Any]:
    row = parse_object(where, line)
    if not isinstance(row.get("prompt"), str):
        raise UserError(f"{where} must be a JSON object with a text `prompt`")
    check_text(f"prompt of {where}", row["prompt"])
    for name, value in row.items():
        if name == "prompt":
            continue
        if name == "stop":
            row["stop"] = _stop(where, value)
            continue
        if name not in OF_A_PROMPT:
            known = ", ".join(("prompt", "stop", *OF_A_PROMPT))
            raise UserError(f"{where}: there is no option {name!r}; a line may have {known}")
        kind = "an integer" if name in INTEGERS else "a number"
        if isinstance(value, bool) or not isinstance(value, int if name in INTEGERS else int | float):
            raise UserError(f"{where}: {name}={value!r} must be {kind}")
        if rule := NUMBERS[name].broken_rule(value):
            raise UserError(f"{where}: {name}={value}: {rule}")
    return row


def _stop(where: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise UserError(f"{where}: stop={value!r} must be a text or a list of texts, none of them empty")
    return tuple(texts)
