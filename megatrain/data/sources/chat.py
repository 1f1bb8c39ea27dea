"""Conversations as text: through the tokenizer's own chat template, or as plain paragraphs."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from megatrain.config.errors import UserError
from megatrain.data.config import TokenizerConfig

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""ShareGPT's names of the roles, and others that are seen, by the usual ones."""
TEMPLATE_FILE = "chat_template.jinja"
BEGIN, END = "\ufdd0", "\ufdd1"
"""Marks of what a template says is generated: code points that Unicode reserves for use inside of programs."""
Message = dict[str, Any]
"""A message: its `role`, its `content` as text, and further entries such as `tool_calls` as they are."""


class NotTextError(ValueError):
    """A conversation has parts that are not text, such as images."""


class TemplateError(ValueError):
    """A chat template fails, or refuses the messages."""


class Conversation:
    """Renders conversations. `source` is the text of a Jinja chat template; None: plain paragraphs `role: content`."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special = special_tokens

    @property
    def eos(self) -> str:
        """The end-of-text token as the template may write it; empty without a template."""
        return self._special.get("eos_token", "")

    def render(self, messages: list[Message], where: str) -> str:
        """Return the text of one conversation.

        Raises:
            UserError: the template fails, or refuses these messages.
        """
        try:
            return self.text(messages)[0]
        except TemplateError as error:
            raise UserError(f"{where}: the tokenizer's chat template can't render it: {error}") from None

    def text(
        self, messages: list[Message], *, tools: Any = None, asks: bool = False
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return the text of a conversation, and where the template's own `{% generation %}` blocks stand in it.

        Args:
            tools: what the assistant may call, for the template. asks: end with what comes before an answer.

        Raises:
            TemplateError: the template fails, or refuses these messages.
        """
        if self.source is None:
            asked = [{"role": "assistant", "content": ""}] if asks else []
            said = (f"{message['role']}: {_with_calls(message)}" for message in (*messages, *asked))
            return "\n\n".join(said), ()
        try:
            text = _compiled(self.source)(
                messages=messages, tools=tools, add_generation_prompt=asks, **self._special
            )
        except Exception as error:  # a template may fail in any way
            raise TemplateError(str(error)) from None
        return _without_marks(text)


PARAGRAPHS = Conversation(None, {})
"""Renders without a chat template."""


def conversation_of(value: Any) -> list[Message] | None:
    """Return the messages of a conversation as chat files hold it; None if `value` is none.

    Read are OpenAI's form (`role`, `content`, the latter a text or a list of parts) and ShareGPT's (`from`, `value`).

    Raises:
        NotTextError: one of the parts is not text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return None
    messages = []
    for each in value:
        role = each.get("role", each.get("from"))
        content = each.get("content", each.get("value"))
        if isinstance(content, list):
            content = "".join(map(_text_of, content))
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        others = {
            key: entry for key, entry in each.items() if key not in ("from", "value") and entry is not None
        }
        messages.append(others | {"role": ROLES.get(role, role), "content": content or ""})
    return messages


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise NotTextError
    return text


def _with_calls(message: Message) -> str:
    """Return the content of a message, and the calls of tools in it as JSON."""
    calls = message.get("tool_calls") or message.get("function_call")
    if not calls:
        return str(message["content"])
    written = json.dumps(calls, ensure_ascii=False, default=str)
    return f"{message['content']}\n{written}" if message["content"] else written


def read_conversation(cfg: TokenizerConfig) -> Conversation:
    """Return the renderer of the tokenizer that `cfg` names.

    Raises:
        UserError: its files can't be read.
    """
    if cfg.kind != "huggingface" or not cfg.path:
        return PARAGRAPHS
    source, special = read_chat(Path(cfg.path) if Path(cfg.path).is_dir() else Path(cfg.path).parent)
    return Conversation(source, special)


def read_chat(directory: Path) -> tuple[str | None, dict[str, str]]:
    """Return the chat template of the tokenizer in a Hugging Face directory, if it has one, and its special tokens.

    Raises:
        UserError: its files can't be read.
    """
    try:
        described = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = directory / TEMPLATE_FILE
        source = file.read_text(encoding="utf-8") if file.is_file() else described.get("chat_template")
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: the tokenizer's chat template can't be read: {error}") from None
    if isinstance(source, list):  # several, by name
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = described.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        special[key] = text if isinstance(text, str) else ""
    return source if isinstance(source, str) else None, special


def _without_marks(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without the marks of `{% generation %}` blocks, and the spans between them."""
    pieces = re.split(f"[{BEGIN}{END}]", text)
    if len(pieces) == 1:
        return text, ()
    ends = list(accumulate(map(len, pieces)))
    return "".join(pieces), tuple(zip(ends[:-1:2], ends[1::2], strict=False))


@lru_cache(maxsize=8)
def _compiled(source: str) -> Callable[..., str]:
    """Compile a chat template with the names that transformers gives to it, in Jinja's sandbox."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what a template writes between `{% generation %}` and `{% endgeneration %}`."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> nodes.Node:
            """Parse a block."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{BEGIN}{caller()}{END}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = _refuse
    # Any date would do; the same one every time keeps the tokens equal.
    environment.globals["strftime_now"] = lambda form: datetime(2024, 7, 26).strftime(form)
    return environment.from_string(source).render


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
