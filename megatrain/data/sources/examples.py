"""Examples for supervised fine-tuning: a row as text in which the answers, which alone have a loss, are marked."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from megatrain.config.errors import UserError
from megatrain.data.labels import Label
from megatrain.data.sources.chat import Conversation, Message, NotTextError, TemplateError, conversation_of
from megatrain.data.sources.rows import CHAT_FIELDS, RowText, parsed, unicode_text

INSTRUCTION = ("instruction", "output")
PROMPT = ("prompt", "completion")
BESIDE = ("system", "tools", "input")
"""Fields that a row may have beside those that make it an example."""
FORMS = (
    "a row has `messages` or `conversations`; `instruction` and `output`; or `prompt` and `completion`. "
    "data.text_field names another field that holds a conversation; data.template and data.answer make prompt and "
    "answer from other fields"
)
Span = tuple[int, int]
"""Characters from the first to before the second; an end behind the text takes in the end-of-text token."""


class UnusableRowError(ValueError):
    """A row gives no example; the text says why."""


class Example(NamedTuple):
    """A text and the spans of its answers; `markup` as in `readers.Document`."""

    text: str
    answers: tuple[Span, ...]
    markup: bool
    label: Label | None = None


class RowExamples(RowText):
    """Makes the examples of rows. `template` and `answer`, given together, say what is asked and what is answered."""

    per_row = 1
    """How many examples belong together: they stay in one sample, and on one side of what is held out."""

    def __init__(
        self, field: str, template: str | None, answer: str | None, conversation: Conversation
    ) -> None:
        super().__init__(field, template, conversation)
        self._answer = None if answer is None else RowText(field, answer, conversation)
        if self.columns is not None and self._answer is not None and self._answer.columns is not None:
            self.columns = tuple(dict.fromkeys((*self.columns, *self._answer.columns)))

    def _wanted(self, names: list[str]) -> list[str]:
        if self.columns is not None:
            return super()._wanted(names)
        return [*self._form(names), *(name for name in BESIDE if name in names)]

    def _form(self, names: list[str]) -> tuple[str, ...]:
        """Return the fields of a row with the fields `names` that make it an example.

        Raises:
            KeyError: it has none.
        """
        chats = CHAT_FIELDS if self.field == "text" else (self.field,)
        forms = [*((name,) for name in chats), INSTRUCTION, PROMPT]
        found = next((form for form in forms if set(form) <= set(names)), None)
        if found is None:
            raise KeyError(self.field if self.field != "text" else "messages")
        return found

    def no_field(self, where: str, field: str, names: list[str]) -> UserError:
        """Return the error that a row or file gives no examples, with the fields that it has."""
        if self.columns is not None:
            return super().no_field(where, field, names)
        return UserError(
            f"{where} gives no examples (its fields: {', '.join(map(repr, names)) or 'none'}): {FORMS}"
        )

    def examples(self, row: Mapping[str, Any], where: str) -> list[Example]:
        """Return the examples of `row`: one, or one for each answer if the chat template rewrites earlier ones.

        Raises:
            UnusableRowError: it has none.
            UserError: a field that a template names is missing.
        """
        try:
            return self._examples(row, where)
        except TemplateError as error:
            raise UnusableRowError(f"the tokenizer's chat template can't render it: {error}") from None
        except NotTextError:
            raise UnusableRowError("conversation with parts that are not text") from None

    def _examples(self, row: Mapping[str, Any], where: str) -> list[Example]:
        if self._answer is not None:
            return [plain(super().__call__(row, where), self._answer(row, where))]
        try:
            form = self._form(list(row))
        except KeyError:
            raise UnusableRowError("neither a conversation, nor an instruction, nor a prompt") from None
        values = [parsed(row[name], name) for name in form]
        if any(value is None for value in values):
            raise UnusableRowError("null")
        if form == INSTRUCTION:
            return self._rendered(_from_instruction(row), row, where, first=0)
        if form == PROMPT and all(isinstance(value, str) for value in values):
            return [plain(*(unicode_text(v, name, where) for name, v in zip(form, values, strict=True)))]
        *before, last = (messages_of(value) for value in values)
        asked = [message for part in before for message in part]
        return self._rendered(asked + last, row, where, first=len(asked))

    def _rendered(
        self, messages: list[Message], row: Mapping[str, Any], where: str, *, first: int
    ) -> list[Example]:
        """Return the examples of a conversation, whose answers count from message number `first` on."""
        system, tools = row.get("system"), parsed(row.get("tools"), "messages")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages, first = [{"role": "system", "content": system}, *messages], first + 1
        answers = [n for n, each in enumerate(messages) if each["role"] == "assistant" and n >= max(first, 1)]
        if not answers:
            raise UnusableRowError("no answer of the assistant")
        if not any(messages[n]["content"].strip() or messages[n].get("tool_calls") for n in answers):
            raise UnusableRowError("empty answer")
        found = marked(self._conversation, messages, answers, tools=tools or None)
        for text, _ in found:
            unicode_text(text, "messages", where)
        return [Example(text, spans, self._conversation.source is not None) for text, spans in found]


def marked(
    conversation: Conversation, messages: list[Message], answers: list[int], *, tools: Any = None
) -> list[tuple[str, tuple[Span, ...]]]:
    """Return the text of a conversation with the spans of its messages `answers`, or a text for each of them.

    A template that has `{% generation %}` blocks says itself where its answers stand. Else an answer is what follows
    the prompt for it, as it is rendered in generation. Where the conversation does not begin with that (a template may
    drop earlier thoughts, or mark the last message), each answer is an example of its own, after its own prompt.

    Raises:
        UnusableRowError: an answer does not begin with its prompt.
        TemplateError: the template fails, or refuses these messages.
    """
    whole, own = conversation.text(messages, tools=tools)
    if own and answers[0] == next(n for n, m in enumerate(messages) if m["role"] == "assistant"):
        return [(whole, _to_the_end(conversation, whole, own))]
    heads = [conversation.text(messages[:n], tools=tools, asks=True)[0] for n in answers]
    upto = [conversation.text(messages[: n + 1], tools=tools)[0] for n in answers]
    for head, text in zip(heads, upto, strict=True):
        if not text.startswith(head) or len(text) == len(head):
            raise UnusableRowError(
                "the chat template renders another prompt before the answer than without it"
            )
    if all(whole.startswith(text) for text in upto):
        spans = tuple((len(head), len(text)) for head, text in zip(heads, upto, strict=True))
        return [(whole, _to_the_end(conversation, whole, spans))]
    return [
        (text, _to_the_end(conversation, text, ((len(head), len(text)),)))
        for head, text in zip(heads, upto, strict=True)
    ]


def _to_the_end(conversation: Conversation, text: str, spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Let the last span take in the end-of-text token if it ends the text, unless the template wrote that token."""
    begin, end = spans[-1]
    eos = conversation.eos
    if end < len(text.rstrip()) or (eos and text.rstrip().endswith(eos)):
        return spans
    return (*spans[:-1], (begin, len(text) + 1))


def plain(prompt: str | None, completion: str | None) -> Example:
    """Return the example of a text and what follows it, both as they are."""
    if not completion:
        raise UnusableRowError("null" if completion is None else "empty answer")
    prompt = prompt or ""
    return Example(prompt + completion, ((len(prompt), len(prompt) + len(completion) + 1),), False)


def _from_instruction(row: Mapping[str, Any]) -> list[Message]:
    """Return a row of Alpaca's form as a conversation."""
    instruction, context, output = (row.get(name) or "" for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (instruction, context, output)):
        raise UnusableRowError("a field that is not text")
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def messages_of(value: Any) -> list[Message]:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    messages = conversation_of(value)
    if messages is None:
        raise UnusableRowError("empty" if value == [] else "not a list of messages")
    return messages
