"""What answers say, for the OpenAPI schema; the fields are those of OpenAI's API."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length"]


class Answer(BaseModel):
    """An object with no other fields."""

    model_config = ConfigDict(extra="forbid")


class Usage(Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Answer):
    """The tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(Answer):
    """The continuations of the prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Answer):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class InputUsage(Answer):
    """Numbers of tokens of texts that are only read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    """The vector of one text: numbers, or in base64 as float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """The vectors of the texts, of length 1."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: InputUsage


class Class(Answer):
    """The choice for one text."""

    index: int
    label: str
    chosen: list[str]
    probs: list[float]
    logprobs: list[float]
    num_classes: int


class Classes(Answer):
    """The labels of the texts. `probs` are in the order of `labels`; their sum is 1 unless a text may have several."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Class]
    usage: InputUsage


class Model(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(Answer):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """An error."""

    error: ErrorDetail


class Health(Answer):
    """How the server is."""

    status: Literal["ready", "draining", "failed"]
