"""Rewards of answers: the built-in ones, or a function of the user's."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded

Reward = Callable[[str, str, str], float]
"""Takes a prompt, an answer, and the reference answer of the data."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(prompt: str, answer: str, reference: str) -> float:
    """Return 1 if the answer is the reference, white space around it aside, else 0."""
    return float(answer.strip() == reference.strip())


def number(prompt: str, answer: str, reference: str) -> float:
    """Return 1 if the last number in the answer is the last one in the reference, else 0."""
    found, wanted = (NUMBER.findall(text) for text in (answer, reference))
    return float(bool(found and wanted) and _value(found[-1]) == _value(wanted[-1]))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


BUILT_IN: dict[str, Reward] = {"exact": exact, "number": number}


def reward_named(name: str) -> Reward:
    """Return a built-in reward, or FUNCTION of `FILE.py:FUNCTION`.

    Raises:
        UserError: there is no such reward, or the file can't be run.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"objective.reward={name}: must be {', '.join(BUILT_IN)}, or FILE.py:FUNCTION")
    file = Path(expanded(path))
    spec = importlib.util.spec_from_file_location("megatrain_reward", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"objective.reward={name}: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"objective.reward={name}: {file} fails: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"objective.reward={name}: {file} has no function {function}")
    return checked(found, name)


def checked(function: Callable[..., object], name: str) -> Reward:
    """Return `function` with its results checked: finite numbers.

    Raises (when it is called):
        UserError: it fails, or returns something else.
    """

    def reward(prompt: str, answer: str, reference: str) -> float:
        try:
            found = function(prompt, answer, reference)
        except Exception as error:
            place = f"{type(error).__name__}: {error}"
            raise UserError(f"objective.reward={name}: fails for the answer {answer!r}: {place}") from error
        if not isinstance(found, int | float) or not math.isfinite(found):
            raise UserError(
                f"objective.reward={name}: returned {found!r} for {answer!r}, and must return a number"
            )
        return float(found)

    return reward
