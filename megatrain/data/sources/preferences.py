"""Pairs of answers to one prompt, of which the first is preferred: a row as two examples."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.sources.examples import BESIDE, Example, RowExamples, UnusableRowError, messages_of, plain
from megatrain.data.sources.rows import parsed, unicode_text

PAIR = ("chosen", "rejected")
FORMS = (
    "a row has `chosen` and `rejected`, and with `prompt` what both answer: texts, or conversations. Without a prompt "
    "they are conversations, which may begin alike"
)


class RowPairs(RowExamples):
    """Makes two examples of each row: the answer that was chosen, and the one that was rejected."""

    per_row = 2

    def _wanted(self, names: list[str]) -> list[str]:
        for name in PAIR:
            if name not in names:
                raise KeyError(name)
        return [*(name for name in ("prompt", *PAIR) if name in names), *(n for n in BESIDE if n in names)]

    def no_field(self, where: str, field: str, names: list[str]) -> UserError:
        """Return the error that a row or file gives no pairs, with the fields that it has."""
        listed = ", ".join(map(repr, names)) or "none"
        return UserError(f"{where} gives no pairs of answers (its fields: {listed}): {FORMS}")

    def _examples(self, row: Mapping[str, Any], where: str) -> list[Example]:
        try:
            self.wanted(list(row))
        except KeyError:
            raise UnusableRowError("no chosen and rejected answer") from None
        prompt, *answers = (parsed(row.get(name), "messages") for name in ("prompt", *PAIR))
        if any(answer is None for answer in answers):
            raise UnusableRowError("null")
        if all(isinstance(answer, str) for answer in answers):
            made = self._of_texts(prompt, answers, row, where)
        else:
            made = self._of_conversations(prompt, answers, row, where)
        if made[0].text == made[1].text:
            raise UnusableRowError("chosen and rejected answer are the same")
        return made

    def _of_texts(self, prompt: Any, answers: list[Any], row: Mapping[str, Any], where: str) -> list[Example]:
        if prompt is None:
            raise UnusableRowError("texts without a prompt")
        texts = [unicode_text(each, name, where) for each, name in zip(answers, PAIR, strict=True)]
        if isinstance(prompt, str):
            return [plain(unicode_text(prompt, "prompt", where), text) for text in texts]
        asked = messages_of(prompt)
        return [
            example
            for text in texts
            for example in self._rendered(
                [*asked, {"role": "assistant", "content": text}], row, where, first=len(asked)
            )[-1:]
        ]

    def _of_conversations(
        self, prompt: Any, answers: list[Any], row: Mapping[str, Any], where: str
    ) -> list[Example]:
        asked = [] if prompt is None else messages_of(prompt)
        both = [[*asked, *messages_of(answer)] for answer in answers]
        alike = 0  # a prompt without a field of its own: what both conversations begin with
        while alike < min(map(len, both)) and both[0][alike] == both[1][alike]:
            alike += 1
        if not alike:
            raise UnusableRowError("conversations that do not begin alike")
        return [self._rendered(each, row, where, first=max(alike, len(asked)))[-1] for each in both]
