"""`megatrain generate`: prompts of the command line and of files, what it prints, and mistakes that are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from numerics.test_export import exported, make_run
from numerics.test_huggingface_parity import MODELS

from megatrain.cli.main import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, the same model as a Hugging Face directory, and a run of another model."""
    folder = tmp_path_factory.mktemp("made")
    run = make_run(folder / "run", MODELS["qwen3"])
    make_run(folder / "other", MODELS["llama"])
    exported(run, folder / "exported")
    return folder


@pytest.fixture
def call(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(made)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["generate", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def completions(printed: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(printed)["completions"]
    return found


COMMON = ("--no-average", "--tokens", "9", "--json")


def test_prompts_of_a_batch_are_continued_as_alone(call: Call, made: Path) -> None:
    """From the command line and from files, with options of their own, on the run and on what is exported of it."""
    rows = [{"prompt": "the square"}, {"prompt": "of", "seed": 3, "tokens": 4, "top_k": 5, "stop": "zz"}]
    (made / "p.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (made / "p.txt").write_text("the square\n\nof\n")
    _, printed, said = call("run", "number", "the", "--prompts", "p.jsonl", *COMMON)
    assert "run, step 3, seed 0" in said
    together = completions(printed)
    alone = [
        completions(call("run", *words, *COMMON)[1])[0]
        for words in (
            ("number",), ("the",), ("the square",), ("of", "--seed", "3", "--top-k", "5", "--stop", "zz"),
        )
    ]  # fmt: skip
    assert [each["text"] for each in together[:3]] == [each["text"] for each in alone[:3]]
    assert together[3]["tokens"] == alone[3]["tokens"][:4]  # type: ignore[index]
    assert together[3]["seed"] == 3
    of_lines = completions(call("exported", "--prompts", "p.txt", *COMMON[1:])[1])
    assert [each["prompt"] for each in of_lines] == ["the square", "of"]
    assert of_lines[0]["tokens"] == alone[2]["tokens"]


def test_text_is_printed_in_the_order_of_the_prompts(call: Call) -> None:
    code, printed, _ = call("run", "the", "of", "--no-average", "--tokens", "6", "--temperature", "0")
    assert code == 0
    assert printed.startswith("[1] the")
    assert "\n[2] of" in printed
    single = call("run", "the", "--no-average", "--tokens", "6", "--temperature", "0")[1]
    assert f"[1] {single}".rstrip("\n") in printed


def test_log_probabilities(call: Call) -> None:
    words = ("run", "the", "--temperature", "0", "--logprobs", "2")
    (found,) = completions(call(*words, *COMMON)[1])
    assert len(found["logprobs"]) == len(found["tokens"])  # type: ignore[arg-type]
    for each in found["logprobs"]:  # type: ignore[attr-defined]
        assert each["top"][0]["token"] == each["token"]  # greedy: the likeliest one
        assert each["top"][0]["logprob"] == each["logprob"] >= each["top"][1]["logprob"]


def test_speculation_changes_no_greedy_text(call: Call) -> None:
    words = ("run", "the square of the", "the", "--temperature", "0", *COMMON)
    plain = completions(call(*words)[1])
    for guesses in (("--lookup",), ("--draft", "other", "--draft-tokens", "3")):
        assert completions(call(*words, *guesses)[1]) == plain


WRONG = {
    "a flag": (["run", "--topk", "3"], "--topk"),
    "a number": (["run", "--top-p", "1.5"], "--top-p 1.5: must be between 0 and 1"),
    "an integer": (["run", "--batch", "0"], "--batch 0: must be at least 1"),
    "a penalty": (["run", "--repetition-penalty", "0"], "--repetition-penalty 0.0: must be above 0"),
    "log-probabilities that nobody sees": (["run", "--logprobs", "1"], "--logprobs needs --json"),
    "two ways to guess": (["run", "--lookup", "--draft", "other"], "choose one"),
    "an empty stop text": (["run", "--stop", ""], "at least one character"),
    "no file": (["run", "--prompts", "absent"], "absent: No such file"),
    "a stop text that is a number": (["run", "--prompts", "stop.jsonl"], "stop.jsonl:1: stop=3 must be"),
    "an option of a row": (["run", "--prompts", "option.jsonl"], "option.jsonl:2: there is no option 'topk'"),
    "a row's number": (["run", "--prompts", "number.jsonl"], "top_p=2: must be between 0 and 1"),
    "a row's type": (["run", "--prompts", "type.jsonl"], "tokens=1.5 must be an integer"),
    "no prompt": (["run", "--prompts", "none.jsonl"], "none.jsonl:1 must be a JSON object with a text `prompt`"),
    "no lines": (["run", "--prompts", "empty.txt"], "empty.txt has no prompts"),
    "neither": (["nowhere"], "neither a run directory nor"),
    "an average that is none": (["exported", "--average"], "no moving average"),
}  # fmt: skip
ROWS = {
    "stop.jsonl": '{"prompt": "a", "stop": 3}\n',
    "option.jsonl": '{"prompt": "a"}\n{"prompt": "a", "topk": 3}\n',
    "number.jsonl": '{"prompt": "a", "top_p": 2}\n',
    "type.jsonl": '{"prompt": "a", "tokens": 1.5}\n',
    "none.jsonl": '{"text": "a"}\n',
    "empty.txt": "\n\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(call: Call, made: Path, name: str) -> None:
    for path, text in ROWS.items():
        (made / path).write_text(text)
    words, said = WRONG[name]
    code, _, printed = call(*words)
    assert code == 2
    assert said in printed
    assert "Traceback" not in printed
