"""Documentation of keys, compared with what pydantic reads from the same source."""

from typing import Any, get_args

from megatrain.config.docs import Key, describe, json_schema
from megatrain.config.load import flatten, kind_of
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import DecoderConfig
from megatrain.optim.config import AdamWConfig, OptimConfig, SGDConfig
from megatrain.train.config import Config


def by_path() -> dict[str, Key]:
    return {key.path: key for key in describe(Config)}


def test_every_leaf_of_the_default_config_is_described() -> None:
    described = by_path()
    assert set(flatten(Config())) - {
        "model.rope_scaling",
        "model.experts",
        "model.mla",
        "model.classifier",
    } <= set(described)
    assert "optim.momentum" in described
    assert "model.rope_scaling.factor" in described


def test_docs_are_those_that_pydantic_finds() -> None:
    schema = json_schema(DecoderConfig)
    expected = {name: part.get("description", "") for name, part in schema["properties"].items()}
    found = {key.path: key.doc for key in describe(DecoderConfig) if "." not in key.path}
    assert found.items() <= {name: " ".join(text.split()) for name, text in expected.items()}.items()
    assert found["n_heads"] == "Number of query heads."


def test_a_field_redefined_without_words_keeps_its_base_class_words() -> None:
    found = {key.path: key.doc for key in describe(Qwen3Config)}
    assert found["vocab_size"] == "Number of embedding rows; at least the tokenizer's vocabulary size."


def test_defaults_name_the_kinds_where_they_differ() -> None:
    lr = by_path()["optim.lr"]
    assert lr.default.startswith(f"adamw: {AdamWConfig().lr}, sgd: {SGDConfig().lr}, ")
    assert by_path()["optim.clip_norm"].default == "1.0"
    assert by_path()["optim.momentum"].only == ("sgd", "muon")
    assert by_path()["optim.kind"].type == "one of " + ", ".join(
        kind_of(cls) for cls in get_args(OptimConfig)
    )
    assert by_path()["train.stop_at"].default == "null"
    assert by_path()["log.tensorboard"].default == "false"


def test_json_schema_forbids_unknown_keys_everywhere() -> None:
    schema = json_schema(Config)
    objects: list[dict[str, Any]] = [schema, *schema["$defs"].values()]
    assert all(each["additionalProperties"] is False for each in objects)
    assert kind_of(SGDConfig) == schema["$defs"]["SGDConfig"]["properties"]["kind"]["const"]
