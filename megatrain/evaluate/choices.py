"""Tasks with labels: the model chooses by the log-likelihoods of the possible answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.evaluate.rows import read_rows, text_of, texts_of
from megatrain.train.scoring import Scorer

BINS = 10
"""Bins of confidence in which calibration is measured."""


@dataclass(frozen=True)
class Question:
    """A prompt, the answers that may follow it, and the right one's place among them."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Read rows with `prompt`, `answer` and, unless all rows have the same ones, `choices`.

    Without choices, every answer of the file is one. An answer may also be the place of a choice, counted from 0.

    Raises:
        UserError: the file or a row is not like that.
    """
    rows = read_rows(path)
    every = sorted({row["answer"] for _, row in rows if isinstance(row.get("answer"), str)})
    questions = []
    for where, row in rows:
        choices = texts_of(where, row, "choices") if "choices" in row else every
        if len(set(choices)) < max(2, len(choices)):
            raise UserError(f"{where}: there must be at least two different choices, not {choices!r}")
        answer = row.get("answer")
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            place = answer
        elif isinstance(answer, str) and answer in choices:
            place = choices.index(answer)
        else:
            raise UserError(
                f"{where}: answer={answer!r} is none of the choices: {', '.join(map(repr, choices))}"
            )
        questions.append(Question(text_of(where, row, "prompt"), tuple(choices), place))
    return questions


def choose(scorer: Scorer, questions: list[Question]) -> dict[str, Any]:
    """Return how well the model answers, and for shared choices the figures of each of them."""
    pairs = [scorer.encode(each.prompt, choice) for each in questions for choice in each.choices]
    scores = iter(scorer.scores(pairs))
    nats = [np.array([next(scores).nats for _ in each.choices]) for each in questions]
    sizes = [np.array([max(1, len(choice.encode())) for choice in each.choices]) for each in questions]
    per_byte = [int((n / size).argmax()) for n, size in zip(nats, sizes, strict=True)]
    truth = [each.answer for each in questions]
    right = [guess == answer for guess, answer in zip(per_byte, truth, strict=True)]
    found = {"questions": len(questions), **metrics(nats, truth), "accuracy_per_byte": float(np.mean(right))}
    shared = {each.choices for each in questions}
    if len(shared) == 1:
        found |= by_label(list(shared.pop()), truth, [int(each.argmax()) for each in nats])
    return found


def metrics(nats: list[np.ndarray], truth: list[int]) -> dict[str, Any]:
    """Return accuracy, and how well the probabilities of the chosen answers agree with how often they are right.

    Args:
        nats: for each question the log-likelihoods of its choices. truth: the place of the right one.
    """
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import accuracy_score, mean_squared_error

    shares = [np.exp(each - np.logaddexp.reduce(each)) for each in nats]
    guesses = [int(each.argmax()) for each in nats]
    confidence = np.array([each.max() for each in shares]).clip(0.0, 1.0)
    right = np.array([guess == answer for guess, answer in zip(guesses, truth, strict=True)])
    fractions, confidences = calibration_curve(right, confidence, n_bins=BINS)
    edges = np.linspace(0.0, 1.0, BINS + 1)[1:-1]
    counts = np.bincount(
        np.searchsorted(edges, confidence)
    )  # the bins of calibration_curve, which omits empty ones
    counts = counts[counts > 0]
    gaps = np.abs(fractions - confidences)
    likely = [
        max(float(each[answer]), np.finfo(float).tiny) for each, answer in zip(shares, truth, strict=True)
    ]
    return {
        "accuracy": float(accuracy_score(truth, guesses)),
        "log_loss": float(-np.log(likely).mean()),
        "brier_score": float(mean_squared_error(right, confidence)),
        "calibration_error": float((gaps * counts).sum() / counts.sum()),
        "calibration": [
            {"confidence": float(c), "accuracy": float(f), "questions": int(n)}
            for c, f, n in zip(confidences, fractions, counts, strict=True)
        ],
    }


def by_label(labels: list[str], truth: list[int], guesses: list[int]) -> dict[str, Any]:
    """Return precision, recall and F1 of each label and their means, and the confusion matrix."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    places = list(range(len(labels)))
    columns = precision_recall_fscore_support(truth, guesses, labels=places, zero_division=0.0)
    names = ("precision", "recall", "f1", "support")
    each = {
        label: {name: float(column[n]) for name, column in zip(names, columns, strict=True)}
        for n, label in enumerate(labels)
    }
    means = precision_recall_fscore_support(truth, guesses, labels=places, zero_division=0.0, average="macro")
    return {
        **{f"macro_{name}": float(value) for name, value in zip(names[:3], means[:3], strict=True)},
        "labels": each,
        "confusion": {
            "labels": labels,
            "rows_are_true": confusion_matrix(truth, guesses, labels=places).tolist(),
        },
    }
