"""What may differ when a run goes on."""

from dataclasses import replace

import pytest

from megatrain.config.errors import UserError
from megatrain.observe.config import LogConfig
from megatrain.optim.config import AdamWConfig, SGDConfig
from megatrain.train.config import Config, RunConfig, TrainConfig
from megatrain.train.resume import FREE, changed_keys, check_same_data, check_same_run

OLD = Config()


def test_watching_storing_and_cutting_are_free() -> None:
    new = replace(OLD, log=LogConfig(every=7), run=RunConfig(dir="/elsewhere"), micro_batch_size=2)
    assert changed_keys(OLD, new) == {}


def test_what_changes_the_run_is_refused_by_name_with_both_values() -> None:
    new = replace(OLD, optim=AdamWConfig(lr=0.5), seq_len=128)
    with pytest.raises(UserError) as refusal:
        check_same_run(OLD, new)
    message = str(refusal.value)
    assert "optim.lr: was 0.001, now 0.5" in message
    assert "seq_len: was 256, now 128" in message
    assert "train.allow_changes=[" in message


def test_allowed_changes_are_returned() -> None:
    new = replace(OLD, optim=AdamWConfig(lr=0.5), train=TrainConfig(allow_changes=("optim.*",)))
    assert check_same_run(OLD, new) == {"optim.lr": (0.001, 0.5)}


def test_another_optimizer_is_a_change() -> None:
    assert "optim.kind" in changed_keys(OLD, replace(OLD, optim=SGDConfig()))


def test_data_is_compared_by_content() -> None:
    assert not check_same_data("aa", "aa", OLD)
    with pytest.raises(UserError, match="fingerprint"):
        check_same_data("aa", "bb", OLD)
    assert check_same_data("aa", "bb", replace(OLD, train=TrainConfig(allow_changes=("data.path",))))


def test_every_free_key_exists() -> None:
    from megatrain.config.load import keys

    known = keys(Config)
    for pattern in FREE:
        assert any(
            key == pattern or (pattern.endswith(".*") and key.startswith(pattern[:-1])) for key in known
        )


@pytest.mark.parametrize(
    ("new", "key"),
    [
        (replace(OLD, model=replace(OLD.model, n_layers=OLD.model.n_layers + 1)), "model.n_layers"),
        (replace(OLD, model=replace(OLD.model, attention_bias=True)), "model.attention_bias"),
        (replace(OLD, optim=SGDConfig()), "optim.kind"),
        (replace(OLD, train=TrainConfig(ema_decay=0.9)), "train.ema_decay"),
        (replace(OLD, train=TrainConfig(precision="fp64")), "train.precision"),
    ],
)
def test_a_change_that_no_checkpoint_can_follow_is_refused_even_if_allowed(new: Config, key: str) -> None:
    for allowed in ((), ("*",)):
        with pytest.raises(UserError) as refusal:
            check_same_run(OLD, replace(new, train=replace(new.train, allow_changes=allowed)))
        message = str(refusal.value)
        assert f"  {key}: was " in message
        assert "allow_changes" not in message
        assert "run.name=" in message


def test_a_change_of_the_model_that_keeps_its_tensors_can_be_allowed() -> None:
    model = replace(OLD.model, rope_theta=5e5)
    with pytest.raises(UserError, match=r"allow_changes=\[model.rope_theta\]"):
        check_same_run(OLD, replace(OLD, model=model))
    allowed = replace(OLD, model=model, train=TrainConfig(allow_changes=("model.rope_theta",)))
    assert check_same_run(OLD, allowed).keys() == {"model.rope_theta"}
