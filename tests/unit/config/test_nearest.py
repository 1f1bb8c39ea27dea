"""Suggestions for misspelt names."""

import re
from dataclasses import fields

import pytest

from megatrain.config.aliases import INSTEAD, SAME
from megatrain.config.load import keys, unknown_key
from megatrain.config.nearest import nearest
from megatrain.train.config import Config


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("train.step", "train.steps"),
        ("steps", "train.steps"),
        ("lr", "optim.lr"),
        ("learning.lr", "optim.lr"),
        ("seqlen", "seq_len"),
        ("model.nheads", "model.n_heads"),
        ("model.num_layers", "model.n_layers"),
        ("checkpoint.evry", "checkpoint.every"),
        ("modle", "model"),
        ("data.tokeniser.kind", "data.tokenizer.kind"),
        ("global_batch", "global_batch_size"),
        ("Train.Seed", "train.seed"),
    ],
)
def test_the_key_that_was_meant_comes_first(typo: str, meant: str) -> None:
    assert nearest(typo, keys(Config))[0] == meant


@pytest.mark.parametrize("word", ["foo", "xyzzy", "", "1"])
def test_nothing_is_suggested_for_a_stranger(word: str) -> None:
    assert nearest(word, keys(Config)) == ()


def test_names_of_other_frameworks_lead_to_keys_that_exist() -> None:
    groups = {field.name for field in fields(Config)}
    assert set(SAME) <= {*keys(Config), *groups}
    named = {key for text in INSTEAD.values() for key in re.findall(r"\b[a-z]+\.[a-z]\w+(?:\.\w+)*", text)}
    assert named <= set(keys(Config))


def test_a_name_has_one_meaning() -> None:
    names = [name for known in SAME.values() for name in known] + list(INSTEAD)
    assert sorted(names) == sorted(set(names))
    assert not set(names) & {key for key in keys(Config) if "." not in key}


@pytest.mark.parametrize("word", ["learning_rate", "optimizer.Learning-Rate", "train.lr", "lr"])
def test_a_name_is_known_in_any_section(word: str) -> None:
    assert unknown_key(Config, word, 1).rule == "this key is called optim.lr"


def test_no_more_than_asked_and_none_of_none() -> None:
    assert nearest("aaa", ["aab", "aac", "aad"], 2) == ("aab", "aac")
    assert nearest("aaa", []) == ()
