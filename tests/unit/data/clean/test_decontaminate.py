"""Decontamination against sets of strings, and the files that it reads."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from megatrain.config.errors import UserError
from megatrain.data.clean.config import DecontaminateStep
from megatrain.data.clean.decontaminate import Benchmarks
from megatrain.data.clean.words import WordHashes


def benchmarks(folder: Path, *, ngram: int = 13, **files: str) -> Benchmarks:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    against = tuple(str(folder / name.replace("_", ".")) for name in files)
    return Benchmarks(DecontaminateStep(against=against, ngram=ngram), WordHashes())


def grams(text: str, n: int) -> set[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


QUESTION = "Which of the following planets has the largest number of known moons in the solar system today?"


def test_thirteen_words_are_a_hit_and_twelve_are_not(tmp_path: Path) -> None:
    found = benchmarks(tmp_path, eval_jsonl=json.dumps({"question": QUESTION, "answer": "Saturn"}))
    words = QUESTION.split()
    assert found.hit(" ".join(words[2:15])) is not None
    assert found.hit("x " + " ".join(words[2:14]) + " y") is None
    hit = found.hit(
        f"{'filler ' * 500}WHICH -- of the: following, planets has the largest number of known moons in!"
    )
    assert hit is not None
    assert hit.reason == "shares 13 words in a row with a benchmark"
    assert "WHICH" in hit.excerpt


@pytest.mark.parametrize("seed", range(10))
def test_as_with_sets_of_strings(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(4)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(3, 30))) for _ in range(4)]
    found = benchmarks(
        tmp_path, ngram=5, eval_jsonl="\n".join(json.dumps({"a": [{"b": text}]}) for text in texts)
    )
    known = set().union(*(grams(text, 5) for text in texts))
    answers = set()
    for _ in range(100):
        text = " ".join(rng.choices(vocabulary, k=rng.randrange(1, 12)))
        assert (found.hit(text) is not None) == (not known.isdisjoint(grams(text, 5))), text
        answers.add(found.hit(text) is not None)
    assert answers == {True, False}


def test_ngrams_do_not_span_two_strings(tmp_path: Path) -> None:
    found = benchmarks(tmp_path, ngram=3, eval_jsonl='{"a": "one two three", "b": ["four five six"]}\n\n')
    assert found.hit("two three four") is None
    assert found.hit("four five six") is not None


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    assert benchmarks(tmp_path, ngram=3, eval_txt="one two\nthree four").hit("Two three four") is not None


@pytest.mark.parametrize("name", ["eval.json", "eval.jsonl.gz", "eval.json.gz"])
def test_json_is_read_as_data_path_reads_it(tmp_path: Path, name: str) -> None:
    text = "größer als\neins zwei drei"
    content = json.dumps([{"q": text}] if "jsonl" not in name else {"q": text}).encode()  # with escapes
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    step = DecontaminateStep(against=(str(tmp_path / name),), ngram=5)
    assert Benchmarks(step, WordHashes()).hit(f"sie ist {text}") is not None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("eval.jsonl", b'{"a": 1}\n{"a"\n', ":2 is not JSON"),
        ("eval.jsonl", b"", "no text has as many as 13 words"),
        ("eval.txt", b"a few words", "no text has as many as 13 words"),
        ("eval.txt", b"\xff", "is not UTF-8: byte 0xff at offset 0"),
        ("eval.txt", None, "there is no such file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        Benchmarks(DecontaminateStep(against=(str(tmp_path / name),)), WordHashes())
