"""Conversations as text: through the tokenizer's own chat template, or as plain paragraphs."""

import json
from collections.abc import Callable
from datetime import datetime
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
Message = dict[str, Any]
"""A message: its `role`, its `content` as text, and further entries such as `tool_calls` as they are."""


class NotTextError(ValueError):
    """A conversation has parts that are not text, such as images."""


class Conversation:
    """Renders conversations. `source` is the text of a Jinja chat template; None: plain paragraphs `role: content`."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special = special_tokens
        self._render: Callable[..., str] | None = None

    def render(self, messages: list[Message], where: str) -> str:
        """Return the text of one conversation.

        Raises:
            UserError: the template fails, or refuses these messages.
        """
        if self.source is None:
            return "\n\n".join(f"{message['role']}: {_with_calls(message)}" for message in messages)
        if self._render is None:
            self._render = _compiled(self.source)
        try:
            return self._render(messages=messages, add_generation_prompt=False, **self._special)
        except Exception as error:  # a template may fail in any way
            raise UserError(f"{where}: the tokenizer's chat template can't render it: {error}") from None


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
    directory = Path(cfg.path) if Path(cfg.path).is_dir() else Path(cfg.path).parent
    try:
        described = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = directory / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else described.get("chat_template")
    except FileNotFoundError:
        return PARAGRAPHS
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: the tokenizer's chat template can't be read: {error}") from None
    if isinstance(source, list):  # several, by name
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = described.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        special[key] = text if isinstance(text, str) else ""
    return Conversation(source if isinstance(source, str) else None, special)


def _compiled(source: str) -> Callable[..., str]:
    """Compile a chat template with the names that transformers gives to it, in Jinja's sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = _refuse
    # Any date would do; the same one every time keeps the tokens equal.
    environment.globals["strftime_now"] = lambda form: datetime(2024, 7, 26).strftime(form)
    return environment.from_string(source).render


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
