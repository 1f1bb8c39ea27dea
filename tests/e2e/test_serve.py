"""`megatrain serve` as clients see it: OpenAI's own, many at a time, wrong ones, slow ones, and ones that leave."""

import asyncio
import base64
import json
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from numerics.test_export import exported, make_run
from numerics.test_huggingface_parity import MODELS
from prometheus_client.parser import text_string_to_metric_families
from served import SECONDS, Served, events
from transformers import AutoModel, AutoTokenizer

from megatrain.cli.main import main
from megatrain.models.sampling import Sampling
from megatrain.runtime.processes import Processes
from megatrain.train.generation import Continuation, TextRequest, continue_texts
from megatrain.train.inference import TrainedModel, load_trained

CONTEXT = 1024
PROMPT = "the square of"
KEY = "a-key-for-the-tests"
LONG = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
"""A text that does not end before: several seconds of work, unless others share it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = replace(MODELS["qwen3"], max_seq_len=CONTEXT)
    return make_run(tmp_path_factory.mktemp("made") / "tiny", model, precision="fp64", seq_len=CONTEXT)


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return load_trained(run, Processes())


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Served]:
    with Served(run) as served:
        yield served


@pytest.fixture(scope="module")
def small(run: Path) -> Iterator[Served]:
    """One text at a time, one that waits, small and quick requests, and a key."""
    flags = (
        "--batch",
        "1",
        "--queue",
        "1",
        "--body-mib",
        "0.01",
        "--read-seconds",
        "1",
        "--max-tokens",
        "900",
    )
    with Served(run, *flags, env={"MEGATRAIN_API_KEYS": f"another-key-of-them,{KEY}"}) as served:
        served.client.headers["Authorization"] = f"Bearer {KEY}"
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def alone(trained: TrainedModel, **asked: Any) -> Continuation:
    """What one request gives by itself."""
    *_, (_, _, text) = continue_texts(
        trained.packed(), trained.tokenizer, [TextRequest(**asked)], context=trained.context, max_batch=1
    )
    return text


def test_completions(client: openai.OpenAI, trained: TrainedModel) -> None:
    found = client.completions.create(
        model="tiny", prompt=[PROMPT, "number"], max_tokens=9, n=2, seed=5, temperature=0.9, top_p=0.8, logprobs=2,
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2},
    )  # fmt: skip
    read = 0
    for place, choice in enumerate(found.choices):
        prompt = (PROMPT, "number")[place // 2]
        how = Sampling(
            seed=5 + place % 2, temperature=0.9, top_p=0.8, top_k=50, min_p=0.01, repetition_penalty=1.2
        )
        expected = alone(trained, prompt=prompt, tokens=9, sampling=how, logprobs=2)
        assert (choice.index, choice.text, choice.finish_reason) == (place, expected.text, expected.finish)
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx([each.logprob for each in expected.produced])
        assert max(map(len, choice.logprobs.top_logprobs or [])) == 2
        read += len(trained.tokenizer.encode(prompt)) * (place % 2)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (read, 36)
    assert found.model == "tiny"


def test_streams_are_what_is_answered_at_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "seed": 1, "n": 3}
    whole = client.completions.create(**asked)
    texts = {0: "", 1: "", 2: ""}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 20


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(
    client: openai.OpenAI, trained: TrainedModel
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:12]
    found = client.completions.create(**asked, stop=[stop, "never said"]).choices[0]
    assert (found.text, found.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(
        each.choices[0].text for each in client.completions.create(**asked, stop=stop, stream=True)
    )
    assert streamed == found.text
    assert (
        alone(trained, prompt=PROMPT, tokens=40, sampling=Sampling(temperature=0), stop=(stop,)).text
        == found.text
    )


def test_prompts_in_tokens_and_with_echo(client: openai.OpenAI, trained: TrainedModel) -> None:
    ids = trained.tokenizer.encode(PROMPT)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    text = client.completions.create(**asked, prompt=PROMPT).choices[0].text
    assert client.completions.create(**asked, prompt=ids).choices[0].text == text
    both = client.completions.create(**asked, prompt=[ids, ids], echo=True).choices
    assert [choice.text for choice in both] == [PROMPT + text] * 2
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(**asked, prompt=ids, echo=True, logprobs=1)


def test_chat_without_a_template(client: openai.OpenAI, trained: TrainedModel) -> None:
    messages: Any = [
        {"role": "system", "content": "square"},
        {"role": "user", "content": [{"type": "text", "text": "of the number"}]},
    ]
    expected = alone(
        trained,
        prompt="system: square\n\nuser: of the number\n\nassistant: ",
        tokens=12,
        sampling=Sampling(temperature=0),
        logprobs=3,
    )
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "max_completion_tokens": 12,
    }
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    logs = found.choices[0].logprobs
    assert logs is not None
    assert [each.logprob for each in logs.content or []] == pytest.approx(
        [each.logprob for each in expected.produced]
    )
    assert all(len(each.top_logprobs) == 3 for each in logs.content or [])
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI, server: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "megatrain")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")
    assert server.client.get("/health").json() == {"status": "ready"}


def test_embeddings_are_transformers_hidden_states(client: openai.OpenAI, run: Path, tmp_path: Path) -> None:
    texts = ["the square", "of the number of the square", "x"]
    exported(run, tmp_path / "exported", average=True)
    model, tokenizer = (
        AutoModel.from_pretrained(tmp_path / "exported"),
        AutoTokenizer.from_pretrained(tmp_path / "exported"),
    )
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(
                torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            ).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    found = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    np.testing.assert_allclose([each.embedding for each in found.data], expected, atol=1e-5)
    packed = (
        client.embeddings.create(model="tiny", input=texts[0], encoding_format="base64").data[0].embedding
    )
    assert isinstance(packed, str)
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), expected[0], atol=1e-5)
    ids = tokenizer(texts[1], add_special_tokens=False).input_ids
    assert client.embeddings.create(model="tiny", input=ids).data[0].embedding == pytest.approx(
        found.data[1].embedding, abs=1e-6
    )


def test_the_likeliest_choice_is_the_label(server: Served, trained: TrainedModel) -> None:
    choices, texts = [" of", " number", " the square"], ["the square", "the"]
    found = server.post("classify", {"input": texts, "choices": choices}).json()["data"]
    encode = trained.tokenizer.encode
    for text, row in zip(texts, found, strict=True):
        nats = []
        for choice in choices:
            before, whole = encode(text), encode(text + choice)
            with torch.no_grad():
                logs = trained.parallel.models[0](torch.tensor([whole[:-1]]))[0].log_softmax(-1)
            places = range(len(before) - 1, len(whole) - 1)
            nats.append(sum(float(logs[place, whole[place + 1]]) for place in places))
        assert row["logprobs"] == pytest.approx(torch.tensor(nats).log_softmax(0).tolist(), abs=1e-6)
        assert row["chosen"] == [row["label"]]
        assert row["label"] == choices[int(np.argmax(nats))]
        assert row["probs"] == pytest.approx(torch.tensor(nats).softmax(0).tolist(), abs=1e-6)
    answer = server.post("classify", {"input": "the"})
    assert answer.status_code == 400
    assert "not trained as a classifier" in answer.json()["error"]["message"]


def test_two_hundred_streams_at_a_time_are_each_as_alone(server: Served, trained: TrainedModel) -> None:
    """Greedy and drawn, with and without log-probabilities and stop texts, of several lengths."""
    asked = [
        {
            "prompt": f"{PROMPT} {n}"[: 5 + n % 17],
            "max_tokens": 4 + n % 9,
            "temperature": (0, 0.8, 1.3)[n % 3],
            "seed": n,
            "logprobs": 1 if n % 5 == 0 else None,
            "stop": "e" if n % 7 == 0 else None,
        }
        for n in range(200)
    ]
    before = server.metric("megatrain_generated_tokens_total")
    found = asyncio.run(_streams(server, asked))
    for body, (text, finish, tokens) in zip(asked, found, strict=True):
        expected = alone(
            trained,
            prompt=str(body["prompt"]),
            tokens=int(body["max_tokens"]),  # type: ignore[call-overload]
            sampling=Sampling(temperature=body["temperature"], seed=body["seed"]),  # type: ignore[arg-type]
            stop=("e",) if body["stop"] else (),
        )
        assert (text, finish, tokens) == (expected.text, expected.finish, len(expected.tokens)), body
    assert server.metric("megatrain_cache_blocks_used") == 0
    assert server.metric("megatrain_texts_running") == 0
    made = sum(tokens for _, _, tokens in found)
    assert server.metric("megatrain_generated_tokens_total") - before >= made
    assert server.metric("megatrain_time_to_first_token_seconds_count") >= 200
    assert server.metric("megatrain_time_between_tokens_seconds_count") >= made - 200
    families = {family.name for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    assert {"megatrain_requests", "megatrain_batch_texts", "megatrain_cache_blocks"} <= families


async def _streams(server: Served, asked: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits) as client:

        async def one(body: dict[str, Any]) -> tuple[str, str, int]:
            more = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
            text, finish, tokens, ended = "", "", 0, False
            async with client.stream("POST", "/v1/completions", json=body | more) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line:
                        data = json.loads(line.removeprefix("data: "))
                        tokens = (data["usage"] or {}).get("completion_tokens", tokens)
                        for choice in data["choices"]:
                            text += choice["text"]
                            finish = choice["finish_reason"] or finish
            assert ended
            return text, finish, tokens

        return list(await asyncio.gather(*map(one, asked)))


def wait_until_free(server: Served) -> None:
    """Until no text has a part of the cache; pytest's limit ends a wait in vain."""
    while server.metric("megatrain_cache_blocks_used") or server.metric("megatrain_texts_running"):
        pass


def test_a_client_that_leaves_frees_its_part_of_the_cache(server: Served) -> None:
    before = server.metric("megatrain_cancelled_texts_total")
    with server.stream("completions", LONG | {"n": 3}) as response:
        chunks = events(response)
        next(chunks)
        assert server.metric("megatrain_cache_blocks_used") > 0
    wait_until_free(server)
    asked = json.dumps({"model": "tiny", **LONG}).encode()
    with socket.create_connection(
        _address(server)
    ) as connection:  # not a stream: nothing is sent before the end
        connection.sendall(_post("/v1/completions", asked))
        while not server.metric("megatrain_texts_running"):
            pass
    wait_until_free(server)
    assert server.metric("megatrain_cancelled_texts_total") > before + 1


def _address(server: Served) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def _post(path: str, body: bytes, *, length: int | None = None, key: str = "") -> bytes:
    said = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {said}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "valid dictionary"),
        (b"[" * 100_000, "pars"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "finite"),
        (b'{"model": "tiny", "prompt": "x", "temperature": "1"}', "valid number"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 1e99}', "max_tokens"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 0}', "greater than or equal to 1"),
        (b'{"model": "tiny", "prompt": "x", "max_tokenz": 3}', "no such parameter"),
        (b'{"model": "tiny", "prompt": "x", "presence_penalty": 1.5}', "presence_penalty"),
        (b'{"model": "tiny", "prompt": [1, -1]}', "prompt"),
        (b'{"model": "tiny", "prompt": [1, 70000]}', "no token 70000"),
        (b'{"model": "tiny", "prompt": []}', "prompt"),
        (b'{"model": "tiny", "prompt": "x", "stop": ""}', "stop"),
        (b'{"model": "tiny", "prompt": "x", "stream_options": {}}', "stream=true"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 5000}', "do not fit"),
        (b'{"model": "tiny", "prompt": ["x", "y"], "n": 128}', "too many"),
        (b'{"model": "tiny", "prompt": "' + b"squares " * 9000 + b'"}', "do not fit"),
    ],
)
def test_a_malformed_request_is_explained(server: Served, body: bytes, said: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_what_is_not_http_or_no_path(server: Served) -> None:
    with socket.create_connection(_address(server)) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00" * 100 + b"\r\n\r\n")
        assert b" 400 " in connection.makefile("rb").readline()
    assert server.client.get("/nothing").json()["error"]["code"] == "not_found"
    answer = server.client.get("/v1/completions")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    plain = server.client.post("/v1/completions", content=b'{"model": "tiny", "prompt": "x"}')
    assert plain.status_code == 400  # a page elsewhere may send that without asking the browser


def test_a_key_is_needed(small: Served, run: Path) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    assert small.post("completions", body).status_code == 200
    for headers in (
        {"Authorization": ""},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
    ):
        answer = small.post("completions", body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{small.url}/v1", api_key="wrong").models.list()
    assert httpx.get(f"{small.url}/health").status_code == 200


def test_too_many_too_large_and_too_slow_requests_are_refused(small: Served) -> None:
    with small.stream("completions", LONG) as first:
        chunks = events(first)
        next(chunks)
        with small.stream("completions", LONG) as second:
            assert second.status_code == 200  # it waits
            third = small.post("completions", LONG)
            assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
            assert third.json()["error"]["type"] == "rate_limit_error"
            assert int(third.headers["Retry-After"]) >= 1
            assert small.post("embeddings", {"input": "x"}).status_code == 429
    large = small.post("completions", {"prompt": "x" * 20_000})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    most = small.post("completions", {"prompt": "x", "max_tokens": 901})
    assert (most.status_code, most.json()["error"]["code"]) == (400, "too_many_tokens")
    address = _address(small)
    with socket.create_connection(address) as head, socket.create_connection(address) as slow:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        slow.sendall(_post("/v1/completions", b'{"model":', length=100, key=KEY))
        wait_until_free(small)
        assert small.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
        assert b" 408 " in slow.makefile("rb").readline()
        assert head.recv(1) == b""  # closed without a word


def test_a_signal_lets_answers_end_and_refuses_others(run: Path) -> None:
    with Served(run) as served:
        with served.stream("completions", LONG) as response:
            found = events(response)
            next(found)
            served.process.send_signal(signal.SIGTERM)
            while (health := served.client.get("/health")).status_code == 200:
                pass
            assert health.json() == {"status": "draining"}
            refused = served.post("completions", {"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "Retry-After" in refused.headers
            chunks = list(found)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(SECONDS) == 0


def test_what_takes_too_long_is_given_up(run: Path) -> None:
    """A request, and then the requests that are under way when the server is to stop."""
    with Served(run, "--request-seconds", "1", "--drain-seconds", "0.1") as served:
        answer = served.post("completions", LONG | {"n": 16})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with served.stream("completions", LONG | {"n": 16}) as response:
            *_, last = events(response)
        assert last["error"]["code"] == "timeout"
        wait_until_free(served)
        with served.stream("completions", LONG | {"n": 16}) as response:
            found = events(response)
            next(found)
            served.process.send_signal(signal.SIGINT)
            *_, last = found
        assert last["error"]["code"] == "draining"
        assert served.process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "--port 70000: must be"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--cache-gib", "1e-9"], "--cache-gib"),
        (["--api-keys", "none.txt"], "none.txt"),
        (["--api-keys", "short.txt"], "at least 16"),
        (["--tp", "2"], "--tp"),
    ],
)
def test_a_wrong_command_line_is_explained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("# mine\nabc\n")
    assert main(["serve", str(run), "--port", "0", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_taken_port_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(run), "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err
