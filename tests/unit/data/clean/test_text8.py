"""text8's filter against its author's program, and against the beginning of the published file.

enwik9 itself is a gigabyte; `enwik9_start.xml` is an excerpt of its first article, written by hand.
"""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from megatrain.data.clean.text8 import text8

HERE = Path(__file__).parent
PUBLISHED = (
    " anarchism originated as a term of abuse first used against early working class radicals including the diggers of "
    "the english revolution and the sans culottes of the french revolution whilst the term is still used in a "
    "pejorative way to describe any act that used violent means to destroy the organization of society it has also "
    "been taken up as a positive label by self defined anarchists the word anarchism is derived from the greek without "
    "archons ruler chief king anarchism as a political philosophy is the belief that rulers are unnecessary and should "
    "be abolished although there are differing interpretations of what this means"
)
PIECES = (
    "<text x>", "</text>", "#REDIRECT", "<ref", "</ref>", "&lt;", "&gt;", "&amp;", "[[", "]]", "[", "]", "{{", "}}",
    "{", "}", "|", "image:", "category:", "fr:", ":", "&", ";", "\n", " ", "a", "Bc", "7", "é", "|thumb", "|12px",
    "[http:", "<", ">", "&lt;ref", "&lt;/ref&gt;", "[[Image:", "[[Category:", "|Left", "|RIGHT", "\ufffd",
)  # fmt: skip


def by_the_author(text: str) -> str:
    """What wikifil.pl (Matt Mahoney, 2006, public domain) makes of `text`."""
    command = ["perl", str(HERE / "wikifil.pl")]
    return subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout.decode()


def test_the_beginning_of_text8() -> None:
    found = text8((HERE / "enwik9_start.xml").read_text())
    assert found.startswith(PUBLISHED)
    assert found.removeprefix(PUBLISHED) == " william godwin in one seven nine eight anarchism"


@pytest.mark.skipif(shutil.which("perl") is None, reason="needs perl")
def test_as_the_authors_program() -> None:
    excerpt = (HERE / "enwik9_start.xml").read_text()
    assert text8(excerpt) == by_the_author(excerpt)
    rng = random.Random(7)
    for _ in range(10):  # many articles at a time: starting perl takes longer than its work
        articles = "".join(
            f"<text x>{''.join(rng.choices(PIECES, k=rng.randrange(1, 60)))}" for _ in range(60)
        )
        assert text8(articles) == by_the_author(articles), articles


def test_plain_text() -> None:
    assert text8("It's 2026 -- café, naïve!\n") == " it s two zero two six caf na ve"
    assert text8("<b>no article</b>") == " b no article b"
    assert text8("!?") == ""
    assert text8("\ud800a\x00b") == " a b"
