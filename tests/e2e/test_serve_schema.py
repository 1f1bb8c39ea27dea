"""Requests drawn at random from the server's OpenAPI schema: valid ones are answered, wrong ones are refused."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from numerics.test_export import make_run
from numerics.test_huggingface_parity import MODELS
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import Served

SETTINGS = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
LIMITS = {
    "context_length_exceeded",
    "too_many_tokens",
    "no_such_token",
    "model_not_found",
    "queue_full",
    "unsupported",
    "conflict",
    "too_many_texts",
}
"""Reasons to refuse what a schema can't exclude."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = replace(MODELS["qwen3"], max_seq_len=64)
    with Served(make_run(tmp_path_factory.mktemp("made") / "tiny", model, seq_len=64)) as served:
        yield served


@pytest.fixture(scope="module")
def schema(server: Served) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())


OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/classify"),
]


def test_every_operation_is_tried(schema: Any) -> None:
    found = [
        (operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()
    ]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(
    schema: Any, server: Served, method: str, path: str, mode: GenerationMode
) -> None:
    """With the model's own name, or else hardly any request would reach more than that check."""

    @given(case=schema[path][method].as_strategy(generation_mode=mode), knows=booleans())
    @SETTINGS
    def check(case: Case, knows: bool) -> None:
        if knows and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = server.model
        response = case.call(base_url=server.url)
        is_json = "json" in str(response.headers.get("content-type"))
        code = (response.json().get("error") or {}).get("code") if is_json else None
        case.validate_response(response, excluded_checks=[positive_data_acceptance] if code in LIMITS else [])

    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # there is nothing that could be wrong
    check()
