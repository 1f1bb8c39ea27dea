"""Key names of earlier versions: run directories are read on, and users are told the present name."""

import pytest

from megatrain.cli.compose import compose
from megatrain.config.load import load
from megatrain.config.schema import ConfigError
from megatrain.config.text import from_yaml, to_yaml
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import ExpertsConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.config import Config

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


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new in Config.RENAMED.items() if new])
def test_the_command_answers_with_the_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"{old}.*: this key is now {new}"):
        compose([f"{old}=1"])


def test_a_file_is_answered_with_the_new_name() -> None:
    with pytest.raises(ConfigError, match=r"engine=native: this key was removed"):
        load(Config, {"engine": "native"})
    with pytest.raises(ConfigError, match=r"parallel.recompute=full: this key is now"):
        load(Config, {"parallel": {"recompute": "full"}})
