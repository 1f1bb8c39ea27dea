"""Key names of earlier versions: run directories are read on, and users are told the present name."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatrain.cli.compose import compose
from megatrain.config.load import load
from megatrain.config.schema import ConfigError
from megatrain.config.text import from_yaml, to_yaml
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import ExpertsConfig
from megatrain.optim.schedule import ConstantConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.auto import resolve_auto
from megatrain.train.config import Config
from megatrain.train.resume import changed_keys

OLD = """
schema_version: 1
engine: native
moe: {backend: loop}
model: {kind: llama3, moe: {n_experts: 4}, latent: null, window: 7}
parallel: {pp: 2, recompute: full, schedule: gpipe, first_layers: [1]}
seq_len: 64
"""
NEW = Config(
    model=Llama3Config(experts=ExpertsConfig(n_experts=4), sliding_window=7),
    parallel=ParallelConfig(pp=2, activation_checkpointing="full", pp_schedule="gpipe", pp_split=(1,)),
    moe=Config().moe.__class__(backend="loop"),
    seq_len=64,
)


def test_a_config_of_an_earlier_version_is_read() -> None:
    assert from_yaml(Config, OLD) == NEW == from_yaml(Config, to_yaml(NEW))


def test_a_whole_run_of_an_earlier_version_is_the_same_run() -> None:
    """As written by the first release for the bare command, whose keys and defaults were others."""
    model = (
        "n_layers=4",
        "hidden_size=128",
        "n_heads=2",
        "head_dim=null",
        "ffn_size=352",
        "sliding_window=null",
    )
    then = [f"model.{word}" for word in (*model, "full_attention_every=null")]
    then += ["optim=adamw", "optim.lr=8e-3", "global_batch_size=8", "schedule.warmup_fraction=0.0243"]
    old = from_yaml(Config, (Path(__file__).parent / "version_1.yaml").read_text(encoding="utf-8"))
    assert not isinstance(old.schedule, ConstantConfig)
    assert (old.schedule.warmup_steps, old.schedule.warmup_fraction) == ("auto", None)
    assert (old.micro_batch_size, old.data.tokenizer.vocab_size) == (8, 2048)
    assert old.schedule.resolved_warmup(400) == 40
    new = compose([*then, "train.steps=1650"])
    as_before = replace(old, schedule=replace(old.schedule, warmup_steps=40))
    assert changed_keys(resolve_auto(as_before, memory=1 << 40), resolve_auto(new, memory=1 << 40)) == {}
    shorter = resolve_auto(compose([*then, "train.steps=330"]), memory=1 << 40)
    assert changed_keys(resolve_auto(as_before, memory=1 << 40), shorter) == {
        "train.steps": (1650, 330),
        "schedule.warmup_steps": (40, 8),
    }


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new in Config.RENAMED.items() if new])
def test_the_command_answers_with_the_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"{old}.*: this key is now {new}"):
        compose([f"{old}=1"])


def test_a_file_is_answered_with_the_new_name() -> None:
    with pytest.raises(ConfigError, match=r"parallel.recompute=full: this key is now"):
        load(Config, {"parallel": {"recompute": "full"}})


def test_a_value_of_an_earlier_version_is_answered_with_the_present_one() -> None:
    for load_it in (
        lambda: compose(["schedule.warmup_steps=null"]),
        lambda: load(Config, {"schedule": {"kind": "cosine", "warmup_steps": None}}),
    ):
        with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=null: .* Nearest legal: auto\."):
            load_it()
