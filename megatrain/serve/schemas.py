"""What requests may say: the parts of OpenAI's API that are understood here, and nothing else.

An unknown parameter is refused and never dropped. One of OpenAI's that has no effect here may be given with the value
that has none.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megatrain.serve.limits import MAX_LOGPROBS, MAX_TEXTS


def _whole(value: Any) -> Any:
    """Return an integer for a number such as 3.0, which is one in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Token = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Count = Annotated[int, Field(ge=1, lt=2**31), WHOLE]
Answers = Annotated[int, Field(ge=1, le=MAX_TEXTS), WHOLE]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**63), WHOLE]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
Text = Annotated[str, Field(max_length=1 << 20)]
Ids = Annotated[list[Token], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
ManyIds = Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Choice = Annotated[str, Field(min_length=1, max_length=10_000)]


class Strict(BaseModel):
    """An object whose fields are all known, and of the type that they say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Options of streaming."""

    include_usage: bool = Field(False, description="Send the numbers of tokens in a last chunk.")


class Generating(Strict):
    """What both ways of generating text take."""

    model: str = Field(description="Name of the model, as `GET /v1/models` says it.")
    stream: bool | None = Field(False, description="Send the text as it grows, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Answers | None = Field(1, description="Answers to each prompt.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: the likeliest token, always.")
    top_p: float | None = Field(1.0, gt=0, le=1, description="Total probability of the tokens to draw from.")
    top_k: Count | None = Field(None, description="Draw from the k likeliest tokens.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Draw from tokens with this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        1.0, ge=0.01, le=100, description="Makes tokens that the text has already less likely; 1: not."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts before which an answer ends."
    )
    seed: Seed | None = Field(
        None, description="Of the random numbers of the first answer; plus 1 for each further one."
    )
    presence_penalty: float | None = Field(None, ge=0, le=0, description="Only 0; see repetition_penalty.")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="Only 0; see repetition_penalty.")
    user: str | None = Field(None, description="Accepted, and without effect.")


class CompletionRequest(Generating):
    """A prompt that is to be continued."""

    prompt: Text | Texts | Ids | ManyIds = Field(
        description="A text, a list of texts, a list of tokens, or a list of such lists."
    )
    max_tokens: Count | None = Field(16)
    logprobs: Logprobs | None = Field(None, description="Likeliest tokens beside each.")
    echo: bool | None = Field(
        False, description="Begin the text with the prompt; not together with logprobs."
    )
    best_of: One | None = Field(None, description="Only 1.")


class ContentPart(Strict):
    """A part of a message."""

    type: Literal["text"] = Field(description="Only text is understood.")
    text: Text


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=1000)]
    name: str | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text"] = Field(description="Only text.")


class ChatRequest(Generating):
    """A conversation that is to be continued by the assistant."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Count | None = Field(None, description="As max_completion_tokens.")
    max_completion_tokens: Count | None = Field(
        None, description="Most tokens of an answer; default: what the model has room for."
    )
    logprobs: bool | None = False
    top_logprobs: Logprobs | None = Field(None, description="With logprobs: likeliest ones.")
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Strict):
    """Texts of which vectors are wanted."""

    model: str
    input: Text | Texts | Ids | ManyIds
    encoding_format: Literal["float", "base64"] | None = "float"
    user: str | None = Field(None, description="Accepted, and without effect.")


class ClassifyRequest(Strict):
    """Texts of which each is to get one of several labels."""

    model: str
    input: Text | Texts
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MAX_TEXTS)] | None = Field(
        None, description="What may follow the text; the likeliest is the label."
    )
