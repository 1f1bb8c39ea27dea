"""The text of a row: one of its fields, a template over several, or a conversation."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.sources.chat import Conversation, conversation_of
from megatrain.data.template import template_parts

CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields that hold a conversation in the usual chat files, tried when a row lacks the field `text`."""


class RowText:
    """Makes the text of rows, which are mappings of field names to values.

    `field` is the field that holds the text; `template`, if given, says it instead: text with `{field}` in it. A
    conversation is rendered by `conversation`.
    """

    def __init__(self, field: str, template: str | None, conversation: Conversation) -> None:
        self.field, self.template, self._conversation = field, template, conversation
        self._parts = None if template is None else template_parts(template)
        self.columns = (
            None if self._parts is None else tuple(dict.fromkeys(name for _, name in self._parts if name))
        )

    def wanted(self, names: list[str]) -> list[str]:
        """Return those of the columns `names` that the text is made from.

        Raises:
            KeyError: they lack a field that is needed, or have it twice.
        """
        found = self._wanted(names)
        for name in found:
            if names.count(name) > 1:
                raise KeyError(name)
        return found

    def _wanted(self, names: list[str]) -> list[str]:
        if self.columns is not None:
            for name in self.columns:
                if name not in names:
                    raise KeyError(name)
            return list(self.columns)
        if self.field in names:
            return [self.field]
        chat = next((name for name in CHAT_FIELDS if name in names), None) if self.field == "text" else None
        if chat is None:
            raise KeyError(self.field)
        return [chat]

    def __call__(self, row: Mapping[str, Any], where: str) -> str | None:
        """Return the text of `row`; None if it is null.

        Raises:
            UserError: a field is missing or holds no text; names the place `where` and the row's fields.
            NotTextError: it is a conversation with parts that are not text.
        """
        try:
            names = self.wanted(list(row))
        except KeyError as missing:
            raise self.no_field(where, missing.args[0], list(row)) from None
        if self._parts is None:
            return self._value(row[names[0]], names[0], where, system=row.get("system"))
        if all(row[name] is None for name in names):
            return None
        return "".join(
            literal + ("" if name is None else self._value(row[name], name, where, number_too=True) or "")
            for literal, name in self._parts
        )

    def no_field(self, where: str, field: str, names: list[str]) -> UserError:
        """Return the error that a row or file has no such field; `names` are those that it has."""
        return no_field(where, field, names)

    def is_markup(self, row: Mapping[str, Any]) -> bool:
        """Return whether the text of `row` comes from a chat template, whose special tokens are meant as such."""
        if self._conversation.source is None or self._parts is not None:
            return False
        field = self.wanted(list(row))[0]
        return not isinstance(parsed(row[field], field), str)

    def _value(
        self, value: Any, field: str, where: str, *, number_too: bool = False, system: Any = None
    ) -> str | None:
        value = parsed(value, field)
        if value is None:
            return None
        if value == []:
            return ""
        if isinstance(value, str):
            return unicode_text(value, field, where)
        if number_too and isinstance(value, int | float):
            return str(value)
        messages = conversation_of(value)
        if messages is not None:
            if isinstance(system, str) and system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            return unicode_text(self._conversation.render(messages, where), field, where)
        kind = type(value).__name__
        raise UserError(
            f"{where}: field {field!r} holds {kind}, not text; set data.text_field, or data.template"
        )


def parsed(value: Any, field: str) -> Any:
    """Return the value of a row's field; a conversation that is written as JSON, as in CSV, is parsed."""
    if isinstance(value, str) and field in CHAT_FIELDS and value.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def unicode_text(text: str, field: str, where: str) -> str:
    """Return `text` if it can be encoded.

    Raises:
        UserError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not Unicode text: {error.reason}") from None
    return text


def no_field(where: str, field: str, names: list[str]) -> UserError:
    """Return the error that a row or file has no such field, with the names that it has."""
    fields = ", ".join(map(repr, names)) or "none"
    if names.count(field) > 1:
        return UserError(
            f"{where} has {names.count(field)} fields of the name {field!r} (its fields: {fields}); rename one"
        )
    advice = "set data.text_field"
    if len(names) > 1:
        shown = json.dumps("".join(f"{{{name}}}\\n" for name in names[:3])).strip('"').replace("\\\\", "\\")
        advice += f", or make the text from several, as in 'data.template={shown}'"
    return UserError(f"{where} has no field {field!r} (its fields: {fields}); {advice}")
