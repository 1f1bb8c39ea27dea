"""Steps that a library does: repair of encodings (ftfy), main text of web pages (trafilatura), languages (py3langid).

A library is imported when its step is made. Only these files know it, and each setting that differs from the library's
own has its reason here.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from megatrain.data.clean.config import FixTextStep, HtmlStep, LanguageStep
from megatrain.data.clean.outcome import Refusal, excerpt, percent
from megatrain.data.clean.packages import library

SUSPECT_LINE = re.compile(r"^[^\n]*[&\x00-\x08\x0b\x0e-\x1f\x7f-\U0010ffff][^\n]*", re.MULTILINE)
"""What ftfy may change: lines with entities, control characters, escape sequences or characters beyond ASCII."""
NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
HTML = re.compile(r"<!doctype html|<(?:html|head|body|div|p|article|table|span)[\s>]", re.IGNORECASE)
HTML_WITHIN = 4096
"""Characters at the beginning of a document in which an HTML page has one of these tags."""
MAX_PAGE = 1 << 20
"""Characters of the largest page that is read, as in Common Crawl: trafilatura's time is quadratic beyond."""
STRETCH, STRETCHES = 2000, 3
"""A longer document's language is judged by stretches of this many characters: its beginning, middle and end."""


def text_fixer(step: FixTextStep) -> Callable[[str], str]:
    """Return ftfy's repair as a function of a text.

    Raises:
        UserError: ftfy is not installed.
    """
    with library("ftfy", "fix_text"):
        import ftfy

    plain = step.plain_typography
    config = ftfy.TextFixerConfig(
        uncurl_quotes=plain,
        fix_latin_ligatures=plain,
        fix_character_width=plain,
        fix_line_breaks=plain,
        normalization=None,  # a step of its own
        explain=False,
    )

    def fix(text: str) -> str:
        if plain:
            return str(ftfy.fix_text(text, config))
        # ftfy treats each line by itself, but for the first <, after which it leaves entities alone. To pass it only
        # the lines that it may change is many times faster.
        tag = text.find("<") if "<" in text else len(text)
        beyond = config._replace(unescape_html=False)
        return SUSPECT_LINE.sub(
            lambda line: str(ftfy.fix_text(line[0], config if line.start() < tag else beyond)), text
        )

    return fix


def html_extractor(step: HtmlStep) -> Callable[[str], str | Refusal]:
    """Return trafilatura's extraction of the main text as a function of a page.

    Raises:
        UserError: trafilatura is not installed.
    """
    with library("trafilatura", "html"):
        import trafilatura

    def extract(text: str) -> str | Refusal:
        if not HTML.search(text[:HTML_WITHIN]):
            return text
        if len(text) > MAX_PAGE:
            return Refusal(f"a page of more than {MAX_PAGE:,} characters", excerpt(text))
        found = trafilatura.extract(
            NOT_TEXT.sub("\ufffd", text),  # the parser takes neither
            favor_precision=step.favor == "precision",
            favor_recall=step.favor == "recall",
            include_comments=step.comments,
            include_tables=step.tables,
            deduplicate=False,  # it would remember earlier documents
        )
        return found or Refusal("no main text was found", excerpt(text))

    return extract


def language_filter(step: LanguageStep) -> Callable[[str], Refusal | None]:
    """Return the test of a text's language by py3langid.

    Raises:
        UserError: py3langid is not installed.
    """
    identifier = _language_identifier()

    def refuse(text: str) -> Refusal | None:
        language, probability = identifier.classify(_sample(text).encode("utf-8", "replace"))
        if language not in step.keep:
            return Refusal(f"in the language {language}", excerpt(text))
        if probability < step.at_least:
            return Refusal(f"its language is less than {percent(step.at_least)} probable", excerpt(text))
        return None

    return refuse


@cache
def _language_identifier() -> Any:
    """Return py3langid's model, which takes seconds to read, once in a process."""
    with library("py3langid", "language"):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _sample(text: str) -> str:
    """Return the stretches of `text` by which its language is judged."""
    if len(text) <= STRETCH * STRETCHES:
        return text
    step = (len(text) - STRETCH) // (STRETCHES - 1)
    return "\n".join(text[start : start + STRETCH] for start in range(0, step * STRETCHES, step))
