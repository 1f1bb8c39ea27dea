"""Steps done by libraries: that our settings do what the keys say, and that short cuts change nothing."""

import random
import string
import unicodedata

import ftfy
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from megatrain.data.clean.config import FixTextStep, HtmlStep, Language, LanguageStep
from megatrain.data.clean.libraries import html_extractor, language_filter, text_fixer
from megatrain.data.clean.normalize import normalize
from megatrain.data.clean.outcome import Refusal

PAGE = """<!DOCTYPE html><html><head><title>Harbour</title></head><body>
<nav><a href="/">Home</a> <a href="/news">News</a> <a href="/about">About us</a></nav>
<article><h1>The harbour</h1>
<p>The harbour was built in the last century, and ships from many countries have come here ever since that time.</p>
<p>Today it is mostly used by fishing boats, which leave early in the morning and return late in the afternoon.</p>
<table><tr><td>Depth in metres</td><td>Twelve</td></tr></table></article>
<footer>All rights reserved. Imprint. Cookie settings.</footer></body></html>"""


@pytest.mark.parametrize(
    ("broken", "fixed"),
    [
        ("schÃ¶n â€“ naÃ¯ve", "schön – naïve"),
        ("AT&amp;T &lt;b&gt;", "AT&T <b>"),
        ("a\x1b[31mred\x1b[0m\x00b", "aredb"),
        ("“curly” ﬁne", "“curly” ﬁne"),
        ("plain text, as it is\r\n", "plain text, as it is\r\n"),
        ("e\u0301", "e\u0301"),
    ],
)
def test_fix_text(broken: str, fixed: str) -> None:
    assert text_fixer(FixTextStep())(broken) == fixed


def test_plain_typography() -> None:
    assert text_fixer(FixTextStep(plain_typography=True))("“curly” ﬁne ＡＢ\r\n") == '"curly" fine AB\n'


def test_the_short_cut_is_what_ftfy_does() -> None:
    rng, fix = random.Random(1), text_fixer(FixTextStep())
    config = ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, fix_line_breaks=False,
        normalization=None,
    )  # fmt: skip
    every = [chr(code) for code in range(128)]
    assert [fix(f"a{char}b") for char in every] == [ftfy.fix_text(f"a{char}b", config) for char in every]
    pieces = [
        *string.printable,
        "\n",
        "\n",
        "&amp;",
        "&lt;b&gt;",
        "<",
        "Ã¶",
        "é",
        "â€œ",
        "\x1b[1m",
        "\x00",
        "\u2028",
        "\x85",
        "plain",
    ]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=30))
        assert fix(text) == ftfy.fix_text(text, config)


def test_html() -> None:
    text = html_extractor(HtmlStep())(PAGE)
    assert isinstance(text, str)
    assert "ships from many countries" in text
    assert "fishing boats" in text
    assert not {"Cookie", "About us", "<p>"} & {
        word for word in ("Cookie", "About us", "<p>") if word in text
    }
    assert "Twelve" in text
    without = html_extractor(HtmlStep(tables=False))(PAGE)
    assert isinstance(without, str)
    assert "Twelve" not in without


def test_text_that_is_not_html_passes() -> None:
    for text in ("plain", "if a < b and c > d: pass", "# <- a comment\n" * 99, "a <b> c"):
        assert html_extractor(HtmlStep())(text) == text


def test_a_page_without_text_is_removed() -> None:
    found = html_extractor(HtmlStep())("<html><body><script>1</script></body></html>")
    assert isinstance(found, Refusal)
    assert found.reason == "no main text was found"


def test_a_page_that_is_too_large_is_removed() -> None:
    found = html_extractor(HtmlStep())("<html><body><p>" + "word " * 210_000)
    assert isinstance(found, Refusal)
    assert found.reason == "a page of more than 1,048,576 characters"


ENGLISH = "The ship left the harbour early in the morning, and nobody knew when it would come back."
GERMAN = "Das Schiff verließ den Hafen früh am Morgen, und niemand wusste, wann es zurückkommen würde."


def test_language() -> None:
    english = language_filter(LanguageStep(keep=("en",)))
    assert english(ENGLISH) is None
    refused = english(GERMAN)
    assert refused is not None
    assert refused.reason == "in the language de"
    assert language_filter(LanguageStep(keep=("en", "de")))(GERMAN) is None
    unsure = language_filter(LanguageStep(keep=("en",), at_least=1.0))("a cat")
    assert unsure is not None


def test_a_long_document_is_judged_by_three_stretches() -> None:
    english = language_filter(LanguageStep(keep=("en",)))
    assert english(ENGLISH * 5000) is None
    assert english(ENGLISH * 30 + GERMAN * 5000) is not None


def test_the_languages_are_the_models() -> None:
    assert sorted(LanguageIdentifier.from_model_file(MODEL_FILE).labels) == sorted(Language.__args__)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normalization_is_pythons(form: str) -> None:
    rng = random.Random(3)
    marks = (
        [chr(code) for code in range(0x300, 0x370)] + [chr(code) for code in range(0x5B0, 0x5BD)] + ["\u0344"]
    )
    for _ in range(50):
        text = "".join(
            rng.choice("aeoﬁ²Åǖ\u1e9b")
            + "".join(rng.choices(marks, k=rng.choice((0, 1, 3, 63, 64, 65, 300))))
            for _ in range(5)
        )
        assert normalize(text, form) == unicodedata.normalize(form, text)  # type: ignore[arg-type]
