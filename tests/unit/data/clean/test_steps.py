"""Steps in order, their report and their identity."""

import builtins
import json
import random
import sys
import tracemalloc
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.config.errors import UserError
from megatrain.config.load import config_classes, kind_of, load
from megatrain.data.clean import libraries, packages
from megatrain.data.clean.config import CleanStep
from megatrain.data.clean.duplicates import find_duplicates, width
from megatrain.data.clean.outcome import first_difference
from megatrain.data.clean.report import CleaningReport
from megatrain.data.clean.steps import VERSIONS, Cleaner, identity
from megatrain.data.config import DataConfig

KINDS = [kind_of(cls) for cls in config_classes(CleanStep)]
PARAGRAPH = (
    "The history of the lighthouse begins with fires that were lit on the hills along the coast to guide ships. "
    "Later the fires were placed on towers, so that they could be seen from farther away and with less wood. "
)


def steps(*described: Any) -> tuple[CleanStep, ...]:
    return load(DataConfig, {"clean": list(described)}).clean


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "eval.txt"
    path.write_text("a question of thirteen words that nobody has ever asked before this very day")
    return path


@pytest.fixture(scope="module")
def every_step(benchmark_file: Path) -> tuple[CleanStep, ...]:
    needed: dict[str, dict[str, Any]] = {
        "language": {"keep": ["en"]},
        "decontaminate": {"against": [str(benchmark_file)]},
    }
    return steps(*({"kind": kind, **needed.get(kind, {})} for kind in KINDS))


def test_steps_are_applied_in_order() -> None:
    text = "Wri\u0301te to a@b.de"
    masked = Cleaner(steps("normalize", "pii", "text8")).clean(text)
    assert masked.text == " wr te to email"
    assert masked.changed_by == ("normalize", "pii", "text8")
    assert masked.sizes == (16, 17, 15)
    assert (masked.removed_by, masked.reason) == (None, None)


def test_a_removed_document_says_why() -> None:
    found = Cleaner(steps("normalize", {"kind": "quality", "rules": "gopher"}, "pii")).clean("too short")
    assert (found.text, found.removed_by, found.reason) == (None, "quality", "fewer than 50 words")
    assert found.sizes == (9,)
    empty = Cleaner(steps("text8")).clean("!?")
    assert (empty.text, empty.removed_by, empty.reason) == (None, "text8", "nothing was left")


def test_nothing_is_done_without_steps() -> None:
    cleaner = Cleaner(())
    assert cleaner.clean("x").text == "x"
    assert cleaner.fingerprint("x") == b""
    assert identity(()) == []


@pytest.fixture(scope="module")
def cleaners(every_step: tuple[CleanStep, ...]) -> dict[str, Cleaner]:
    """A cleaner of one step each: making one may read a model."""
    return {step.kind: Cleaner((step,)) for step in every_step}


ODD = [
    "\ud800", "\udfff\ud800 x" * 50, "\x00" * 40, " ", "\n\n", "\ufeff", "é" * 1000, "日本語" * 500, "<html><body>",
    "<html>\ud800<p>\x00", "&#55296;", "\u202e" * 9,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts_crash_no_step(
    kind: str, every_step: tuple[CleanStep, ...], cleaners: dict[str, Cleaner]
) -> None:
    chosen = tuple(step for step in every_step if step.kind == kind)
    cleaner, report = cleaners[kind], CleaningReport(chosen)
    for text in ODD:
        found = cleaner.clean(text)
        assert found.text is None or found.text
        assert len(cleaner.fingerprint(text)) == width(chosen)
        report.add("odd", found, text)
    "\n".join(report.lines()).encode()
    json.dumps(report.as_dict()).encode()


SIZE = 300_000
SHAPES = {
    "one word": "a" * SIZE,
    "one line": PARAGRAPH * (SIZE // len(PARAGRAPH)),
    "one-letter words": "a " * (SIZE // 2),
    "lines": "The same line.\n" * (SIZE // 15),
    "blank lines": "\n " * (SIZE // 2) + "x",
    "digits": "1 " * (SIZE // 2),
    "dots": "1." * (SIZE // 2),
    "colons": ":" * SIZE,
    "at": "a@" * (SIZE // 2),
    "pluses": "+1-" * (SIZE // 3),
    "capitals": "DE12" * (SIZE // 4),
    "marks": "a" + "\u0301\u0323" * (SIZE // 2),
    "openings": "<text x>" + "[[category:{{&<ref" * (SIZE // 18),
    "entities": "<text x>" + "&lt;" * (SIZE // 4),
    "brackets": "[[image:|" * (SIZE // 9) + "<text x>",
    "mojibake": "Ã¶" * (SIZE // 2),
    "ampersands": "&" * SIZE,
    "escapes": "\x1b[" * (SIZE // 2),
    "tags": "<div>" * (SIZE // 5),
    "page": "<html><body>" + f"<p>{PARAGRAPH}</p>" * (SIZE // (len(PARAGRAPH) + 7)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
def test_time_is_linear(shape: str, cleaners: dict[str, Cleaner]) -> None:
    """Quadratic time would be minutes for any of these."""
    for cleaner in cleaners.values():
        cleaner.clean(SHAPES[shape])
        cleaner.fingerprint(SHAPES[shape])


def corpus() -> list[tuple[str, str]]:
    rng = random.Random(9)
    vocabulary = [
        f"{word}{n}" for n, word in enumerate(["the", "to", "of", "and", "with", "that", "have", "be"] * 40)
    ]
    documents = []
    for n in range(80):
        words = [*rng.choices(vocabulary, k=rng.randrange(30, 120)), "the", "with"]
        text = " ".join(words) + rng.choice(("", " mail a@b.de", " caf\u0065\u0301"))
        documents += (
            [(f"d{n}", text)] + [(f"d{n}c", text)] * (n % 7 == 0) + [(f"d{n}s", f"{text} x")] * (n % 5 == 0)
        )
    return documents


def cleaned_in_parts(chosen: tuple[CleanStep, ...], parts: int) -> CleaningReport:
    """The report of the corpus, of which each part is cleaned by a cleaner of its own."""
    documents, whole = corpus(), CleaningReport(chosen)
    fingerprints, kept = [], []
    bounds = [len(documents) * part // parts for part in range(parts + 1)]
    for start, end in pairwise(bounds):
        cleaner, report = Cleaner(chosen), CleaningReport(chosen)
        for name, text in documents[start:end]:
            found = cleaner.clean(text)
            report.add(name, found, text)
            if found.text is not None:
                fingerprints.append(cleaner.fingerprint(found.text))
                kept.append((name, found.text))
        whole.merge(report)
    table = np.frombuffer(b"".join(fingerprints), np.uint8).reshape(len(kept), -1)
    sizes = np.array([len(text.encode()) for _, text in kept])
    removed = find_duplicates(table, chosen)
    whole.add_duplicates(removed, ids=[name for name, _ in kept], sizes=sizes, text_of=lambda n: kept[n][1])
    return whole


def test_the_report_does_not_depend_on_how_the_work_is_split() -> None:
    chosen = steps("normalize", "pii", "quality", "exact_duplicates", "near_duplicates")
    one = cleaned_in_parts(chosen, 1)
    for parts in (2, 3, 7, 200):
        other = cleaned_in_parts(chosen, parts)
        assert other.as_dict() == one.as_dict()
        assert other.lines() == one.lines()


def test_the_report_adds_up() -> None:
    chosen = steps("normalize", "pii", "quality", "exact_duplicates", "near_duplicates")
    report: Any = cleaned_in_parts(chosen, 3).as_dict()
    documents = corpus()
    assert report["documents_in"] == len(documents)
    assert report["bytes_in"] == sum(len(text.encode()) for _, text in documents)
    left, size = report["documents_in"], report["bytes_in"]
    for step in report["steps"]:
        assert (step["documents"], step["bytes_before"]) == (left, size)
        left -= sum(step["removed"].values())
        size = step["bytes_after"]
        assert len(step["samples"]) <= 6
    assert (report["documents_out"], report["bytes_out"]) == (left, size)
    by_kind = {step["kind"]: step for step in report["steps"]}
    assert by_kind["exact_duplicates"]["removed"]["equal to an earlier document"] > 3
    assert by_kind["near_duplicates"]["removed"]["similar to an earlier document"] > 3
    assert by_kind["pii"]["changed"] > 3
    assert "is kept" in by_kind["exact_duplicates"]["samples"][0]["what"]
    assert any("[EMAIL]" in sample["after"] for sample in by_kind["pii"]["samples"])


def test_results_do_not_depend_on_what_came_before(every_step: tuple[CleanStep, ...]) -> None:
    texts = [text for _, text in corpus()[:20]] + ODD + [PARAGRAPH * 3]
    one, other = Cleaner(every_step), Cleaner(every_step)
    forwards = [(one.clean(text), one.fingerprint(text)) for text in texts]
    backwards = [(other.clean(text), other.fingerprint(text)) for text in reversed(texts)]
    assert forwards == backwards[::-1]


def test_identity_knows_what_matters(
    tmp_path: Path, benchmark_file: Path, every_step: tuple[CleanStep, ...]
) -> None:
    first = identity(every_step)
    assert json.loads(json.dumps(first)) == first
    assert set(VERSIONS) == set(KINDS)
    moved = tmp_path / "other.txt"
    moved.write_bytes(benchmark_file.read_bytes())
    described = {"kind": "decontaminate", "against": [str(moved)]}
    at = KINDS.index("decontaminate")
    assert identity(steps(described))[0] == first[at]
    moved.write_text("another text")
    assert identity(steps(described))[0] != first[at]
    assert identity(steps({"kind": "normalize", "form": "NFD"})) != identity(steps("normalize"))


LIBRARIES = [(kind, names[0]) for kind, names in packages.PACKAGES.items()]


@pytest.mark.parametrize(("kind", "package"), LIBRARIES)
def test_a_missing_library_says_how_to_get_it(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = steps({"kind": kind} | ({"keep": ["en"]} if kind == "language" else {}))
    said = rf"data\.clean's step {kind} needs the package {package}.* Install it: .* -m pip install {package}"
    libraries._language_identifier.cache_clear()
    with monkeypatch.context() as patch:
        for name in (package, f"{package}.langid"):
            patch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=said):
            Cleaner(chosen)
    monkeypatch.setattr(packages, "version", lambda name: version(f"{name}-that-nobody-has"))
    with pytest.raises(UserError, match=said):
        identity(chosen)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are asked for."""
    seen: list[str] = []
    real = builtins.__import__

    def noting(name: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", noting)
    return seen


def test_libraries_are_imported_only_by_their_steps(imported: list[str]) -> None:
    Cleaner(steps("normalize", "quality", "repetition", "pii", "text8", "exact_duplicates"))
    assert not {package for _, package in LIBRARIES} & set(imported)


def test_first_difference() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a = "".join(rng.choices("ab", k=rng.randrange(300)))
        at = rng.randrange(len(a) + 1)
        b = a[:at] + "x" + a[at:]
        assert first_difference(a, b) == first_difference(b, a) == at
    assert first_difference("abc", "abcd") == 3


def test_finding_duplicates_needs_little_memory() -> None:
    """The documented bound, in bytes per document beside the fingerprints."""
    documents = 50_000
    chosen = steps("exact_duplicates", "near_duplicates")
    table = np.random.default_rng(1).integers(0, 256, (documents, width(chosen)), dtype=np.uint8)
    tracemalloc.start()
    find_duplicates(table, chosen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110 * documents
