"""Templates that make one text from several fields of a row."""

import string

ESCAPES = {"\\n": "\n", "\\t": "\t"}


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs of literal text and the field that follows it.

    In it, `\\n` is a line break and `\\t` a tab.

    Raises:
        ValueError: a brace is not closed, or what it holds is no plain name.
    """
    for written, meant in ESCAPES.items():
        template = template.replace(written, meant)
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if name == "" or spec or conversion:
            raise ValueError("a field is written {name}, and a brace as {{ or }}")
        parts.append((literal, name))
    if not any(name for _, name in parts):
        raise ValueError("it names no field; a field is written {name}")
    return parts
