"""What `megatrain train` prints at its end: a sample, what the run reached, where things are, and how to go on.

Every command that is named runs as it stands, in the shell that started the run.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.runtime.launch import MEETING
from megatrain.runtime.processes import is_started
from megatrain.train.config import Config

if TYPE_CHECKING:
    from megatrain.train.words import Outcome


def close(cfg: Config, done: "Outcome", verb: str, argv: Sequence[str]) -> None:
    """Say all that is to be said; `argv` are the words after `megatrain VERB`."""
    from megatrain.observe.figures import say, visible
    from megatrain.train.files import run_directory
    from megatrain.train.words import ending, reached

    directory = run_directory(cfg)
    if done.sample:
        say("\nA sample of text from the model:\n")
        say(visible(done.sample))
    kept = "metrics.jsonl, events.jsonl, checkpoints/, config.yaml"
    say("\n" + "\n".join([ending(cfg, done), *reached(done)]))
    say(f"The run is in {directory}: {'report.html (its curves), ' if done.has_report else ''}{kept}.")
    again, what = _go_on(cfg, done, verb, argv)
    if done.kind != "signal":
        say(
            "\n".join(
                ["Go on with:", *(f"  {command}" for command in _commands(cfg, directory, done.prompt))]
            )
        )
    say(f"{what}:\n  {again}")


def _commands(cfg: Config, directory: Path, prompt: str) -> list[str]:
    """Return the commands that use what the run has made; `prompt` is what its samples begin with."""
    run = shlex.quote(str(directory))
    generate = f"megatrain generate {run} {shlex.quote(_on_one_line(prompt))}"
    others = [f"megatrain report {run}", f"megatrain export {run} {shlex.quote(_new_directory(cfg))}"]
    if cfg.model.classifier is not None:
        labels = " ".join(
            ["megatrain evaluate", run, "--labels", shlex.quote(str(_first_path(cfg) or "digits"))]
        )
        fields = {
            "--text-field": (cfg.data.text_field, "text"),
            "--label-field": (cfg.data.label_field, "label"),
        }
        given = [f" {flag} {shlex.quote(value)}" for flag, (value, usual) in fields.items() if value != usual]
        template = "" if cfg.data.template is None else f" --template {shlex.quote(cfg.data.template)}"
        return ["".join([labels, *given, template]), *others]
    return [generate, *others] if cfg.data.kind != "synthetic" else others


def _first_path(cfg: Config) -> str | None:
    path = cfg.data.path
    return path if path is None or isinstance(path, str) else path[0]


def _on_one_line(prompt: str) -> str:
    """Return the first line of `prompt`, or a word in its place where that would not do as an argument."""
    line = next((line for line in prompt.splitlines() if line.strip()), "")
    return line if line.isprintable() and not line.startswith("-") and line else "Once"


def _go_on(cfg: Config, done: "Outcome", verb: str, argv: Sequence[str]) -> tuple[str, str]:
    """Return the command that continues the run, and what it does."""
    more = ["train.resume=auto"] if cfg.train.resume == "never" else []
    if done.kind == "finished":
        steps = 2 * cfg.train.steps
        changed = {*cfg.train.allow_changes, "train.steps"}
        if cfg.schedule.resolved_warmup(steps) != cfg.schedule.resolved_warmup(cfg.train.steps):
            changed.add("schedule.warmup_steps")
        more += [f"train.steps={steps}", f"train.allow_changes=[{','.join(sorted(changed))}]"]
        more += [] if cfg.train.stop_at is None else ["train.stop_at=null"]
        why = "To train for twice as long"
    elif done.kind == "stop_at":
        more += ["train.stop_at=null"]
        why = f"To go on to step {cfg.train.steps:,}"
    elif done.kind == "early stop":
        more += ["train.early_stop_patience=0"]
        why = f"To go on to step {cfg.train.steps:,} all the same"
    else:
        why = "To resume"
    replaced = tuple(f"{word.partition('=')[0]}=" for word in more)
    words = [*(word for word in argv if not word.startswith(replaced)), *more]
    if is_started() and MEETING not in os.environ:  # by torchrun, whose own words we don't know
        return (
            f"-m megatrain {verb} {shlex.join(words)}",
            f"{why}, with the same torchrun words before it",
        )
    return f"megatrain {verb} {shlex.join(words)}".rstrip(), why


def _new_directory(cfg: Config) -> str:
    """Return a name for an export, relative to the current directory, that is still free."""
    base = f"{Path(cfg.run.name).name}-exported"
    return next(name for name in (base, *(f"{base}-{n}" for n in range(2, 1000))) if not Path(name).exists())
