"""The strict loader: types against pydantic, every mistake at once, and the way back."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from megatrain.config.load import accepts, check, digest, dump, flatten, hint_at, keys, kind_of, load
from megatrain.config.ranges import PositiveCount
from megatrain.config.schema import ConfigError, Problem, config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.optim.config import OptimConfig, SGDConfig
from megatrain.train.config import Config

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -3,
        1.0,
        2.5,
        "",
        "1",
        "true",
        "none",
        "auto",
        "bf16",
        "gpt2",
        "adamw",
        "qwen3",
    ),
    *([], [1], ["a"], ["a", "b"], ["a", 1], [None], {}, {"a": 1}),
]


@config
class Inner:
    kind: Literal["inner"] = "inner"
    size: PositiveCount = 1


@config
class Other:
    kind: Literal["other"] = "other"
    names: tuple[str, ...] = ()


@config
class Outer:
    part: Inner | Other = Inner()
    maybe: Inner | None = None
    rate: float = 0.5
    count: int | None = None
    either: int | float = 1

    def problems(self) -> Iterator[Problem]:
        if isinstance(self.part, Inner) and self.part.size > 10:
            yield Problem("part.size", self.part.size, "must be at most 10", (10,))


def broken(cls: type, data: dict[str, Any]) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(cls, data)
    return {problem.field: problem for problem in caught.value.problems}


def leaf_hints() -> dict[str, Any]:
    leaves = flatten(Config()) | {
        f"model.rope_scaling.{key}": None for key in ("kind", "factor", "attention_factor")
    }
    return {path: hint_at(Config, path) for path in leaves}


OPTIONAL_CONFIGS = ("model.rope_scaling", "model.experts", "model.mla", "model.classifier")


@pytest.mark.parametrize("path", [path for path in leaf_hints() if path not in OPTIONAL_CONFIGS])
def test_leaf_types_are_judged_as_by_pydantic(path: str) -> None:
    hint = leaf_hints()[path]
    adapter = TypeAdapter(hint)
    for value in VALUES:
        try:
            adapter.validate_json(json.dumps(value), strict=True)
            legal = True
        except ValidationError:
            legal = False
        assert accepts(hint, value) == legal, (path, value)


def test_defaults_round_trip() -> None:
    assert load(Config, {}) == Config()
    assert load(Config, dump(Config())) == Config()


def test_changed_values_round_trip_and_stay_hashable() -> None:
    data = {
        "model": {
            "kind": "gpt2",
            "n_layers": 3,
            "rope_scaling": {"kind": "yarn", "factor": 4},
            "vocab_size": 9000,
        },
        "optim": {"kind": "sgd", "momentum": 0},
        "train": {"allow_changes": ["a", "b"], "stop_at": 7, "ema_decay": 0.9},
    }
    cfg = load(Config, data)
    assert isinstance(cfg.model, GPT2Config)
    assert isinstance(cfg.optim, SGDConfig)
    assert cfg.model.rope_scaling is not None
    assert (cfg.model.rope_scaling.factor, type(cfg.model.rope_scaling.factor)) == (4.0, float)
    assert cfg.train.allow_changes == ("a", "b")
    assert load(Config, json.loads(json.dumps(dump(cfg)))) == cfg
    assert hash(cfg) == hash(load(Config, dump(cfg)))


def test_numbers_take_the_declared_type() -> None:
    cfg = load(Outer, {"rate": 2, "either": 3})
    assert (cfg.rate, type(cfg.rate)) == (2.0, float)
    assert (cfg.either, type(cfg.either)) == (3, int)


def test_all_mistakes_are_reported_at_once() -> None:
    found = broken(
        Config,
        {
            "trian": {"steps": 3},
            "train": {"stepz": 3, "steps": 1e3, "precision": "bf17", "allow_changes": ["a", 3]},
            "model": {"kind": "qwen3", "n_heads": 7, "hidden_size": 256},
            "optim": {"lr": 1},
            "schedule": {"kind": "cosin"},
            "data": None,
            "seq_len": True,
            "micro_batch_size": 3,
            "parallel": {"tp": 0},
        },
    )
    legal = {path: problem.legal for path, problem in found.items()}
    assert legal == {
        "trian": ("train",),
        "train.stepz": ("train.steps",),
        "train.steps": (1000,),
        "train.precision": ("bf16",),
        "train.allow_changes": (),
        "model.n_heads": (4, 8),
        "optim.kind": (),
        "schedule.kind": ("cosine",),
        "data": (),
        "seq_len": (),
        "micro_batch_size": (2, 4),
        "parallel.tp": (1,),
    }
    assert found["train.precision"].rule == "must be one of auto, fp32, bf16, fp8, fp64"
    assert found["optim.kind"].rule == "must be one of " + ", ".join(
        kind_of(cls) for cls in get_args(OptimConfig)
    )


def test_message_names_field_value_rule_and_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            Config,
            {"model": {"kind": "qwen3", "n_heads": 7}, "log": {"tensorboard": "true"}, "foo": {"a": 1}},
        )
    assert str(caught.value).splitlines() == [
        "the config has 3 problems:",
        "  foo={...}: there is no such key.",
        '  log.tensorboard="true": must be true or false.',
        "  model.n_heads=7: must divide hidden_size (256) when head_dim is not set. Nearest legal: 4, 8.",
    ]
    assert caught.value.exit_code == 2


def test_rules_of_inner_classes_have_full_paths() -> None:
    assert set(broken(Outer, {"part": {"kind": "inner", "size": 0}, "maybe": {"size": -1}})) == {
        "part.size",
        "maybe.size",
    }


def test_a_field_of_wrong_type_is_reported_once() -> None:
    found = broken(Outer, {"part": {"kind": "inner", "size": "many"}})
    assert [problem.rule for problem in found.values()] == ["must be an integer"]
    with pytest.raises(ConfigError) as caught:  # the default that stands in for "x" would break a rule
        load(Config, {"schedule": {"kind": "cosine", "warmup_steps": "x"}, "train": {"steps": 10}})
    assert [problem.rule for problem in caught.value.problems] == ["must be an integer or auto"]


def test_check_repairs_by_defaults() -> None:
    cfg, problems = check(Outer, {"rate": "x", "part": {"kind": "other", "names": ["a"]}, "maybe": 3})
    assert cfg == Outer(part=Other(names=("a",)))
    assert [problem.field for problem in problems] == ["maybe", "rate"]


@pytest.mark.parametrize("value", [None, 3, "inner", ["inner"]])
def test_a_section_must_be_a_mapping(value: object) -> None:
    assert set(broken(Outer, {"part": value})) == {"part"}


def test_null_is_legal_where_declared() -> None:
    assert load(Outer, {"maybe": None, "count": None}).maybe is None


def test_nan_breaks_bounds() -> None:
    assert set(broken(Config, {"optim": {"kind": "adamw", "lr": float("nan"), "beta1": float("nan")}})) == {
        "optim.lr",
        "optim.beta1",
    }


def test_flatten_has_every_leaf_in_order() -> None:
    assert flatten(Outer(part=Other(names=("x",)))) == {
        "part.kind": "other",
        "part.names": ("x",),
        "maybe": None,
        "rate": 0.5,
        "count": None,
        "either": 1,
    }


def test_digest_is_of_the_values_in_sorted_json() -> None:
    expected = hashlib.sha256(b'{"kind":"inner","size":4}').hexdigest()
    assert digest(Inner(size=4)) == expected
    assert digest(Inner(size=5)) != expected


def test_keys_cover_every_kind() -> None:
    assert keys(Outer) == (
        *("part", "part.kind", "part.size", "part.names"),
        *("maybe", "maybe.kind", "maybe.size", "rate", "count", "either"),
    )
    assert hint_at(Config, "optim.momentum") is float
    assert hint_at(Config, "optim.nothing") is None
    assert hint_at(Config, "nothing.at.all") is None


def test_default_model_is_of_its_declared_kind() -> None:
    assert isinstance(load(Config, {}).model, Qwen3Config)
