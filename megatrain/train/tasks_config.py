"""Which tasks a run is evaluated on while it trains, and when."""

from collections.abc import Iterator

from megatrain.config.paths import PathText
from megatrain.config.ranges import Count, PositiveCount
from megatrain.config.schema import Problem, config


@config
class TasksConfig:
    """Tasks of `megatrain evaluate` at times of a run."""

    every: Count = 0
    """Steps between evaluations on these tasks; 0: only at the end of the run."""
    choices: PathText | None = None
    """JSONL with prompt, answer and choices, as `megatrain evaluate --choices` takes it; null: none."""
    answers: PathText | None = None
    """JSONL with prompt and reference, as `megatrain evaluate --answers` takes it; null: none."""
    answer_tokens: PositiveCount = 128
    """Most tokens of an answer."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-eval, by their names there."""
    harness_dir: PathText | None = None
    """A directory with task files of your own for lm-eval; null: none."""
    limit: PositiveCount | None = None
    """Most examples of each of these tasks; null: all."""

    @property
    def are_any(self) -> bool:
        """Whether any task is named."""
        return bool(self.choices or self.answers or self.harness)

    def problems(self) -> Iterator[Problem]:
        if self.every and not self.are_any:
            yield Problem(
                "every", self.every, "needs a task: tasks.choices, tasks.answers or tasks.harness", (0,)
            )
