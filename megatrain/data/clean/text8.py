"""Matt Mahoney's filter of text8: letters a to z and single spaces, from Wikipedia's XML or from plain text.

Source: mattmahoney.net/dc/textdata, appendix A. The rules are applied one by one in its order. A rule of the form
"from an opening to the next closing character" is applied by `_replace_closed`, which takes linear time where a
regular expression would scan to the end of the text for each opening that is never closed.
"""

import re
from collections.abc import Callable

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOWER = bytes(
    ord(chr(byte).lower()) if chr(byte).isascii() and chr(byte).isalnum() else 32 for byte in range(256)
)
ARTICLE, REDIRECT = re.compile("<text "), re.compile("#redirect", re.IGNORECASE)
IMAGE_OPTIONS = (r"\|thumb", r"\|left", r"\|right", r"\|[0-9]+px")
IMAGE = re.compile(r"\[\[image:[^\[\]]*+", re.IGNORECASE)

Replacement = str | Callable[[str], str]
"""Text in place of what is replaced, or a function of what stands between the opening and the closing."""


def text8(text: str) -> str:
    """Return `text` as text8 would have it: lower-case words and spelled-out digits, each after one space.

    The articles of Wikipedia's XML (`<text ...>`) are freed from markup first; any other text is taken as it stands.
    """
    if not ARTICLE.search(text):
        return _letters(text)
    return "".join(_letters(_visible(record)) for record in _records(text))


def _letters(text: str) -> str:
    """Return the letters of `text` in lower case, its digits spelled out, and one space for all that is between."""
    plain = text.encode("ascii", "replace").translate(LOWER)
    for digit, word in enumerate(DIGITS):
        plain = plain.replace(b"%d" % digit, f" {word} ".encode())
    words = plain.split()
    return "".join([" ", b" ".join(words).decode()]) if words else ""


def _records(text: str) -> list[str]:
    """Return the pieces of the articles, each of which ends with the character >."""
    found, inside = [], False
    for record in re.findall("[^>]*>|[^>]+", text):
        inside = (inside or ARTICLE.search(record) is not None) and not REDIRECT.search(record)
        if inside:
            found.append(record)
            inside = "</text>" not in record
    return found


def _visible(record: str) -> str:
    """Return the text of `record` that a browser would display."""
    text = _without_tag(record)
    text = text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    text = _replace_closed(text, "<ref", "<", "</ref>", "")
    text = _replace_closed(text, "<", ">", ">", "")
    text = re.sub(r"\[http:[^\] ]*", "[", text)
    for option in IMAGE_OPTIONS:
        text = re.sub(option, "", text, flags=re.IGNORECASE)
    text = IMAGE.sub(
        lambda found: found[0].rpartition("|")[2], text
    )  # the caption; all of it if there is no bar
    text = _replace_closed(
        text, r"\[\[(?i:category):", r"\]", "]]", lambda inner: f"[[{inner.partition('|')[0]}]]"
    )
    text = _replace_closed(text, r"\[\[[a-z\-]*:", r"\]", "]]", "")
    text = _replace_closed(text, r"\[\[", r"[|\]]", "|", "[[")
    text = _replace_closed(text, r"\{\{", r"\}", "}}", "")
    text = _replace_closed(text, r"\{", r"\}", "}", "")
    text = text.replace("[", "").replace("]", "")
    return _replace_closed(text, "&", ";", ";", " ")


def _without_tag(record: str) -> str:
    """Return `record` without the first `<.*>`: that is, without its last line from the first < on."""
    start = record.find("<", record.rfind("\n") + 1) if record.endswith(">") else -1
    return record if start < 0 else record[:start]


def _replace_closed(text: str, opening: str, stop: str, closing: str, by: Replacement) -> str:
    """Replace each stretch from `opening` to the next `stop` (patterns) if the text `closing` stands there, with it."""
    start_of, stop_at = re.compile(opening), re.compile(stop)
    kept, done, position = [], 0, 0
    while found := start_of.search(text, position):
        end = stop_at.search(text, found.end())
        if end is None:
            break
        position = end.start()
        if text.startswith(closing, position):
            inner = text[found.end() : position]
            kept += [text[done : found.start()], by if isinstance(by, str) else by(inner)]
            done = position = position + len(closing)
    return "".join([*kept, text[done:]])
