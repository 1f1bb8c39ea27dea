"""Random batches with documents as text has them."""

import numpy as np
import pytest
import torch

from benchmarks.gpu.training import flops_needed
from benchmarks.synthetic import (
    MEAN_OF_SHORT,
    MEAN_OF_TEXT,
    document_lengths,
    mean_document,
    random_batch,
    visible_pairs,
)
from megatrain.models.flops import flops_per_token
from megatrain.models.gpt2.config import GPT2Config
from megatrain.train.config import Config

MODEL = GPT2Config(n_layers=2, hidden_size=32, n_heads=4, ffn_size=64, vocab_size=199)


def config(seq_len: int) -> Config:
    return Config(model=MODEL, seq_len=seq_len, micro_batch_size=2, global_batch_size=4)


def test_lengths_have_the_stated_mean_and_median() -> None:
    lengths = document_lengths("text", 4_000_000, np.random.default_rng(0))
    assert lengths.sum() >= 4_000_000
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(
        MEAN_OF_TEXT, rel=0.05
    )  # 3,500 documents, which spread by 1.3 means
    assert np.median(lengths) == pytest.approx(MEAN_OF_TEXT * np.exp(-0.5), rel=0.05)
    short = document_lengths("short", 400_000, np.random.default_rng(0))
    assert short.mean() == pytest.approx(1 + MEAN_OF_SHORT, rel=0.05)


def test_a_seed_gives_the_same_batch_and_documents_separate_its_attention() -> None:
    one, same, other = (random_batch(config(512), seed=seed, packed="short") for seed in (0, 0, 1))
    assert torch.equal(one.micro_batches[0].tokens, same.micro_batches[0].tokens)
    assert not torch.equal(one.micro_batches[0].tokens, other.micro_batches[0].tokens)
    ids = torch.cat([part.doc_ids for part in one.micro_batches if part.doc_ids is not None])
    assert ids.shape == (4, 512)
    counts = [int(row.max()) + 1 for row in ids]
    assert mean_document(one) == pytest.approx(4 * 512 / sum(counts))
    causal = torch.ones(512, 512, dtype=torch.bool).tril()
    pairs = ((ids[:, :, None] == ids[:, None, :]) & causal).sum().item()
    assert visible_pairs(one) == pairs / 4


def test_without_documents_a_sequence_is_one() -> None:
    batch = random_batch(config(64), seed=0)
    assert batch.micro_batches[0].doc_ids is None
    assert mean_document(batch) == 64
    assert visible_pairs(batch) == 64 * 65 / 2


def test_flops_that_masks_leave() -> None:
    """All pairs and the causal ones give the two conventions, none gives the products of weights alone."""
    full, causal = (flops_per_token(MODEL, 64, causal=each) for each in (False, True))
    pairs = {"full": 64.0**2, "causal": 64 * 65 / 2, "none": 0.0}
    found = {name: flops_needed(full, causal, seq_len=64, pairs=count) for name, count in pairs.items()}
    attention = (
        3 * 2 * 2 * 32 * 2 * 64
    )  # forward and backward twice, two products of 2 FLOPs, width 32, two layers
    assert found["full"] == pytest.approx(full)
    assert found["causal"] == pytest.approx(causal)
    assert found["full"] - found["none"] == pytest.approx(attention)
