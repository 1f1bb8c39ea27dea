"""Real text end to end: what reading and cleaning make of it, beside what is known about it."""

import gzip
import json
import re
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


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_near_duplicates_among_editions_of_shakespeare(tmp_path: Path) -> None:
    """Gutenberg has several editions of most works; all pairs are compared word by word."""
    step = "{kind:near_duplicates,threshold:0.5,ngram:5}"
    index, kept = prepare(tmp_path, f"data.path={SHAKESPEARE}", f"data.clean=[{step}]")
    texts = [file.read_text() for file in sorted(SHAKESPEARE.iterdir())]
    sets = [shingles(text) for text in texts]
    above, near = set(), set()
    for second in range(len(sets)):
        for first in range(second):
            similarity = len(sets[first] & sets[second]) / max(1, len(sets[first] | sets[second]))
            if similarity > 0.6:
                above.add(second)
            if similarity > 0.4:  # MinHash estimates: 128 values err by 0.044 (one sigma) at 0.5
                near.add(second)
    removed = {number for number, text in enumerate(texts) if text not in set(kept)}
    assert above <= removed <= near
    assert index["cleaning"]["documents_in"] == len(texts)


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
        flat = " ".join(text.split())
        found = sum(" ".join(p.split()).replace("*", "") in flat for p in paragraphs)
        assert found >= 0.8 * len(paragraphs), f"{name}: {found} of {len(paragraphs)} paragraphs"


@pytest.mark.skipif(not MAN.is_dir(), reason="Debian's packages could not be fetched")
def test_manual_pages_are_read_as_they_are_packed(tmp_path: Path) -> None:
    folder = MAN / "man7"
    index, documents = prepare(tmp_path, f"data.path={folder}", "data.clean=[{kind:exact_duplicates}]")
    expected = [gzip.decompress(file.read_bytes()).decode() for file in sorted(folder.glob("*.gz"))]
    assert sorted(documents) == sorted(set(expected))
    assert index["files_read"] == len(expected)
    assert json.dumps(index["left_out"]) == "[]"
