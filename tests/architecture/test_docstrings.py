"""Docstrings of functions begin with a verb in the imperative; properties and classes may be noun phrases."""

import ast
from pathlib import Path

import pytest
from test_rules import FILES, functions, relative

VERBS = frozenset((Path(__file__).parent / "verbs.txt").read_text().split())
"""Add to them what an imperative needs; a noun that is no verb has no place there."""
PROPERTIES = ("property", "cached_property", "setter")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    for function in functions(path):
        if any(ast.unparse(decorator).endswith(PROPERTIES) for decorator in function.decorator_list):
            continue
        docstring = ast.get_docstring(function)
        where = f"{relative(path)}:{function.lineno} {function.name}"
        assert docstring is None or docstring.split()[0].strip(".,:;") in VERBS, f"{where}: {docstring!r}"
