"""The two forms in which generated text is sent: completions, and messages of the assistant."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from megatrain.data.tokenizer import Tokenizer
from megatrain.models.generate import Produced
from megatrain.serve.limits import MAX_TEXTS
from megatrain.train.generation import Continuation


class Format(ABC):
    """Writes the answers to one request."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: int | None, with_usage: bool) -> None:
        """Take what all parts of the answer say.

        Args:
            logprobs: as in `Request`. with_usage: whether chunks say `usage`, which is null in all but the last one.
        """
        self.tokenizer = tokenizer
        self.logprobs = logprobs
        self.with_usage = with_usage
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        head = json.dumps({"object": self.chunk, **self.head}, separators=(",", ":"))
        usage = b',"usage":null' if with_usage else b""
        self._before = b"data: " + head[:-1].encode() + usage + b',"choices":['
        self._said = [0] * MAX_TEXTS
        """Characters of each text whose tokens have been written, for the offsets of further ones."""

    def complete(self, texts: Sequence[Continuation], usage: dict[str, int]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [self.choice(index, text) for index, text in enumerate(texts)]
        return {"object": self.whole, **self.head, "choices": choices, "usage": usage}

    def event(self, index: int, text: str, produced: Sequence[Produced], finish: str) -> bytes:
        """Return what has been added to a text as an event."""
        return self._before + self.delta(index, text, produced, finish).encode() + b"]}\n\n"

    def usage_event(self, usage: dict[str, int]) -> bytes:
        """Return the last event, with the numbers of tokens."""
        data = {"object": self.chunk, **self.head, "choices": [], "usage": usage}
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    def opening(self, index: int, text: Continuation) -> bytes:
        """Return the event with which a text begins, if there is one."""
        return b""

    @abstractmethod
    def choice(self, index: int, text: Continuation) -> dict[str, Any]:
        """Return a whole text."""

    @abstractmethod
    def delta(self, index: int, text: str, produced: Sequence[Produced], finish: str) -> str:
        """Return what has been added to a text, as JSON."""

    def token(self, token: int) -> str:
        """Return the text of one token."""
        return self.tokenizer.decode([token])


class CompletionFormat(Format):
    """Texts that continue a prompt."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any, echoes: bool, **options: Any) -> None:
        """Take what `Format` takes, and whether texts begin with their prompts."""
        super().__init__(*arguments, **options)
        self.echoes = echoes

    def opening(self, index: int, text: Continuation) -> bytes:
        return self.event(index, text.request.prompt, (), "") if self.echoes else b""

    def choice(self, index: int, text: Continuation) -> dict[str, Any]:
        return {
            "index": index,
            "text": (text.request.prompt if self.echoes else "") + text.text,
            "logprobs": self._logs(index, text.produced),
            "finish_reason": text.finish,
        }

    def delta(self, index: int, text: str, produced: Sequence[Produced], finish: str) -> str:
        return (
            f'{{"index":{index},"text":{json.dumps(text)},"logprobs":{json.dumps(self._logs(index, produced))},'
            f'"finish_reason":{json.dumps(finish or None)}}}'
        )

    def _logs(self, index: int, produced: Sequence[Produced]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in produced:
            if each.token is None:
                continue
            text = self.token(each.token)
            found["tokens"].append(text)
            found["token_logprobs"].append(each.logprob)
            found["top_logprobs"].append({self.token(token): log for token, log in each.top})
            found["text_offset"].append(self._said[index])
            self._said[index] += len(text)
        return found


class ChatFormat(Format):
    """Messages of the assistant."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int, text: Continuation) -> bytes:
        delta = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._before + json.dumps(delta).encode() + b"]}\n\n"

    def choice(self, index: int, text: Continuation) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text.text, "refusal": None},
            "logprobs": self._logs(text.produced),
            "finish_reason": text.finish,
        }

    def delta(self, index: int, text: str, produced: Sequence[Produced], finish: str) -> str:
        delta = f'{{"content":{json.dumps(text)}}}' if text or not finish else "{}"
        return (
            f'{{"index":{index},"delta":{delta},"logprobs":{json.dumps(self._logs(produced))},'
            f'"finish_reason":{json.dumps(finish or None)}}}'
        )

    def _logs(self, produced: Sequence[Produced]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [
            {
                **self._one(each.token, each.logprob),
                "top_logprobs": [self._one(token, log) for token, log in each.top],
            }
            for each in produced
            if each.token is not None
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, log: float | None) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": log, "bytes": list(text.encode())}
