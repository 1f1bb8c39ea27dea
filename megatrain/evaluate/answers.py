"""Tasks whose answers are generated, and compared with references."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.evaluate.rows import read_rows, text_of, texts_of
from megatrain.models.sampling import Sampling
from megatrain.train.generation import TextRequest, continue_texts
from megatrain.train.inference import TrainedModel

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Task:
    """A prompt and the answers that count as right."""

    prompt: str
    references: tuple[str, ...]


def read_tasks(path: Path) -> list[Task]:
    """Read rows with `prompt` and `reference`, a text or a list of texts.

    Raises:
        UserError: the file or a row is not like that.
    """
    return [
        Task(text_of(where, row, "prompt"), tuple(texts_of(where, row, "reference")))
        for where, row in read_rows(path)
    ]


def answer(
    trained: TrainedModel, tasks: Sequence[Task], *, tokens: int, stop: tuple[str, ...], max_batch: int
) -> list[str]:
    """Return the greedy continuation of each prompt, without spaces around it."""
    how = Sampling(temperature=0.0)
    requests = [TextRequest(prompt=each.prompt, tokens=tokens, sampling=how, stop=stop) for each in tasks]
    texts = [""] * len(tasks)
    for n, _, text in continue_texts(
        trained.packed(), trained.tokenizer, requests, context=trained.context, max_batch=max_batch
    ):
        texts[n] = text.text.strip()
    return texts


def compare(answers: list[str], tasks: list[Task]) -> dict[str, Any]:
    """Return exact matches, BLEU and chrF (sacrebleu) and ROUGE (rouge-score: mean F1 of the best reference).

    All are between 0 and 1, but for BLEU and chrF, which by custom reach 100.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(each.references) for each in tasks)
    # sacrebleu takes each place's references as a column; a missing one is None.
    columns = [[dict(enumerate(each.references)).get(n) for each in tasks] for n in range(most)]
    scorer = RougeScorer(list(ROUGE))
    rouge = [
        scorer.score_multi(list(task.references), text) for task, text in zip(tasks, answers, strict=True)
    ]
    exact = [
        text in [each.strip() for each in task.references] for task, text in zip(tasks, answers, strict=True)
    ]
    return {
        "questions": len(tasks),
        "exact_match": float(np.mean(exact)),
        "bleu": sacrebleu.corpus_bleu(answers, columns).score,
        "chrf": sacrebleu.corpus_chrf(answers, columns).score,
        **{name: float(np.mean([each[name].fmeasure for each in rouge])) for name in ROUGE},
    }
