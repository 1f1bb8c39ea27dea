"""Rules of the model's options."""

import pytest

from megatrain.config.load import load
from megatrain.config.schema import ConfigError
from megatrain.models.llama3.config import Llama3Config

WRONG = {
    "rope_scaling.low_freq_factor": {"low_freq_factor": 4.0, "high_freq_factor": 4.0},
    "rope_scaling.beta_slow": {"kind": "yarn", "beta_slow": 40.0},
    "rope_scaling.attention_factor": {"kind": "yarn", "attention_factor": 0.0},
    "rope_scaling.factor": {"factor": 0.5},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_scaling_that_would_divide_by_zero_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}="):
        load(Llama3Config, {"rope_scaling": WRONG[field]})


def test_all_problems_of_a_model_are_reported_at_once() -> None:
    data = {"hidden_size": 100, "n_heads": 3, "n_kv_heads": 2, "logit_softcap": -1.0}
    with pytest.raises(ConfigError) as caught:
        load(Llama3Config, data)
    assert [problem.field for problem in caught.value.problems] == ["logit_softcap", "n_heads", "n_kv_heads"]


def test_latent_attention_refuses_options_of_the_other_kind() -> None:
    data = {"mla": {"qk_rope_head_dim": 5}, "n_kv_heads": 2, "qk_norm": True}
    with pytest.raises(ConfigError) as caught:
        load(Llama3Config, data)
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"mla.qk_rope_head_dim", "n_kv_heads", "qk_norm"}


def test_a_temperature_of_latent_attention_is_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling\.mscale=0\.7: is an option of latent attention"):
        load(Llama3Config, {"rope_scaling": {"kind": "yarn", "mscale": 0.7}})
