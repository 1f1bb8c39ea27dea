"""Check that parallel layouts match a single process, with a shrunk config on this machine's CPU."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatrain.config.errors import UserError
from megatrain.config.load import rule_problems
from megatrain.config.schema import Problem
from megatrain.data.store import SyntheticStore
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerError, WorkerPool
from megatrain.train.candidates import Candidate
from megatrain.train.config import Config
from megatrain.train.faults import FAULTS
from megatrain.train.parity import (
    DisagreementError,
    Trace,
    error_norm,
    largest_relative_error,
    merged,
    relative_errors,
    trace,
)
from megatrain.train.shrink import in_layout, shrink

STEPS = 3
BOUND = 1e-9  # float64: sums in another order differ by 1e-15, and Adam divides by small gradients
FACTOR = 3.0
"""A layout in a lower precision may be so many times as far from float64 as one process is: which sums are rounded
where is chance."""
FLOOR = {"fp32": 2.0**-22, "bf16": 2.0**-10, "fp8": 2.0**-10}
"""Errors that say nothing, should one process happen to have smaller ones: a loss sums many that partly cancel."""
Outcome = Literal["equal", "wrong", "failed", "not tried", "caught", "missed", "cannot reach it"]
BAD = ("wrong", "failed", "missed")


@dataclass(frozen=True)
class Errors:
    """Relative errors of a run against one process in float64."""

    loss: float
    grad_norm: float
    gradient: tuple[str, float]
    """Parameter with the largest error of the first gradient, and that error."""
    weight: tuple[str, float]
    """Parameter with the largest error of the weights after the last step, or of their averages, and that error."""
    same_samples: bool
    same_start: bool
    """Whether the initial weights are the same, bit for bit."""

    @property
    def sizes(self) -> tuple[float, float, float, float]:
        """The errors of loss, gradient norm, gradients and weights."""
        return self.loss, self.grad_norm, self.gradient[1], self.weight[1]

    def within(self, bounds: Sequence[float]) -> bool:
        """Tell whether nothing differs that must be the same, and no error exceeds its bound."""
        small = all(error <= bound for error, bound in zip(self.sizes, bounds, strict=True))
        return self.same_samples and self.same_start and small

    def first_fault(self, bounds: Sequence[float]) -> str:
        """Say in a few words what is wrong."""
        if not self.same_samples:
            return "other samples"
        if not self.same_start:
            return "other initial weights"
        if self.gradient[1] > bounds[2]:
            return f"worst in the gradient of {self.gradient[0]}"
        if self.weight[1] > bounds[3]:
            return f"worst in the weight {self.weight[0]}"
        return "the loss" if self.loss > bounds[0] else "the gradient norm"


@dataclass(frozen=True)
class Verdict:
    """What came of one layout, or of one fault in it."""

    candidate: Candidate
    outcome: Outcome
    precision: str = "fp64"
    fault: str = ""
    """Name of the fault that was planted; empty if none was."""
    errors: Errors | None = None
    bounds: tuple[float, ...] = (BOUND,) * 4
    """Largest errors that count as equal: of loss, gradient norm, gradients, weights."""
    reason: str = ""
    """Why the outcome is what it is, if that is not plain from the errors."""
    seconds: float = 0.0

    @property
    def counts_against(self) -> bool:
        """Whether the command must not report success."""
        return self.outcome in BAD or (self.outcome == "not tried" and self.candidate.asked)


@dataclass
class Check:
    """One config in its layouts: `verdicts` runs them, in one pool of workers, against one process run once."""

    cfg: Config
    candidates: Sequence[Candidate]
    faults: Sequence[str] = ()
    """Faults to plant in each layout that they can reach; the layout is compared without one first."""
    progress: Callable[[str], None] = lambda label: None
    """Is told what runs next."""
    small: Config = field(init=False)

    def __post_init__(self) -> None:
        self.small = shrink(self.cfg, [each.layout for each in self.candidates if not each.reason])
        self.store = SyntheticStore(self.small.model.vocab_size, n_tokens=1 << 14, documents=600)

    @property
    def own_precision(self) -> str:
        """The precision of the real run, where it is not float64; auto counts as bf16, which it is on GPUs."""
        wanted = self.cfg.train.precision
        return "bf16" if wanted == "auto" else wanted

    def plan(self) -> list[str]:
        """Return the label of each run, in order."""
        return [
            f"{each.label}{' ' * bool(what)}{what}"
            for each in self.candidates
            if not each.reason
            for what in ("", *self._reaching(each), *self._precisions(each))
        ]

    def verdicts(self) -> Iterator[Verdict]:
        """Run everything; yield each verdict as soon as it is known.

        Raises:
            UserError: the shrunk config diverges in one process, so that there is nothing to compare with.
        """
        with WorkerPool("megatrain.train.parity") as pool:
            truth = self._alone("fp64")
            if not all(map(math.isfinite, [*truth.losses, *truth.grad_norms, truth.eval_loss])):
                raise UserError(
                    f"the shrunk config diverges in one process at optim.lr={self.cfg.optim.lr:g}: there is nothing "
                    "to compare with. Lower optim.lr."
                )
            for candidate in self.candidates:
                yield from self._layout(pool, candidate, truth)

    def _layout(self, pool: WorkerPool, candidate: Candidate, truth: Trace) -> Iterator[Verdict]:
        if candidate.reason:
            yield Verdict(candidate, "not tried", reason=candidate.reason)
            return
        cfg = in_layout(self.small, candidate.layout, self.cfg.model.n_layers)
        if broken := list(rule_problems(cfg)):
            yield Verdict(candidate, "not tried", reason=_in_words(self._as_of_real(broken, candidate)))
            return
        plain = self._run(pool, Verdict(candidate, "equal"), cfg, truth)
        yield plain
        for fault in self.faults:
            if fault not in self._reaching(candidate):
                yield Verdict(candidate, "cannot reach it", fault=fault, reason=f"needs {FAULTS[fault].rule}")
            elif plain.outcome == "equal":
                found = self._run(pool, Verdict(candidate, "equal", fault=fault), cfg, truth)
                named: dict[str, Outcome] = {"wrong": "caught", "equal": "missed"}
                yield dataclasses.replace(found, outcome=named.get(found.outcome, found.outcome))
        for precision in self._precisions(candidate):
            lower = _with_precision(cfg, precision)
            start = Verdict(candidate, "equal", precision)
            if broken := list(rule_problems(lower)):
                yield dataclasses.replace(start, outcome="not tried", reason=_in_words(broken))
                continue
            bounds = rounding_bounds(self._alone(precision), truth, precision)
            yield self._run(pool, dataclasses.replace(start, bounds=bounds), lower, truth)

    def _run(self, pool: WorkerPool, start: Verdict, cfg: Config, truth: Trace) -> Verdict:
        """Run one layout and complete its verdict."""
        what = start.fault or (start.precision if start.precision != "fp64" else "")
        self.progress(f"{start.candidate.label} {what}".strip())
        began = time.monotonic()
        try:
            ranks = pool.run(trace, world_size(cfg.parallel), cfg, self.store, STEPS, start.fault or None)
            errors = compare(merged(ranks), truth)
        except DisagreementError as error:
            found = dataclasses.replace(start, outcome="wrong", reason=str(error))
        except WorkerError as error:
            found = dataclasses.replace(start, outcome="failed", reason=str(error))
        else:
            good = errors.within(start.bounds)
            reason = "" if good else errors.first_fault(start.bounds)
            found = dataclasses.replace(
                start, outcome="equal" if good else "wrong", errors=errors, reason=reason
            )
        return dataclasses.replace(found, seconds=time.monotonic() - began)

    def _as_of_real(self, broken: list[Problem], candidate: Candidate) -> list[Problem]:
        """Return the same problems of the real config in place of the shrunk one's, if it has them."""
        fields = {problem.field for problem in broken}
        real = rule_problems(dataclasses.replace(self.cfg, parallel=candidate.layout))
        return [problem for problem in real if problem.field in fields] or broken

    def _reaching(self, candidate: Candidate) -> list[str]:
        return [fault for fault in self.faults if FAULTS[fault].reaches(self.cfg.model, candidate.layout)]

    def _precisions(self, candidate: Candidate) -> list[str]:
        """Return the precisions beside float64: the config's own for the user's layouts, unless faults are planted."""
        is_own = candidate.asked or candidate.note
        return [self.own_precision] if is_own and not self.faults and self.own_precision != "fp64" else []

    def _alone(self, precision: str) -> Trace:
        if precision not in self._references:
            self._references[precision] = trace(_with_precision(self.small, precision), self.store, STEPS)
        return self._references[precision]

    _references: dict[str, Trace] = field(default_factory=dict, init=False)


def _with_precision(cfg: Config, precision: Any) -> Config:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))


def _in_words(broken: Sequence[Problem]) -> str:
    return "; ".join(str(problem).rstrip(".") for problem in broken)


def rounding_bounds(alone: Trace, truth: Trace, precision: str) -> tuple[float, ...]:
    """Return the largest errors of a layout in `precision` that count as rounding.

    A norm's error may be tiny by chance, so it is bounded by the norm of the gradient's error, too, which it can't
    exceed.

    Args:
        alone: one process in that precision. truth: one process in float64.
    """
    loss, norm, gradient, weight = compare(alone, truth).sizes
    norm = max(norm, error_norm(alone.gradients, truth.gradients))
    return tuple(FACTOR * max(error, FLOOR[precision]) for error in (loss, norm, gradient, weight))


def compare(found: Trace, truth: Trace) -> Errors:
    """Compare `found` with `truth`."""

    def worst(errors: dict[str, float]) -> tuple[str, float]:
        name = max(errors, key=lambda each: errors[each])
        return name, errors[name]

    gradients = relative_errors(found.gradients, truth.gradients)
    weights = relative_errors(found.final, truth.final)
    averages = relative_errors(found.averages, truth.averages)
    weights |= {f"{name} (average)": error for name, error in averages.items()}
    start = relative_errors(found.initial, truth.initial)
    return Errors(
        loss=largest_relative_error([*found.losses, found.eval_loss], [*truth.losses, truth.eval_loss]),
        grad_norm=largest_relative_error(found.grad_norms, truth.grad_norms),
        gradient=worst(gradients),
        weight=worst(weights),
        same_samples=found.digests == truth.digests,
        same_start=max(start.values()) == 0.0,
    )
