"""Examples for classification: a row as a text with its label, or its labels."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.labels import Label
from megatrain.data.sources.chat import Conversation
from megatrain.data.sources.examples import Example, RowExamples, UnusableRowError
from megatrain.data.sources.rows import RowText

WHOLE = re.compile(r"-?\d+\.0+")
"""A whole number as a table of text may have it."""


class RowLabels(RowExamples):
    """Makes the labelled texts of rows: `field` or `template` says the text, `label_field` the label."""

    def __init__(
        self, field: str, template: str | None, label_field: str, conversation: Conversation
    ) -> None:
        super().__init__(field, template, None, conversation)
        self.label_field = label_field

    def _wanted(self, names: list[str]) -> list[str]:
        text = RowText._wanted(self, names)
        if self._label_name(names) not in names:
            raise KeyError(self.label_field)
        return [*text, self._label_name(names)]

    def _label_name(self, names: list[str]) -> str:
        return "labels" if self.label_field == "label" and "label" not in names else self.label_field

    def no_field(self, where: str, field: str, names: list[str]) -> UserError:
        """Return the error that a row or file has no text or no label, with the fields that it has."""
        if field in (self.label_field, "labels"):
            listed = ", ".join(map(repr, names)) or "none"
            return UserError(
                f"{where} has no field {self.label_field!r} (its fields: {listed}); data.label_field names the one "
                "that holds the label"
            )
        return RowText.no_field(self, where, field, names)

    def _examples(self, row: Mapping[str, Any], where: str) -> list[Example]:
        try:
            *_, name = self.wanted(list(row))
        except KeyError as missing:
            raise self.no_field(where, missing.args[0], list(row)) from None
        text = RowText.__call__(self, row, where)
        if not text:
            raise UnusableRowError("null" if text is None else "empty")
        return [Example(text, (), RowText.is_markup(self, row), _label(row[name]))]


def _label(value: Any) -> Label:
    """Return the label, or the labels, that a row's field holds; a list that is written as JSON, as in CSV, too."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list | tuple):
        return tuple(sorted({_name(each) for each in value}))
    return _name(value)


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and (name := value.strip()):
        if name in ("True", "False"):  # as a table of text has what JSON calls true
            return name.lower()
        return name.partition(".")[0] if WHOLE.fullmatch(name) else name
    raise UnusableRowError("no label" if value in (None, "") or value != value else "a label that is no name")
