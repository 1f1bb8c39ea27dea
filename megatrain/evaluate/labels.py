"""Labelled texts: how well a classifier tells their labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.config.errors import UserError
from megatrain.data.labels import Label
from megatrain.data.sources.chat import Conversation
from megatrain.data.sources.corpus import find_corpus
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.readers import Document
from megatrain.data.tokenizer import Tokenizer
from megatrain.evaluate.choices import by_label, metrics
from megatrain.nn.image_config import ImageModelConfig
from megatrain.train.inference import TrainedModel
from megatrain.train.scoring import Scorer

DIGITS = "digits"
"""Name of scikit-learn's digits in place of a path of images."""
IMAGES = 256
"""Images that are classified at a time."""


@dataclass(frozen=True)
class Labelled:
    """Texts with their labels, and the labels that the model knows."""

    documents: list[Document]
    left_out: LeftOut
    labels: tuple[str, ...]
    is_multi: bool


def read_labelled(
    trained: TrainedModel,
    path: str,
    *,
    text_field: str,
    label_field: str,
    template: str | None,
    conversation: Conversation,
) -> Labelled:
    """Read labelled rows from `path`, which is as `data.path` takes it; the other arguments are as in `data`.

    Raises:
        UserError: the model is no classifier, there are no rows, or a label is none of the model's.
    """
    classifier = trained.cfg.model.classifier
    if classifier is None or classifier.labels == "auto":
        raise UserError(
            "evaluate: --labels needs a classifier: megatrain finetune RUN data=classify trains one"
        )
    images = trained.cfg.data.images if isinstance(trained.cfg.model, ImageModelConfig) else None
    corpus = find_corpus(
        None if images is not None and path == DIGITS else path,
        text_field=text_field,
        template=template,
        conversation=conversation,
        label_field=label_field,
        kind="classify" if images is None else "images",
        images=images,
    )
    left_out = LeftOut()
    documents = list(corpus.documents(left_out))
    if not documents:
        raise UserError(f"evaluate: --labels {path} has no labelled rows (left out: {left_out.details()})")
    is_multi = classifier.multi_label is True
    for document in documents:
        names = document.label if isinstance(document.label, tuple) else (str(document.label),)
        if isinstance(document.label, tuple) != is_multi:
            wants = "a list of labels" if is_multi else "one label"
            raise UserError(
                f"evaluate: {document.id}: the model gives each text {wants}, and this row has the other"
            )
        if unknown := [name for name in names if name not in classifier.labels]:
            known = ", ".join(classifier.labels)
            raise UserError(f"evaluate: {document.id}: the model has no label {unknown[0]!r}; it has {known}")
    return Labelled(documents, left_out, classifier.labels, is_multi)


def classify(
    scorer: Scorer, documents: Sequence[Document], *, progress: Callable[[str, float], None]
) -> Tensor:
    """Return a classifier's logits for each document, `(documents, classes)` float64."""
    texts = [document_tokens(scorer.trained.tokenizer, each.text, markup=each.markup) for each in documents]
    progress("classifying", 0.0)
    if isinstance(scorer.trained.cfg.model, ImageModelConfig):
        found = scorer.copies.share(texts, partial(_image_logits, scorer.trained))
        return torch.stack(found).double()
    return torch.stack(scorer.last_logits(texts)).double()


@torch.no_grad()
def _image_logits(trained: TrainedModel, images: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of each image, `(classes,)` on the CPU.

    Raises:
        UserError: the model is in a pipeline.
    """
    parallel = trained.parallel
    if parallel.pipeline is not None:
        raise UserError(
            "evaluate: --pp: a model of images is loaded whole, or with --tp, or in copies with --dp"
        )
    found: list[Tensor] = []
    for start in range(0, len(images), IMAGES):
        tokens = torch.tensor(images[start : start + IMAGES], device=parallel.device)
        found += parallel.models[0](tokens)[:, 0].cpu().unbind()
    return found


def document_tokens(tokenizer: Tokenizer, text: str, *, markup: bool = False) -> list[int]:
    """Return a document as it is in training: its tokens, and the one that ends it.

    Args:
        markup: whether special tokens that the text spells are meant as such.
    """
    ids = (tokenizer.encode_markup if markup else tokenizer.encode_batch)([text])[0]
    return [*ids.tolist(), tokenizer.eos_id]


def judge(found: Labelled, logits: Tensor) -> dict[str, Any]:
    """Return figures of the labels that `logits` `(documents, classes)` choose, and what was left out."""
    places = {name: n for n, name in enumerate(found.labels)}
    head = {"documents": len(found.documents), "left_out": found.left_out.total()}
    if not found.is_multi:
        truth = [places[str(each.label)] for each in found.documents]
        nats = list(logits.log_softmax(-1).numpy())
        facts = metrics(nats, truth) | by_label(list(found.labels), truth, logits.argmax(-1).tolist())
        return head | facts
    truth_of = np.zeros((len(found.documents), len(found.labels)), dtype=np.int64)
    for row, document in zip(truth_of, found.documents, strict=True):
        row[[places[name] for name in document.label or ()]] = 1
    return head | _several(list(found.labels), truth_of, logits.sigmoid().numpy())


def _several(labels: list[str], truth: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Return figures of any number of labels for each document.

    Args:
        truth: `(documents, classes)` 0 or 1. probabilities: alike.
    """
    from sklearn.metrics import accuracy_score, hamming_loss, precision_recall_fscore_support

    guesses = (probabilities > 0.5).astype(np.int64)
    columns = precision_recall_fscore_support(truth, guesses, zero_division=0.0)
    names = ("precision", "recall", "f1", "support")
    means = {
        kind: precision_recall_fscore_support(truth, guesses, zero_division=0.0, average=kind)
        for kind in ("micro", "macro")
    }
    return {
        "accuracy": float(accuracy_score(truth, guesses)),
        "hamming_loss": float(hamming_loss(truth, guesses)),
        "brier_score": float(np.square(probabilities - truth).mean()),
        **{
            f"{kind}_{name}": float(value)
            for kind, values in means.items()
            for name, value in zip(names[:3], values[:3], strict=True)
        },
        "labels": {
            label: {name: float(column[n]) for name, column in zip(names, columns, strict=True)}
            for n, label in enumerate(labels)
        },
    }


def predictions(found: Labelled, logits: Tensor) -> list[dict[str, Any]]:
    """Return for each document its true label, the one that is chosen, and the probability of each label."""
    shares = (logits.sigmoid() if found.is_multi else logits.softmax(-1)).tolist()
    rows = []
    for document, row in zip(found.documents, shares, strict=True):
        likely = dict(zip(found.labels, row, strict=True))
        best: Label = max(found.labels, key=lambda name: likely[name])
        if found.is_multi:
            best = tuple(name for name in found.labels if likely[name] > 0.5)
        rows.append({"id": document.id, "label": document.label, "predicted": best, "probabilities": likely})
    return rows
