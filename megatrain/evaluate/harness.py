"""The EleutherAI evaluation harness (package lm-eval) on a model of ours, in any layout that it is loaded in.

Every process runs the harness with the same requests, so that all pass the same tokens through their shards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatrain.config.errors import UserError
from megatrain.evaluate.perplexity import windows
from megatrain.models.sampling import Sampling
from megatrain.train.generation import TextRequest, continue_texts
from megatrain.train.scoring import Scorer

ANSWER_TOKENS = 256
"""Most tokens of an answer whose task sets no limit."""


class HarnessModel(LM):
    """A model as the harness asks it: for log-likelihoods of texts, and for texts."""

    def __init__(self, scorer: Scorer, *, max_batch: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.max_batch = max_batch

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps results of this tokenizer apart from others'."""
        return self.scorer.trained.tokenizer.digest()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each (context, continuation), and whether greedy decoding gives it."""
        pairs = [self.scorer.encode(*each.args) for each in requests]
        return [(score.nats, score.is_greedy) for score in self.scorer.scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of what the model sees."""
        trained = self.scorer.trained
        context, eos = trained.context, trained.tokenizer.eos_id
        parts = [
            list(windows(trained.tokenizer.encode(each.args[0]), eos, context=context, stride=context))
            for each in requests
        ]
        scores = iter(self.scorer.scores([pair for pairs in parts for pair in pairs]))
        return [sum(next(scores).nats for _ in pairs) for pairs in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the texts that its options name."""
        return self.scorer.copies.share(requests, self._generated)

    def _generated(self, requests: Sequence[Instance]) -> list[str]:
        trained = self.scorer.trained
        texts = [""] * len(requests)
        for n, _, text in continue_texts(
            trained.packed(),
            trained.tokenizer,
            [_request(*each.args) for each in requests],
            context=trained.context,
            max_batch=self.max_batch,
        ):
            if text.finish:
                # Decoded anew: the harness expects the bytes of an incomplete character at the end, too.
                texts[n] = trained.tokenizer.decode(text.tokens)
                for stop in text.request.stop:
                    texts[n] = texts[n].partition(stop)[0]
        return texts


def _request(context: str, options: dict[str, Any]) -> TextRequest:
    """Return a request of the harness as one of ours."""
    until = options.get("until") or []
    greedy = not options.get("do_sample", False)
    temperature = 0.0 if greedy else float(options.get("temperature", 1.0))
    return TextRequest(
        prompt=context,
        tokens=int(options.get("max_gen_toks", ANSWER_TOKENS)),
        sampling=Sampling(
            temperature=temperature, top_p=options.get("top_p"), top_k=options.get("top_k"), seed=0
        ),
        stop=tuple(each for each in ([until] if isinstance(until, str) else until) if each),
    )


def known_tasks(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """Return what knows `tasks`, with the task files in `folder` if there is one.

    Raises:
        UserError: there is no such task.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    missing = [each for each in tasks if each not in manager.all_tasks]
    if missing:
        raise UserError(f"lm-eval has no task {', '.join(missing)}; `lm_eval ls tasks` lists what it has")
    return manager


def run_tasks(
    scorer: Scorer,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    limit: int | None,
    shots: int | None,
    max_batch: int,
) -> dict[str, Any]:
    """Return the harness' results of `tasks`, by task and metric.

    Args:
        folder: a directory with task files of one's own.
        limit: most examples of each task. shots: examples in each prompt; None: as the task says.

    Raises:
        UserError: there is no such task.
    """
    manager = known_tasks(tasks, folder)
    found = lm_eval.simple_evaluate(
        model=HarnessModel(scorer, max_batch=max_batch),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: dict(values) for name, values in found["results"].items()}
