"""What a run minimizes."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.paths import PathText
from megatrain.config.ranges import NonNegative, Positive, PositiveCount, Range
from megatrain.config.schema import Problem, config


@config
class LikelihoodConfig:
    """The cross entropy of the next tokens, of answers, or of labels."""

    kind: Literal["likelihood"] = "likelihood"


@config
class DPOConfig:
    """Direct preference optimization (arXiv 2305.18290): prefer chosen answers to rejected ones, near the source."""

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How closely the model stays to its source: factor on the log-ratios of probabilities."""
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0
    """Share of the pairs that are assumed to be the wrong way round (conservative DPO, arXiv 2305.18290's authors'
    note); 0: none."""


@config
class DistillConfig:
    """Distillation (arXiv 1503.02531): imitate a teacher's probabilities of the next tokens."""

    kind: Literal["distill"] = "distill"
    teacher: PathText | None = None
    """Run directory of the teacher, which must have the same tokenizer and vocabulary."""
    temperature: Positive = 1.0
    """Temperature T of both models' probabilities; the teacher's term is multiplied by T²."""
    alpha: Annotated[float, Range(at_least=0, at_most=1)] = 0.5
    """Weight of the teacher's term; that of the cross entropy with the data is `1 - alpha`."""

    def problems(self) -> Iterator[Problem]:
        if not self.teacher:
            yield Problem("teacher", self.teacher, "must name the teacher's run directory")


@config
class GRPOConfig:
    """Group-relative policy optimization (arXiv 2402.03300): raise the probability of answers that earn a reward."""

    kind: Literal["grpo"] = "grpo"
    reward: str = "exact"
    """What an answer earns. exact: 1 if it is the reference answer of the data, else 0; number: 1 if its last number is
    the reference's, else 0; FILE.py:FUNCTION: what FUNCTION(prompt, answer, reference) returns."""
    group_size: Annotated[int, Range(at_least=2, at_most=4096)] = 8
    """Answers sampled for each prompt; an answer is judged against the others of its group."""
    answer_tokens: PositiveCount = 64
    """Most tokens of an answer."""
    temperature: Positive = 1.0
    """Temperature at which answers are sampled."""
    kl: NonNegative = 0.0
    """Coefficient of the divergence from the source's probabilities; 0: none is computed."""
    clip: Annotated[float, Range(above=0, below=1)] = 0.2
    """Largest change of a token's probability ratio, relative to 1, that is rewarded in one step."""
    updates: PositiveCount = 1
    """Optimizer updates on each step's answers."""


ObjectiveConfig = LikelihoodConfig | DPOConfig | DistillConfig | GRPOConfig
