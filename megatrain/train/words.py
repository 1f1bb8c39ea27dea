"""The words with which a run begins and ends: what was read, what it will do; how it ended, and what it reached."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatrain.data.prepare import Contents
from megatrain.models.flops import n_params
from megatrain.nn.plan import decoder_plan
from megatrain.observe.figures import Beginning, amount, byte_size
from megatrain.observe.watch import over_fits
from megatrain.parallel.layout import layout_summary
from megatrain.parallel.lora import with_adapters
from megatrain.train.config import Config
from megatrain.train.run import Run
from megatrain.train.sample import prompt_of

FAR = 0.75  # a training loss below this share of the validation loss is worth a word


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, and what its run has reached."""

    exit_code: int
    reason: str
    """`done`, `early stop`, `stop_at` or the signal's name."""
    step: int
    first_step: int
    """Steps that were done when the attempt began."""
    watch: dict[str, Any]
    """The counters of the over-fitting watch; empty without a validation."""
    bits_per_nat: float | None
    """Bits per byte of the held-out text for each nat per token; None where tokens have no text."""
    prompt: str = ""
    """What samples of text begin with."""
    sample: str = ""
    """A sample of text from the model, with its prompt; empty where there is none."""
    has_report: bool = False
    """Whether `report.html` shows the run up to here."""

    @property
    def kind(self) -> Literal["finished", "early stop", "stop_at", "signal"]:
        """The reason's kind."""
        kinds: dict[str, Literal["finished", "early stop", "stop_at"]]
        kinds = {"done": "finished", "early stop": "early stop", "stop_at": "stop_at"}
        return kinds.get(self.reason, "signal")


def beginning(run: Run) -> Beginning:
    """Return what is said before the first step."""
    cfg = run.cfg
    processes = run.processes.size
    layout = f"{processes} processes ({layout_summary(cfg.parallel)}), " if processes > 1 else ""
    title = (
        f"{cfg.run.name}: {cfg.model.kind}, {amount(n_params(cfg.model))} parameters, {_adapters(cfg)}{layout}"
        f"{cfg.train.precision}, seed {cfg.train.seed}"
    )
    contents = run.data.contents
    steps_per_epoch = None if contents is None else run.loader.n_samples / run.loader.global_batch_size
    return Beginning(
        title=title,
        total_steps=cfg.train.steps,
        step=run.state.step,
        facts=(what_was_read(contents), _plan(cfg, steps_per_epoch)),
        steps_per_epoch=steps_per_epoch,
        record=run.directory / "metrics.jsonl",
    )


def _adapters(cfg: Config) -> str:
    """Say how many parameters adapters have."""
    plan = decoder_plan(cfg.model)
    more = with_adapters(plan, cfg.lora).n_params() - plan.n_params()
    return f"all frozen, {amount(more)} in adapters of rank {cfg.lora.rank}, " if more else ""


def what_was_read(contents: Contents | None) -> str:
    """Say what the tokens were made from, and what was left out."""
    if contents is None:
        return "Data: random tokens (data=synthetic), from which nothing can be learned."
    files = f"{contents.files:,} file{'s' * (contents.files != 1)}, "
    documents = f"{contents.documents:,} document{'s' * (contents.documents != 1)}"
    held_out = f"{amount(contents.val_tokens)} for validation" if contents.val_tokens else "nothing held out"
    left_out = contents.left_out.summary()
    return (
        f"Data: {contents.origin}: {files}{documents}, {byte_size(contents.text_bytes)} of text, "
        f"{amount(contents.train_tokens)} tokens for training, {held_out}."
        + (f" Left out: {left_out}." if left_out else "")
        + (_cleaned(contents.cleaning) if contents.cleaning else "")
    )


def _cleaned(report: dict[str, Any]) -> str:
    """Say how many documents cleaning removed, and which steps did."""
    gone = report["documents_in"] - report["documents_out"]
    by_step = {step["kind"]: sum(step["removed"].values()) for step in report["steps"]}
    steps = ", ".join(f"{count:,} by {kind}" for kind, count in by_step.items() if count)
    removed = f"{gone:,} of {report['documents_in']:,} documents" + (f" ({steps})" if steps else "")
    return f" Cleaning removed {removed}, and left {byte_size(report['bytes_out'])} of {byte_size(report['bytes_in'])}."


def _plan(cfg: Config, steps_per_epoch: float | None) -> str:
    """Say how many tokens the run will train on, and how often it reads the data."""
    tokens = cfg.train.steps * cfg.global_batch_size * cfg.seq_len
    epochs = "" if steps_per_epoch is None else f", {_epochs(cfg.train.steps / steps_per_epoch)}"
    return (
        f"The whole run: {cfg.train.steps:,} steps of {cfg.global_batch_size:,} x {cfg.seq_len:,} tokens, "
        f"{amount(tokens)} tokens{epochs}."
    )


def _epochs(epochs: float) -> str:
    number = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    return f"{number} epoch{'s' * (number != '1')}"


def outcome(run: Run, reason: str, exit_code: int, *, has_report: bool, sample: str) -> Outcome:
    """Return how the attempt of `run` ended."""
    return Outcome(
        exit_code=exit_code,
        reason=reason,
        step=run.state.step,
        first_step=run.log.first_step,
        watch=run.state.watch,
        bits_per_nat=_bits_per_nat(run),
        prompt=prompt_of(run),
        sample=sample,
        has_report=has_report,
    )


def _bits_per_nat(run: Run) -> float | None:
    if not run.eval_batches or run.cfg.data.kind == "classify" or run.cfg.objective.kind in ("dpo", "grpo"):
        return None
    targets = np.concatenate([batch.targets[batch.targets >= 0].numpy() for batch in run.eval_batches])
    size = int(run.data.token_bytes[targets].sum())
    return targets.size / (math.log(2) * size) if size else None


def ending(cfg: Config, done: Outcome) -> str:
    """Say how the attempt ended, and why."""
    of = f"step {done.step:,} of {cfg.train.steps:,}"
    again = done.step == done.first_step and done.kind != "signal"
    if again and done.kind == "finished":
        return f"Nothing is left to do: the run has finished all {cfg.train.steps:,} steps before."
    said = {
        "finished": f"Finished: all {cfg.train.steps:,} steps are done.",
        "early stop": f"Stopped early at {of}: {cfg.train.early_stop_patience} validations in a row brought no new "
        "best (train.early_stop_patience).",
        "stop_at": f"Stopped at {of}, as train.stop_at={cfg.train.stop_at} asks; everything is saved.",
        "signal": f"Stopped by {done.reason} at {of}; everything is saved.",
    }[done.kind]
    return f"Nothing is left to do. {said}" if again else said


def reached(done: Outcome) -> list[str]:
    """Say what the validations found, and whether the run over-fits."""
    watch = done.watch
    if not watch:
        return []
    last, best, step = watch["eval_loss"], watch["best"], watch["best_step"]
    bits = "" if done.bits_per_nat is None else f" ({best * done.bits_per_nat:.4f} bits per byte)"
    lines = [
        f"Validation loss {best:.4f}{bits}, its best, at the last validation (step {step:,})."
        if last == best
        else f"Validation loss {last:.4f} at the last validation; the best was {best:.4f}{bits}, at step {step:,}."
    ]
    if over_fits(watch):
        lines.append(
            f"It over-fits: since step {step:,} the validation loss has risen, while the training loss is "
            f"{watch['train_loss']:.4f}. More data, a smaller model or an earlier stop helps "
            "(train.early_stop_patience)."
        )
    elif watch["train_loss"] < FAR * last:
        lines.append(
            f"The training loss, {watch['train_loss']:.4f}, is far below: the model begins to learn its training "
            "text by heart. More data or a smaller model helps."
        )
    return lines
