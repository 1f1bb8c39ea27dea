"""What a run does about failures that it finds itself: steps that are skipped, spikes, replicas that differ."""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.loader import StepBatch
from megatrain.observe.sinks import Observer
from megatrain.parallel.replicas import compare_replicas
from megatrain.resilience.policy import WINDOW, FailurePolicy, Verdict
from megatrain.train.run import Run
from megatrain.train.step import StepStats

SHOWN = 256
"""Samples of a batch that an event names, at most."""


class DivergedError(UserError):
    """The loss or the gradient norm is not finite, or its loss spikes, whatever the run does about it."""

    exit_code = 1


class ReplicasDifferError(UserError):
    """Ranks that must hold the same values do not."""

    exit_code = 1


def diverged(run: Run, verdict: Verdict, stats: StepStats) -> DivergedError:
    """Return the error that ends the run at the present step."""
    loss, grad_norm, _ = stats.read()
    return DivergedError(
        f"the run diverged at step {run.state.step}: loss {loss}, gradient norm {grad_norm} ({verdict.why}). Nothing "
        "of this step was saved; the checkpoints are of earlier ones. Start another run (run.name=...) with a lower "
        "optim.lr, a longer schedule.warmup_steps or a lower optim.clip_norm; train.precision=fp32 tells whether it is "
        "the precision."
    )


def note_skipped(
    run: Run, verdict: Verdict, batch: StepBatch, loss: float, grad_norm: float, observer: Observer
) -> None:
    """Record a step whose update was not made, with the samples and documents of its batch."""
    step = run.state.step
    run.log.event(
        "step_skipped", step=step, why=verdict.why, loss=loss, grad_norm=grad_norm, **_batch_facts(run, batch)
    )
    observer.notice(f"Step {step} was skipped: {verdict.why}. Its samples are in events.jsonl.")


def roll_back(
    run: Run, policy: FailurePolicy, verdict: Verdict, batch: StepBatch, observer: Observer
) -> bool:
    """Restore the latest checkpoint, and pass over the batches since; all processes call this together.

    Returns False if there is no checkpoint, so that only the step is left out.

    Raises:
        DivergedError: the run has gone back to that checkpoint before.
    """
    state, step = run.state, run.state.step
    run.saver.finish()
    steps = run.processes.from_first(run.checkpointer.steps)
    if not steps:
        return False
    if policy.has_gone_back_to(steps[-1]):
        raise DivergedError(
            f"the run diverged at step {step}: {verdict.why}, again after going back to step {steps[-1]} and passing "
            "over the batches that came then, so these are not the cause. Nothing of this step was saved. Start "
            "another run (run.name=...) with a lower optim.lr or optim.clip_norm, or raise "
            "resilience.spike_deviations if such losses are normal here."
        )
    next_batch = step + state.batches_passed_over
    found = run.checkpointer.load(tensors := state.tensors())
    assert found is not None
    state.restore(found.state, tensors)
    state.batches_passed_over = next_batch - state.step
    run.log.open(state.step)
    policy.went_back(state.step, recent_losses(run))
    facts: dict[str, Any] = {"step": state.step, "from_step": step, "why": verdict.why}
    facts |= {"batches_passed_over": state.batches_passed_over, **_batch_facts(run, batch)}
    run.log.event("rollback", **facts)
    observer.notice(
        f"Step {step} was not taken: {verdict.why}. Training goes on from step {state.step}, with the batches that "
        "follow those of this step."
    )
    return True


def require_equal_replicas(run: Run) -> None:
    """Compare what several ranks hold alike; all processes call this together.

    Raises:
        ReplicasDifferError: a difference was found; the message names tensor and ranks.
    """
    found = compare_replicas(run.state.tensors(), run.state.parallel.splits, run.processes.gather)
    if not found:
        return
    first = found[0]
    ranks = ", ".join(map(str, first.odd))
    hosts = run.processes.gather(run.host)
    run.log.event(
        "replicas_differ",
        step=run.state.step,
        tensors=[each.name for each in found[:SHOWN]],
        ranks=sorted({rank for each in found for rank in each.odd}),
        hosts=sorted({hosts[rank] for each in found for rank in each.odd}),
    )
    who = (
        f"rank {ranks} on {hosts[first.odd[0]]} differs from ranks"
        if len(first.odd) == 1
        else f"ranks {ranks} of"
    )
    raise ReplicasDifferError(
        f"at step {run.state.step} {first.name} is not the same on all ranks that hold it: {who} "
        f"{', '.join(map(str, first.holders))} ({len(found)} tensors differ). The hardware of one of them computes or "
        "keeps wrong values. Checkpoints since the last comparison "
        f"(resilience.compare_replicas_every={run.cfg.resilience.compare_replicas_every}) may hold them too: remove "
        "these, leave that machine out, and start again."
    )


def recent_losses(run: Run) -> list[float]:
    """Return the losses of the latest steps in the record, the oldest first; the same on every process."""
    if run.cfg.resilience.spike == "ignore":
        return []
    return run.processes.from_first(lambda: list(deque(_recorded_losses(run), WINDOW)))


def _recorded_losses(run: Run) -> Iterator[float]:
    with suppress(OSError), (run.directory / "metrics.jsonl").open() as file:
        for line in file:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(loss := row.get("train/loss"), float) and row["step"] <= run.state.step:
                    yield loss


def _batch_facts(run: Run, batch: StepBatch) -> dict[str, Any]:
    """Return the samples of a global batch, and the documents that they touch (first and last of each sample)."""
    return {
        "samples": batch.sample_ids[:SHOWN].tolist(),
        "documents": run.loader.documents_of(batch.sample_ids[:SHOWN]),
    }
