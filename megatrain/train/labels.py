"""A classifier's labels, which its config may leave to the training data."""

import dataclasses
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.prepare import Prepared
from megatrain.data.store import TokenStore
from megatrain.train.config import Config


def settle_labels(cfg: Config, data: Prepared) -> tuple[Config, Prepared]:
    """Return `cfg` with the labels of its data in place of auto, and the data with its labels in the config's order.

    Raises:
        UserError: the data has labels that the config does not name, or of another kind, or too few.
    """
    classifier, store = cfg.model.classifier, data.train
    if classifier is None or not isinstance(store, TokenStore) or store.label_set is None:
        return cfg, data
    found = store.label_set
    is_multi = found.is_multi if classifier.multi_label == "auto" else classifier.multi_label
    if is_multi != found.is_multi:
        has = "lists of labels" if found.is_multi else "one label"
        raise UserError(
            f"model.classifier.multi_label={str(is_multi).lower()}, but the rows of the data have {has}"
        )
    names = found.names if classifier.labels == "auto" else classifier.labels
    if unknown := [name for name in found.names if name not in names]:
        listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UserError(f"The data has labels that model.classifier.labels does not name: {listed}")
    if len(names) < (1 if is_multi else 2):
        raise UserError(
            f"The data has {len(names)} label{'s' * (len(names) != 1)} ({', '.join(names) or 'none'}), and a "
            "classifier needs two at least. data.label_field names the field that holds them."
        )
    if isinstance(classifier.class_weights, tuple) and len(classifier.class_weights) != len(names):
        raise UserError(
            f"model.classifier.class_weights has {len(classifier.class_weights)} numbers, and there are {len(names)} "
            f"labels: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        )
    train = _in_order(store, names)
    settled = dataclasses.replace(classifier, labels=names, multi_label=is_multi)
    if classifier.class_weights == "balanced":
        settled = dataclasses.replace(settled, class_weights=_balanced(train, names, is_multi))
    model: Any = dataclasses.replace(cfg.model, classifier=settled)
    val = _in_order(data.val, names) if isinstance(data.val, TokenStore) else data.val
    return dataclasses.replace(cfg, model=model), dataclasses.replace(data, train=train, val=val)


def _in_order(store: TokenStore, names: tuple[str, ...]) -> TokenStore:
    """Return `store` with labels that are numbered as `names` are."""
    assert store.labels is not None
    assert store.label_set is not None
    if store.label_set.names == names:
        return store
    labels = store.label_set.renumbered(np.asarray(store.labels), names)
    return dataclasses.replace(
        store, labels=labels, label_set=dataclasses.replace(store.label_set, names=names)
    )


def _balanced(store: TokenStore, names: tuple[str, ...], is_multi: bool) -> tuple[float, ...]:
    """Return weights that make the classes count alike.

    With one label they are scikit-learn's: documents / (classes x documents of the class). With several, a label's
    positive documents count as much as its negative ones.

    Raises:
        UserError: a class has no document.
    """
    labels = np.asarray(store.labels)
    if is_multi:
        counts = ((labels[:, None] >> np.arange(len(names))) & 1).sum(0)
    else:
        counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        raise UserError(
            "model.classifier.class_weights=balanced: no training document has the label "
            f"{names[int(counts.argmin())]}. Give numbers, or leave that label out."
        )
    weights = (len(labels) - counts) / counts if is_multi else len(labels) / (len(names) * counts)
    # All documents may have a label: a factor of 0 would leave it without a loss.
    return tuple(float(weight) for weight in np.maximum(weights, 1e-3))
