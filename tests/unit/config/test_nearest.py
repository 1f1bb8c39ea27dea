"""Suggestions for misspelt names."""

import pytest

from megatrain.config.load import keys
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


def test_no_more_than_asked_and_none_of_none() -> None:
    assert nearest("aaa", ["aab", "aac", "aad"], 2) == ("aab", "aac")
    assert nearest("aaa", []) == ()
