"""Ranges of numbers, and suggestions that are legal beside the rest of the config."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from megatrain.cli.compose import compose
from megatrain.config.docs import describe, json_schema
from megatrain.config.legal import confirmed, exists
from megatrain.config.load import check, config_classes, hints, item_classes, load
from megatrain.config.ranges import FLOAT32_TINY, MAX_INT, MAX_SIZE, Range, ranges
from megatrain.config.schema import ConfigError
from megatrain.optim.config import MuonConfig
from megatrain.train.config import Config


def classes(cls: type) -> Iterator[type]:
    yield cls
    for hint in hints(cls).values():  # type: ignore[arg-type]
        for inner in (*config_classes(hint), *item_classes(hint)):
            yield from classes(inner)


def numeric(hint: Any) -> bool:
    return hint in (int, float) or any(map(numeric, get_args(hint)))


@pytest.mark.parametrize("cls", sorted(set(classes(Config)), key=lambda cls: cls.__name__))
def test_every_number_has_a_range(cls: type) -> None:
    numbers = {name for name, hint in hints(cls).items() if numeric(hint)}  # type: ignore[arg-type]
    assert set(ranges(cls)) == numbers  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("allowed", "value", "rule", "near"),
    [
        (Range(at_least=0, below=1), 1.0, "must be at least 0 and below 1", None),
        (Range(at_least=0, below=1), -0.5, "must be at least 0 and below 1", 0),
        (Range(at_least=0, below=1), 1 - 2**-30, "must be at least 0 and below 1, also when rounded to float32", None),
        (Range(above=0), 0.0, "must be above 0", None),
        (Range(above=0), 5e-324, "must be 0 or a float32, 1.2e-38 to 3.4e+38 in size", None),
        (Range(at_least=0), 1e39, "must be 0 or a float32, 1.2e-38 to 3.4e+38 in size", None),
        (Range(at_least=0), 1e-39, "must be 0 or a float32, 1.2e-38 to 3.4e+38 in size", 0),
        (Range(at_least=0), math.nan, "must be finite", None),
        (Range(at_least=0), math.inf, "must be finite", None),
        (Range(at_least=0, at_most=0.5), 0.6, "must be between 0 and 0.5", 0.5),
        (Range(at_least=1, at_most=MAX_SIZE), 0, "must be at least 1", 1),
        (Range(at_least=1, at_most=MAX_SIZE), MAX_SIZE + 1, f"must be at most {MAX_SIZE}", MAX_SIZE),
        (Range(at_least=1), 10**30, "must fit in 63 bits", MAX_INT),
        (Range(above=0), FLOAT32_TINY, "", None),
        (Range(at_least=0), 0.0, "", None),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing(allowed: Range, value: float, rule: str, near: float | None) -> None:
    assert allowed.broken_rule(value) == rule
    if rule:
        assert allowed.nearest(value) == near


def test_negative_zero_is_zero() -> None:
    cfg = load(Config, {"train": {"z_loss": -0.0}})
    assert math.copysign(1, cfg.train.z_loss) == 1


def test_ranges_are_in_help_and_schema() -> None:
    types = {key.path: key.type for key in describe(Config)}
    assert types["optim.clip_norm"] == "a number or null; above 0"
    momentum = json_schema(MuonConfig)["properties"]["momentum"]
    assert (momentum["minimum"], momentum["exclusiveMaximum"]) == (0, 1)


def test_all_problems_of_a_key_have_the_same_suggestions() -> None:
    """Two rules about parallel.tp, of which one allows 2, which the other does not."""
    with pytest.raises(ConfigError) as caught:
        compose(["train.precision=fp8", "train.fp8_scaling=row", "parallel.tp=3"])
    found = [problem.legal for problem in caught.value.problems if problem.field == "parallel.tp"]
    assert found == [(1,), (1,)]


def test_a_suggestion_that_breaks_another_rule_is_replaced() -> None:
    data = {"global_batch_size": 12, "micro_batch_size": 5, "parallel": {"dp_shard": 2}}
    _, problems = check(Config, data)
    assert [(problem.field, problem.legal) for problem in confirmed(Config, data, problems)] == [
        ("micro_batch_size", (3, 6))
    ]
    data = {
        "seq_len": 4096,
        "model": {"kind": "qwen3", "vocab_size": 4096, "max_seq_len": 1000},
        "parallel": {"cp": 16},
    }
    _, problems = check(Config, data)
    found = {problem.field: problem for problem in confirmed(Config, data, problems)}
    for value in found["seq_len"].legal:
        assert not check(Config, data | {"seq_len": value})[1]


def test_keys_of_other_options_do_not_exist() -> None:
    cfg = Config()
    assert exists(cfg, "optim.beta1")
    assert exists(cfg, "model.experts.n_experts")  # null, but it could be there
    assert not exists(cfg, "optim.momentum")
