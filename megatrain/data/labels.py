"""The labels of documents: their names in a data set, and the integers that stand for them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatrain.config.errors import UserError
from megatrain.nn.config import MOST_LABELS

Label = str | tuple[str, ...]
"""What a document is labelled with: one name, or any number of them."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The names of a data set's labels, in order, and whether a document has any number of them and not one."""

    names: tuple[str, ...]
    is_multi: bool

    def value(self, label: Label) -> int:
        """Return the number of a label, or with several the integer of which they are bits."""
        if self.is_multi:
            return sum(1 << self.names.index(name) for name in label)
        assert isinstance(label, str)
        return self.names.index(label)

    def renumbered(self, values: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
        """Return `values` int64 as those of the same labels among `names`, which may be more, in another order."""
        places = np.array([names.index(name) for name in self.names], dtype=np.int64)
        if not self.is_multi:
            return places[values]
        bits = (values[:, None] >> np.arange(len(places))) & 1
        found: np.ndarray = (bits << places).sum(1)
        return found


def label_set(labels: Iterable[Label]) -> LabelSet:
    """Return the set of all names in `labels`; numbers in their names are in order of size.

    Raises:
        UserError: some documents have one label and others a list, or a list has too many names in all.
    """
    given = set(labels)
    kinds = {isinstance(label, tuple) for label in given}
    if len(kinds) > 1:
        raise UserError(
            "Some rows have a list of labels and others one label. Write lists everywhere, or nowhere."
        )
    is_multi = kinds == {True}
    found = {name for label in given for name in (label if isinstance(label, tuple) else (label,))}
    if is_multi and len(found) > MOST_LABELS:
        raise UserError(
            f"The rows have {len(found)} different labels in their lists, and at most {MOST_LABELS} can be told."
        )
    return LabelSet(tuple(sorted(found, key=_natural)), is_multi)


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() and part.isascii() else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]
