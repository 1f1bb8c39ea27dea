"""Throughput of `megatrain serve`: many streams at a time, one at a time, and transformers' batched `generate`.

    python -m benchmarks.serving --out benchmarks/results/serving_cpu.json

A model of random weights is written as a Hugging Face directory. `megatrain serve` serves it in a process of its own;
a client in this one sends prompts of random tokens, which are continued greedily, and reads the streams. Transformers'
`generate` continues the same prompts in one batch, with the same model from the same directory, in this process,
while the server is idle. The contenders take turns; ratios are medians over rounds. The client shares the cores with
the server, and its work counts against it. In one workload all prompts and answers are of equal length; in the other
one lengths are drawn at random, as they are in practice.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import SHAPES
from benchmarks.machine import describe_machine
from megatrain.data.tokenizer import HuggingFaceTokenizer, train_bpe
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.nn.init import init_weights

Texts = list[tuple[list[int], int]]
"""Prompts, and how many tokens are to follow each."""
Theirs = Callable[[Texts], int]


class Times:
    """When the tokens of some streams arrived."""

    def __init__(self) -> None:
        self.first: list[float] = []
        """Seconds from a request to its first token."""
        self.between: list[float] = []
        """Seconds from one chunk of a stream to the next."""
        self.texts: dict[int, str] = {}
        self.tokens = 0

    def summary(self) -> dict[str, float]:
        """Return medians and 95th percentiles in milliseconds."""
        found = {}
        for name, values in (("first_token_ms", self.first), ("between_tokens_ms", self.between)):
            cuts = statistics.quantiles(values, n=20) if len(values) > 1 else values * 19
            found |= {
                f"{name}_median": round(1e3 * statistics.median(values), 1),
                f"{name}_p95": round(1e3 * cuts[-1], 1),
            }
        return found


async def stream(port: int, number: int, prompt: Sequence[int], tokens: int, times: Times) -> None:
    """Send one request, and read its stream with as little work as can be."""
    body = json.dumps(
        {
            "model": "model", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    began = before = time.perf_counter()
    writer.write(head.encode() + body)
    text: list[str] = []
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if not line:
            raise ConnectionError("the stream ended before its text")
        if not line.startswith(b"data: "):
            continue
        now = time.perf_counter()
        data = json.loads(line[6:])
        if data["usage"]:
            times.tokens += data["usage"]["completion_tokens"]
            continue
        (times.between if text else times.first).append(now - (before if text else began))
        before = now
        text.append(data["choices"][0]["text"])
    writer.close()
    times.texts[number] = "".join(text)


def measure(port: int, texts: Texts, *, at_a_time: int) -> tuple[float, Times]:
    """Return the seconds that all prompts took, and when tokens arrived."""
    times = Times()

    async def run() -> float:
        places = asyncio.Semaphore(at_a_time)

        async def one(number: int) -> None:
            async with places:
                await stream(port, number, *texts[number], times)

        began = time.perf_counter()
        await asyncio.gather(*map(one, range(len(texts))))
        return time.perf_counter() - began

    return asyncio.run(run()), times


def write_model(cfg: ModelConfig, directory: Path) -> None:
    """Write a model of random weights as transformers does, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = get_spec(cfg.kind)
    model = spec.build(cfg)
    init_weights(model, spec.plan(cfg), seed=0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.hf_config(cfg)))
    missing = theirs.load_state_dict(
        dict(spec.weights(cfg).export(dict(model.named_parameters()))), strict=False
    ).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    theirs.tie_weights()
    theirs.save_pretrained(directory)
    tokenizer = train_bpe(iter(["the square of the number " * 9]), vocab_size=300)
    known = tokenizer.vocab_size
    tokenizer._inner.add_tokens([f" word{n}" for n in range(cfg.vocab_size - known)])  # each token is a text
    HuggingFaceTokenizer(tokenizer._inner, eos_id=tokenizer.eos_id).save_pretrained(directory)


def equal(options: argparse.Namespace) -> Texts:
    """Return prompts of one length that are continued by one number of tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, 250, (options.streams, options.prompt), generator=generator).tolist()
    return [(prompt, options.tokens) for prompt in prompts]


def mixed(options: argparse.Namespace) -> Texts:
    """Return prompts of lengths from 1 to twice that, and answers alike, drawn at random."""
    generator = torch.Generator().manual_seed(2)

    def lengths(mean: int) -> list[int]:
        return torch.randint(1, 2 * mean, (options.streams,), generator=generator).tolist()

    return [
        (torch.randint(1, 250, (prompt,), generator=generator).tolist(), tokens)
        for prompt, tokens in zip(lengths(options.prompt), lengths(options.tokens), strict=True)
    ]


def hugging_face(directory: Path) -> Theirs:
    """Return what continues all prompts in one padded batch with transformers; it returns how many tokens are wanted.

    All texts are continued by as many tokens as the longest: that is what a batch is there.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def run(texts: Texts) -> int:
        longest = max(len(prompt) for prompt, _ in texts)
        inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in texts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in texts])
        model.generate(
            inputs,
            attention_mask=mask,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=max(tokens for _, tokens in texts),
        )
        return sum(tokens for _, tokens in texts)

    return run


def compare(cfg: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the contenders with one model."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_model(cfg, directory)
        theirs = hugging_face(directory)
        workloads = {
            name: make(options) for name, make in (("equal_lengths", equal), ("mixed_lengths", mixed))
        }
        command = [sys.executable, "-m", "megatrain", "serve", str(directory), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            found = {name: _workload(port, texts, theirs, options) for name, texts in workloads.items()}
        finally:
            server.terminate()
            code = server.wait()
    return found | {"exit_code_of_the_server": code}


def _workload(port: int, texts: Texts, theirs: Theirs, options: argparse.Namespace) -> dict[str, Any]:
    measure(port, texts[:8], at_a_time=4)  # both are warm when the clock starts
    theirs(texts[:8])
    rounds = [_round(port, texts, theirs, options, is_odd=bool(n % 2)) for n in range(options.rounds)]
    medians = {
        name: statistics.median(each["tokens_per_sec"][name] for each in rounds)
        for name in ("streams_together", "one_at_a_time", "transformers_batch")
    }

    def ratio(other: str) -> float:
        speeds = [each["tokens_per_sec"] for each in rounds]
        return round(statistics.median(each["streams_together"] / each[other] for each in speeds), 2)

    return {
        "tokens_per_sec": medians,
        "ratio_to_one_at_a_time": ratio("one_at_a_time"),
        "ratio_to_transformers_batch": ratio("transformers_batch"),
        "rounds": rounds,
    }


def _round(
    port: int, texts: Texts, theirs: Theirs, options: argparse.Namespace, *, is_odd: bool
) -> dict[str, Any]:
    speeds: dict[str, float] = {}
    found: dict[str, Any] = {"tokens_per_sec": speeds}

    def together() -> None:
        seconds, times = measure(port, texts, at_a_time=len(texts))
        speeds["streams_together"] = round(times.tokens / seconds, 1)
        found["streams_together"] = times.summary() | {"texts": len(times.texts), "tokens": times.tokens}

    def alone() -> None:
        seconds, times = measure(port, texts[: options.alone], at_a_time=1)
        speeds["one_at_a_time"] = round(times.tokens / seconds, 1)
        found["one_at_a_time"] = times.summary() | {"texts": len(times.texts), "tokens": times.tokens}

    def batch() -> None:
        began = time.perf_counter()
        speeds["transformers_batch"] = round(theirs(texts) / (time.perf_counter() - began), 1)

    for work in [together, alone, batch][:: -1 if is_odd else 1]:
        work()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--alone", type=int, default=8, help="how many requests are sent one at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.serving " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "load_average_at_the_start": os.getloadavg()[0],
        "conventions": "greedy, float32, prefill and HTTP included; a ratio above 1: the streams together are faster",
        "streams": options.streams,
        "prompt_tokens": options.prompt,
        "new_tokens": options.tokens,
    }
    for shape in options.shapes:
        result[shape] = compare(SHAPES[shape], options)
        print(shape, json.dumps(result[shape]), flush=True)
        result["load_average_at_the_end"] = os.getloadavg()[0]
        if options.out:  # what is measured is kept, whatever comes
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
