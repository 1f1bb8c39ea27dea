"""`data.clean` as users write it: lists of steps in YAML and on the command line."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.cli.compose import compose
from megatrain.config.docs import describe, json_schema
from megatrain.config.load import check, config_classes, dump, flatten, hints, kind_of, load, members
from megatrain.config.ranges import ranges
from megatrain.config.schema import ConfigError, shown
from megatrain.config.text import from_yaml, to_yaml
from megatrain.data.clean.config import CleanStep, GopherRules, QualityStep
from megatrain.data.config import DataConfig
from megatrain.train.config import Config

STEPS = {kind_of(cls): cls for cls in config_classes(CleanStep)}
NEEDED: dict[str, dict[str, Any]] = {
    "language": {"keep": ["en"]},
    "decontaminate": {"against": ["eval.jsonl"]},
}
CORPUS = ("exact_duplicates", "near_duplicates")


def described(kind: str) -> dict[str, Any]:
    return {"kind": kind, **NEEDED.get(kind, {})}


def refusals(steps: Any, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(DataConfig, {"clean": steps, **more})
    return [str(problem) for problem in caught.value.problems]


def test_a_name_is_the_step_with_its_defaults() -> None:
    names = [kind for kind in STEPS if kind not in NEEDED]
    assert load(DataConfig, {"clean": names}) == load(
        DataConfig, {"clean": [{"kind": kind} for kind in names]}
    )
    by_name = load(DataConfig, {"clean": [{"kind": "quality", "rules": "gopher"}]}).clean
    assert by_name == (QualityStep(rules=GopherRules()),)


def test_all_steps_round_trip() -> None:
    cfg = load(Config, {"data": {"clean": [described(kind) for kind in STEPS]}})
    assert {step.kind for step in cfg.data.clean} == set(STEPS)
    assert load(Config, dump(cfg)) == cfg
    assert from_yaml(Config, to_yaml(cfg)) == cfg
    hash(cfg)
    assert flatten(cfg)["data.clean"] == cfg.data.clean


def test_the_command_line_takes_names_and_mappings() -> None:
    cfg = compose(
        [
            "data=text",
            "data.path=x",
            "data.clean=[fix_text,{kind:quality,rules:c4},{kind:language,keep:[en,de]}]",
        ]
    )
    assert [step.kind for step in cfg.data.clean] == ["fix_text", "quality", "language"]
    assert compose(["data.clean=[pii]"]).data.clean == load(DataConfig, {"clean": ["pii"]}).clean


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("pii", "clean=pii: must be a list of fix_text, normalize, html, language, quality, repetition, pii, text8, "
                "decontaminate, exact_duplicates, near_duplicates. Nearest legal: [pii]."),
        (["fix_txt"], "clean[0].kind=fix_txt: must be one of fix_text, "),
        ([7], "clean[0]=7: must be a mapping of keys to values."),
        (["language"], "clean[0].keep=[]: must name at least one language, such as [en]."),
        (["decontaminate"], "clean[0].against=[]: must name at least one file."),
        ([{"kind": "pii", "mask": []}], "clean[0].mask=[]: must name at least one of email, ip, phone, card, iban."),
        (["pii", {"kind": "language", "keep": ["en"], "at_leest": 1}],
         "clean[1].at_leest=1: there is no such key. Nearest legal: clean[1].at_least."),
        ([{"kind": "language", "keep": ["en"], "at_least": 1.5}], "clean[0].at_least=1.5: must be between 0 and 1."),
        ([{"kind": "quality", "rules": "gofer"}], "clean[0].rules.kind=gofer: must be one of gopher, c4, fineweb."),
        ([{"kind": "quality", "rules": {"kind": "gopher", "min_words": 9, "max_words": 8}}],
         "clean[0].rules.min_words=9: must be at most max_words (8)."),
        ([{"kind": "quality", "rules": {"kind": "gopher", "min_word_length": 9, "max_word_length": 8}}],
         "clean[0].rules.min_word_length=9.0: must be at most max_word_length (8.0)."),
        ([{"kind": "quality", "rules": {"kind": "c4", "min_sentences": -1}}],
         "clean[0].rules.min_sentences=-1: must be at least 0. Nearest legal: 0."),
        ([{"kind": "repetition", "top_ngrams": [0.1]}],
         "clean[0].top_ngrams=[0.1]: must be three fractions, for n = 2, 3, 4."),
        ([{"kind": "repetition", "duplicate_ngrams": []}],
         "clean[0].duplicate_ngrams=[]: must be six fractions, for n = 5 to 10."),
        ([{"kind": "near_duplicates", "threshold": 0}], "clean[0].threshold=0: must be between 0.1 and 1."),
        (["exact_duplicates", "pii"],
         "clean[1].kind=pii: must come before exact_duplicates, which compares whole documents as all other steps "
         "leave them."),
        (["exact_duplicates", "near_duplicates", "exact_duplicates"],
         "clean[2].kind=exact_duplicates: stands in the list already; remove one."),
    ],
)  # fmt: skip
def test_mistakes_are_named(steps: Any, said: str) -> None:
    assert any(problem.startswith(said) for problem in refusals(steps)), refusals(steps)


def test_all_mistakes_are_named_at_once() -> None:
    said = refusals(
        [{"kind": "pii", "mask": []}, "nothing", {"kind": "normalize", "form": "NFX"}, "language"]
    )
    assert [each.partition("=")[0] for each in said] == [
        "clean[1].kind",
        "clean[2].form",
        "clean[0].mask",
        "clean[3].keep",
    ]


def test_synthetic_data_is_not_cleaned() -> None:
    (said,) = refusals(["pii"], kind="synthetic")
    assert "synthetic data has no text to clean" in said


def test_home_directories_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load(DataConfig, {"clean": [{"kind": "decontaminate", "against": ["~/eval.txt", "b.txt"]}]})
    assert cfg.clean[0].against == ("/home/me/eval.txt", "b.txt")  # type: ignore[union-attr]


def test_every_key_is_documented_and_has_a_range() -> None:
    rows = {key.path: key for key in describe(DataConfig)}
    for kind, cls in STEPS.items():
        for name in hints(cls):
            if name in ("kind", "rules"):
                continue
            assert rows[f"clean[{kind}].{name}"].doc, (kind, name)
    assert rows["clean[quality].rules.min_sentences"].only == ("c4",)
    assert all(row.doc for path, row in rows.items() if path.startswith("clean"))
    for cls in [*STEPS.values(), *config_classes(hints(QualityStep)["rules"])]:
        numbers = {name for name, hint in hints(cls).items() if "float" in str(hint) or "int" in str(hint)}
        assert numbers - set(ranges(cls)) == set(), cls


def test_the_json_schema_has_the_steps() -> None:
    schema = json_schema(DataConfig)
    assert "NearDuplicatesStep" in schema["$defs"]
    assert all(each["additionalProperties"] is False for each in schema["$defs"].values())


def test_steps_are_shown_as_they_are_written() -> None:
    step = load(DataConfig, {"clean": [{"kind": "language", "keep": ["en"]}]}).clean
    assert shown(step) == "[{kind:language,keep:[en],at_least:0.65}]"


def values(hint: Any) -> st.SearchStrategy[Any]:
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({})
    )
    choices = [
        arg for member in members(hint) for arg in getattr(member, "__args__", ()) if isinstance(arg, str)
    ]
    return st.one_of(plain, st.sampled_from(choices)) if choices else plain


@given(st.data())
def test_any_value_is_refused_or_taken(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(STEPS)))
    name = data.draw(st.sampled_from(list(hints(STEPS[kind]))))
    step = described(kind) | {name: data.draw(values(hints(STEPS[kind])[name]))}
    cfg, broken = check(DataConfig, {"clean": [step]})
    assert all(problem.field.startswith("clean[0]") for problem in broken)
    assert broken or load(DataConfig, dump(cfg)) == cfg
