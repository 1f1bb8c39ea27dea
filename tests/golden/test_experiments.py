"""The bare command and every experiment compose to their golden texts; one misspelt key is an error that names it.

After a wanted change: `python tests/golden/regenerate.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatrain.cli.compose import Source, compose
from megatrain.cli.conf import group_options
from megatrain.config.load import dump, load
from megatrain.config.schema import ConfigError
from megatrain.config.text import from_yaml, to_yaml
from megatrain.train.config import Config

HERE = Path(__file__).parent
EXPERIMENTS = sorted((HERE.parents[1] / "conf" / "experiment").glob("*.yaml"))


def leaves(data: dict[str, object], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def misspelt(data: dict[str, object], path: tuple[str, ...]) -> dict[str, object]:
    """`data` with the last key of `path` doubled at its end."""
    key, *rest = path
    if rest:
        return {name: misspelt(value, tuple(rest)) if name == key else value for name, value in data.items()}  # type: ignore[arg-type]
    return {name + name[-1] * (name == key): value for name, value in data.items()}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_is_as_it_was(path: Path) -> None:
    cfg = compose([f"experiment={path.stem}"])
    golden = (HERE / path.name).read_text(encoding="utf-8")
    assert to_yaml(cfg) == golden
    assert from_yaml(Config, golden) == load(Config, dump(cfg)) == cfg


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_misspelt_twin_fails(path: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [leaf for leaf in leaves(body) if leaf[0] != "defaults"]
    assert keys, "an experiment says something"
    for number, leaf in enumerate(keys):
        name = f"{path.stem}_misspelt_{number}"
        twin = "# @package _global_\n" + yaml.safe_dump(misspelt(body, leaf), sort_keys=False)
        (tmp_path / "experiment" / f"{name}.yaml").write_text(twin, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            compose([f"experiment={name}"], Source(str(tmp_path)))
        wrong = ".".join(leaf) + leaf[-1][-1]
        (problem,) = [each for each in caught.value.problems if each.field == wrong]
        assert problem.rule == "there is no such key"
        assert ".".join(leaf) in problem.legal


def test_every_golden_text_has_its_experiment() -> None:
    assert {path.name for path in HERE.glob("*.yaml")} == {
        "default.yaml",
        *(path.name for path in EXPERIMENTS),
    }
    assert EXPERIMENTS


def test_the_bare_command_is_as_it_was() -> None:
    assert to_yaml(compose([])) == (HERE / "default.yaml").read_text(encoding="utf-8")


WITH = {
    "preferences": ["objective=dpo"],
    "dpo": ["data=preferences", "data.path=my.jsonl"],
    "grpo": ["data=chat", "data.path=my.jsonl", "objective.group_size=4"],
    "distill": ["objective.teacher=runs/large"],
    "images": ["model=vit"],
}
"""What an option needs beside it."""
OPTIONS = [
    (group, option)
    for group, options in group_options().items()
    for option in options
    if group != "experiment"
]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    path = ["data.path=my.txt"] if group == "data" and option not in ("stdlib", "synthetic") else []
    path += WITH.get(option, [])
    model = ["model=llama3_8b"] if group == "recipe" else []  # whose sequences may be as long as any recipe's
    if group == "recipe" and option in ("vit", "convnet"):
        model = [f"model={option}"]
    assert isinstance(compose([f"{group}={option}", *path, *model]), Config)


@pytest.mark.parametrize("text", ["a: 1", "train: {steps: 3}"])
def test_misspelt_changes_one_key(text: str) -> None:
    data = yaml.safe_load(text)
    (leaf,) = leaves(data)
    assert list(leaves(misspelt(data, leaf))) == [(*leaf[:-1], leaf[-1] + leaf[-1][-1])]
