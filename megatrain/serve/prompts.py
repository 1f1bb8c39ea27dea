"""Prompts in tokens: texts, tokens and conversations."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.data.sources.chat import Conversation, TemplateError, conversation_of, read_chat
from megatrain.data.tokenizer import Tokenizer
from megatrain.serve.errors import RefusedError
from megatrain.serve.schemas import Message
from megatrain.train.files import CONFIG_FILE, TOKENIZER
from megatrain.train.import_hf import read_end_tokens

LONG = 10_000
"""Characters from which on a text is made into tokens in another thread: the event loop would stand still."""
PARAGRAPH_ENDS = ("\n\nuser:", "\n\nsystem:")
"""Where there is no chat template, the answer ends before the next message."""
PROBE = "0"


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, and its text if it was one."""

    ids: tuple[int, ...]
    text: str


class Prompts:
    """Makes prompts for one model."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the chat template.

        Raises:
            UserError: it can't be read.
        """
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        is_run = (directory / CONFIG_FILE).is_file()
        self.conversation = Conversation(*read_chat(directory / TOKENIZER if is_run else directory))
        self.ends = frozenset() if is_run else read_end_tokens(directory)
        """Tokens that end a text, beside the tokenizer's."""
        self.chat_ends = self.ends | self._turn_end()
        self.chat_stops = PARAGRAPH_ENDS if self.conversation.source is None else ()

    async def of(self, value: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
        """Return the prompts of a request's field.

        Raises:
            RefusedError: there is no such token.
        """
        if isinstance(value, str):
            return [await self._of_text(value)]
        if isinstance(value[0], int):
            value = [value]
        return [await self._of_text(each) if isinstance(each, str) else self._of_ids(each) for each in value]

    async def of_chat(self, messages: list[Message]) -> Prompt:
        """Return the prompt for the assistant's next message.

        Raises:
            RefusedError: the chat template fails, or refuses these messages.
        """
        plain = conversation_of([message.model_dump(exclude_none=True) for message in messages])
        assert plain is not None
        try:
            text, _ = self.conversation.text(plain, asks=True)
        except TemplateError as error:
            raise RefusedError(
                400,
                f"The tokenizer's chat template refuses these messages: {error}",
                code="template_refuses",
                param="messages",
            ) from None
        if self.conversation.source is None:
            return await self._of_text(text)
        if len(text) <= LONG:
            found = self._markup(text)
        else:
            found = await asyncio.to_thread(self._markup, text)
        return Prompt(tuple(found), text)

    async def _of_text(self, text: str) -> Prompt:
        encode = self.tokenizer.encode
        try:
            ids = encode(text) if len(text) <= LONG else await asyncio.to_thread(encode, text)
        except UserError as error:
            raise RefusedError(400, str(error)) from None
        return Prompt(tuple(ids) or (self.tokenizer.eos_id,), text)

    def _of_ids(self, ids: list[int]) -> Prompt:
        if max(ids) >= self.vocab_size:
            raise RefusedError(
                400, f"There is no token {max(ids)}: the model has {self.vocab_size}.", code="no_such_token"
            )
        return Prompt(tuple(ids), self.tokenizer.decode(ids))

    def _markup(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode_markup([text])[0].tolist()
        return found

    def _turn_end(self) -> frozenset[int]:
        """Return the special token that the template writes after an answer, if there is one."""
        if self.conversation.source is None:
            return frozenset()
        asked = {"role": "user", "content": PROBE}
        try:
            head, _ = self.conversation.text([asked], asks=True)
            whole, _ = self.conversation.text([asked, {"role": "assistant", "content": PROBE}])
        except TemplateError:
            return frozenset()
        if not whole.startswith(head):
            return frozenset()
        after = self._markup(whole[len(head) :].removeprefix(PROBE))
        is_special = bool(after) and self.tokenizer.decode(after[:1]) == ""
        return frozenset(after[:1]) if is_special else frozenset()
