"""What the loop asks after each step: hooks get facts and return requests; none holds a pointer to the run."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Protocol

from megatrain.train.config import Config


class Request(Flag):
    NOTHING = 0
    EVALUATE = auto()
    SAVE = auto()
    STOP = auto()


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a hook may know."""

    step: int
    """Steps done."""
    stop_wanted: bool = False
    """True when a signal has asked any process to stop."""
    patience_left: bool = True
    """False once early stopping has run out of patience."""


class Hook(Protocol):
    def after_step(self, facts: StepFacts) -> Request: ...


@dataclass(frozen=True)
class IntervalTriggers:
    """The requests that the config fixes in advance."""

    cfg: Config

    def after_step(self, facts: StepFacts) -> Request:
        train, step = self.cfg.train, facts.step
        request = Request.NOTHING
        if train.eval_every and step % train.eval_every == 0:
            request |= Request.EVALUATE
        if self.cfg.checkpoint.every and step % self.cfg.checkpoint.every == 0:
            request |= Request.SAVE
        if step >= train.steps:
            request |= Request.EVALUATE | Request.SAVE | Request.STOP
        if train.stop_at is not None and step >= train.stop_at:
            request |= Request.SAVE | Request.STOP
        return request


class StopOnSignal:
    def after_step(self, facts: StepFacts) -> Request:
        return Request.SAVE | Request.STOP if facts.stop_wanted else Request.NOTHING


class EarlyStop:
    def after_step(self, facts: StepFacts) -> Request:
        return Request.NOTHING if facts.patience_left else Request.SAVE | Request.STOP


def ask(hooks: Iterable[Hook], facts: StepFacts) -> Request:
    """The union of all hooks' requests."""
    request = Request.NOTHING
    for hook in hooks:
        request |= hook.after_step(facts)
    return request
