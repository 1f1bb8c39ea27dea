"""Real text end to end: what reading and cleaning make of it, beside what is known about it."""

import gzip
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megatrain.cli.main import main
from megatrain.data.store import read_index

ROOT = Path(__file__).parents[2]
CORPORA = ROOT / ".corpora"
pytestmark = pytest.mark.skipif(not CORPORA.is_dir(), reason="`make corpora` fetches the text")
SHAKESPEARE, HTML, MAN = CORPORA / "shakespeare", CORPORA / "debian" / "html", CORPORA / "debian" / "man"


def prepare(tmp_path: Path, *overrides: str) -> tuple[dict[str, object], list[str]]:
    """Prepare as a user does; return the cache's index, and the documents as text."""
    words = ["data.tokenizer.kind=bytes", "data.val_fraction=0", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main(["data", "prepare", *words, *overrides]) == 0
    (directory,) = (each for each in (tmp_path / "cache").iterdir() if (each / "index.json").exists())
    index = read_index(directory)
    assert index is not None
    tokens = np.fromfile(directory / "train.tokens", "<u2")
    starts = np.fromfile(directory / "train.documents", "<i8")
    documents = [part[:-1].astype(np.uint8).tobytes().decode() for part in np.split(tokens, starts[1:])]
    return index, documents


def similarities(texts: list[str]) -> dict[tuple[int, int], float]:
    """Return the Jaccard similarity in pairs of words of every pair that shares one, exactly."""
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes = []
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        shingles = {tuple(words[i : i + 2]) for i in range(len(words) - 1)}
        sizes.append(len(shingles))
        for shingle in shingles:
            holders.setdefault(shingle, []).append(number)
    shared = Counter(pair for each in holders.values() for pair in combinations(each, 2))
    return {(a, b): count / (sizes[a] + sizes[b] - count) for (a, b), count in shared.items()}


def test_editions_of_shakespeare_are_near_duplicates(tmp_path: Path) -> None:
    """35 works are there twice: in modern spelling, and in that of the First Folio, which leaves few runs of words."""
    step = "{kind:near_duplicates,threshold:0.2,ngram:2,num_perm:512}"
    index, kept = prepare(tmp_path, f"data.path={SHAKESPEARE}", f"data.clean=[{step}]")
    texts = [file.read_text(encoding="utf-8") for file in sorted(SHAKESPEARE.iterdir())]
    exact = similarities(texts)
    # No pair is near the threshold: an estimate from 512 values errs by 0.02 at 0.3 (one sigma).
    assert not [similarity for similarity in exact.values() if 0.12 < similarity < 0.3]
    second = {b for (_, b), similarity in exact.items() if similarity > 0.2}
    assert len(second) == 35
    assert kept == [text for number, text in enumerate(texts) if number not in second]
    assert index["cleaning"]["documents_out"] == len(kept)


def words_of(text: str) -> str:
    return f" {' '.join(re.findall(r'[A-Za-z0-9]+', text))} "


@pytest.mark.skipif(not HTML.is_dir(), reason="Debian's packages could not be fetched")
def test_the_text_of_html_pages(tmp_path: Path) -> None:
    """The pages of Python's documentation, beside the source text that they were made from."""
    pages = tmp_path / "pages"
    pages.mkdir()
    names = ["json", "heapq", "bisect", "copy", "textwrap", "shelve", "statistics", "graphlib"]
    for name in names:
        (pages / f"{name}.html").write_bytes((HTML / "library" / f"{name}.html").read_bytes())
    _, documents = prepare(tmp_path, f"data.path={pages}", "data.clean=[{kind:html}]")
    assert len(documents) == len(names)
    for name, text in zip(sorted(names), documents, strict=True):
        assert "<div" not in text
        assert "</a>" not in text
        source = (HTML / "_sources" / "library" / f"{name}.rst.txt").read_text()
        paragraphs = [
            p
            for p in source.split("\n\n")
            if re.match(r"[A-Z][a-z ,']+", p) and ":" not in p and "`" not in p
        ]
        found = [each for each in paragraphs if words_of(each) in words_of(text)]
        assert len(found) >= len(paragraphs) - 1, f"{name}: {len(found)} of {len(paragraphs)} paragraphs"


@pytest.mark.skipif(not MAN.is_dir(), reason="Debian's packages could not be fetched")
def test_manual_pages_are_read_as_they_are_packed(tmp_path: Path) -> None:
    folder = MAN / "man7"
    index, documents = prepare(tmp_path, f"data.path={folder}", "data.clean=[{kind:exact_duplicates}]")
    expected = [gzip.decompress(file.read_bytes()).decode() for file in sorted(folder.glob("*.gz"))]
    assert sorted(documents) == sorted(set(expected))
    assert index["files_read"] == len(expected)
    assert json.dumps(index["left_out"]) == "[]"
