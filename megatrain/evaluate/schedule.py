"""Evaluation of a run on tasks while it trains, in its own layout."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.evaluate.answers import answer, compare, read_tasks
from megatrain.evaluate.choices import choose, read_questions
from megatrain.runtime.packages import how_to_install
from megatrain.train.inference import TrainedModel
from megatrain.train.run import Run
from megatrain.train.scoring import Scorer
from megatrain.train.tasks_config import TasksConfig

PACKAGES = {
    "choices": {"sklearn": "scikit-learn"},
    "answers": {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"},
    "harness": {"lm_eval": "lm-eval"},
}
"""Key of `tasks` -> module that it needs -> package that has it."""


class ScheduledTasks:
    """The tasks of a run, read once."""

    def __init__(self, cfg: TasksConfig) -> None:
        """Read the tasks of `cfg`.

        Raises:
            UserError: a file is not as it should be, or a package is missing.
        """
        self.cfg = cfg
        for name, modules in PACKAGES.items():
            for module, package in modules.items():
                if getattr(cfg, name) and find_spec(module) is None:
                    raise UserError(f"tasks.{name} needs the package {package}: {how_to_install(package)}")
        self.questions = read_questions(Path(expanded(cfg.choices))) if cfg.choices else []
        self.answers = read_tasks(Path(expanded(cfg.answers))) if cfg.answers else []
        self.folder = None if cfg.harness_dir is None else Path(expanded(cfg.harness_dir))
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"tasks.harness_dir={cfg.harness_dir}: there is no such directory")
        if cfg.harness:
            from megatrain.evaluate.harness import known_tasks

            known_tasks(cfg.harness, self.folder)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Return the results of the model as it is now; all processes call this together.

        A signal calls the parts off that have not begun.
        """
        trained = TrainedModel(
            run.state.parallel, run.data.tokenizer, run.cfg, run.state.step, in_training=True
        )
        scorer = Scorer(trained, run.processes)
        found: dict[str, Any] = {}
        eager = (
            torch.compiler.set_stance("force_eager") if run.cfg.parallel.compile else contextlib.nullcontext()
        )
        with eager, contextlib.redirect_stdout(io.StringIO()):  # lm-eval prints
            if self.questions:
                found["choices"] = choose(scorer, self.questions)
                run.processes.report()
            if self.answers and not run.any_wants(bool(run.signals.received)):
                texts = answer(trained, self.answers, tokens=self.cfg.answer_tokens, stop=(), max_batch=64)
                found["answers"] = compare(texts, self.answers)
                run.processes.report()
            if self.cfg.harness and not run.any_wants(bool(run.signals.received)):
                found |= self._on_harness(scorer)
        return found

    def _on_harness(self, scorer: Scorer) -> dict[str, Any]:
        from megatrain.evaluate.harness import run_tasks

        names, limit = self.cfg.harness, self.cfg.limit
        return run_tasks(scorer, names, folder=self.folder, limit=limit, shots=None, max_batch=64)
