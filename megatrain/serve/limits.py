"""What a server takes on, and for how long."""

from dataclasses import dataclass

MAX_TEXTS = 128
"""Prompts of one request times the answers to each; also the texts to be embedded, and the choices of a question."""
MAX_LOGPROBS = 20
"""Likeliest tokens beside each, as in OpenAI's API."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server."""

    batch: int = 256
    """Texts that are generated at the same time."""
    queue: int = 256
    """Texts that may wait beside them; a request that would be one more is refused."""
    max_tokens: int | None = None
    """Most tokens of an answer; None: what the model's context has room for."""
    body_bytes: int = 4 << 20
    """Most bytes of a request."""
    read_seconds: float = 30.0
    """Time in which a request must have arrived: its headers, and then its body."""
    request_seconds: float = 600.0
    """Time after which a request is given up."""
    drain_seconds: float = 60.0
    """Time that requests under way have after the signal to stop."""

    @property
    def texts(self) -> int:
        """Texts that may run or wait."""
        return self.batch + self.queue
