"""Configs as YAML text."""

import pytest
import yaml

from megatrain.config.errors import UserError
from megatrain.config.load import dump
from megatrain.config.schema import ConfigError
from megatrain.config.text import from_yaml, to_yaml
from megatrain.optim.config import AdamWConfig
from megatrain.train.config import Config, RunConfig, TrainConfig


@pytest.mark.parametrize(
    "cfg",
    [
        Config(),
        Config(
            train=TrainConfig(allow_changes=("model.*", "*"), ema_decay=0.999),
            optim=AdamWConfig(lr=1e-7, eps=1e-20),
        ),
        Config(run=RunConfig(name="1e3", dir="Läufe/ü: #x '\"{}")),
    ],
)
def test_round_trip(cfg: Config) -> None:
    text = to_yaml(cfg)
    assert from_yaml(Config, text) == cfg
    assert yaml.safe_load(text) == dump(cfg)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("3E4", 3e4), ("1.5e+2", 150.0), (".5e1", 5.0), ("2", 2.0)]
)
def test_numbers_may_be_written_as_usual(written: str, value: float) -> None:
    assert from_yaml(Config, f"optim: {{kind: adamw, lr: {written}}}").optim.lr == value


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert from_yaml(Config, "run: {name: '1e3'}").run.name == "1e3"


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "just text", "a: b: c", "\t- x"])
def test_what_is_no_config_is_a_users_mistake(text: str) -> None:
    with pytest.raises(UserError, match="This config is not") as caught:
        from_yaml(Config, text)
    assert caught.value.exit_code == 2


def test_objects_are_never_made() -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        from_yaml(Config, "run: !!python/object/apply:os.getcwd []")


def test_mistakes_in_the_text_are_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.stepz=3"):
        from_yaml(Config, "train: {stepz: 3}")
