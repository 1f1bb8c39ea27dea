"""Examples are packed whole, and the loss of a packed batch is that of its examples, each by itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CFG, STEPS, examples_store
from torch.nn.functional import cross_entropy

from megatrain.config.errors import UserError
from megatrain.data.loader import IGNORED, Loader, validation_batches
from megatrain.data.packing import PackedExamples, pack, too_long
from megatrain.data.store import TokenStore
from megatrain.train.build import build_loader, build_state, left_out_of, packed
from megatrain.train.step import accumulate_gradients

SEQ_LEN = CFG.seq_len


def lengths_of(store: TokenStore) -> np.ndarray:
    return np.diff(store.document_starts, append=store.n_tokens)


def loader(store: PackedExamples, batch: int = 1) -> Loader:
    return Loader(store, store.seq_len, batch, 1, seed=0, mask_documents=True, prefetch=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60).filter(lambda each: min(each) <= 32))
def test_each_example_is_whole_once_and_rows_are_few(lengths: list[int]) -> None:
    store = examples_store(lengths)
    found = pack(store, seq_len=32)
    fitting = [n for n, length in enumerate(lengths) if length <= 32]
    assert sorted(n for row in range(found.n_rows) for n in found.examples_of(row * 32, 32)) == fitting
    bins: list[int] = []  # first fit, the longest first, opens no row that best fit would not
    for length in sorted((lengths[n] for n in fitting), reverse=True):
        place = next((n for n, room in enumerate(bins) if room >= length), None)
        if place is None:
            bins.append(32)
            place = len(bins) - 1
        bins[place] -= length
    assert found.n_rows <= len(bins) + 1
    for row in range(found.n_rows):
        batch = loader(found)._micro_batch(np.array([row * 32]))
        assert batch.doc_ids is not None
        for part, number in enumerate(found.examples_of(row * 32, 32)):
            here = (batch.doc_ids[0] == part).numpy()
            begin = int(store.document_starts[number])
            tokens = store.tokens[begin : begin + lengths[number]]
            np.testing.assert_array_equal(batch.tokens[0].numpy()[here], tokens)
            np.testing.assert_array_equal(batch.positions[0].numpy()[here], np.arange(len(tokens)))
            targets = np.where(store.answers, store.tokens.astype(np.int64), IGNORED)
            wanted = np.append(targets[begin + 1 : begin + len(tokens)], IGNORED)
            np.testing.assert_array_equal(batch.targets[0].numpy()[here], wanted)
        rest = batch.doc_ids[0] >= len(found.examples_of(row * 32, 32))
        assert (batch.targets[0][rest] == IGNORED).all()


def test_the_count_of_targets_is_that_of_the_batches() -> None:
    found = pack(examples_store(), seq_len=SEQ_LEN)
    for step in range(5):
        batch = loader(found, batch=4).step_batch(step)
        assert batch.valid_tokens == sum(int((part.targets >= 0).sum()) for part in batch.micro_batches)


def test_the_loss_is_that_of_the_examples_alone() -> None:
    """Sum of the losses of the answers' tokens over their number, each example in the model without any other."""
    store = examples_store()
    small = replace(CFG, model=replace(CFG.model, n_layers=1), train=replace(CFG.train, z_loss=0.0))
    cfg = replace(small, global_batch_size=4)
    state = build_state(cfg, torch.device("cpu"))
    batches = build_loader(cfg, store, None)
    assert isinstance(batches.store, PackedExamples)
    total, count = 0.0, 0
    batch = batches.step_batch(0)
    for row in batch.sample_ids.tolist():
        for number in batches.store.examples_of(row * SEQ_LEN, SEQ_LEN):
            begin = int(store.document_starts[number])
            tokens = torch.from_numpy(
                store.tokens[begin : begin + lengths_of(store)[number]].astype(np.int64)
            )
            answers = torch.from_numpy(store.answers[begin : begin + len(tokens)])[1:]
            with torch.no_grad():
                logits = state.model(tokens[None])[0, :-1]
            total += float(cross_entropy(logits[answers], tokens[1:][answers], reduction="sum"))
            count += int(answers.sum())
    assert batch.valid_tokens == count
    loss = accumulate_gradients(state, batch, cfg).item()
    assert loss == pytest.approx(total / count, rel=1e-12)


def test_validation_sees_every_answer_once() -> None:
    store = examples_store([5, 9, 20, 31, 32, 3])
    found = pack(store, seq_len=32)
    batches = validation_batches(found, seq_len=32, tokens=10**6, micro_batch_size=4, mask_documents=True)
    targets = torch.cat([each.targets.flatten() for each in batches])
    np.testing.assert_array_equal(np.sort(targets[targets >= 0]), np.sort(store.tokens[store.answers]))


def test_longer_examples_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('"a:1"\n"a:2"\n"a:3"\n')
    store = replace(examples_store([40, 10, 33]), rows=tmp_path / "rows")
    text = too_long(pack(store, seq_len=32))
    assert text == "2 examples of more than seq_len=32 tokens (the longest has 40): a:1, a:3"
    cfg = replace(CFG, global_batch_size=1)
    (notice,) = left_out_of(build_loader(cfg, store, None))
    assert notice == f"Left out of training: {text}. Raise seq_len to take them in."
    assert too_long(pack(store, seq_len=40)) == ""
    with pytest.raises(UserError, match=r"data\.on_skip=error, and this would be left out: 2 examples"):
        packed(replace(cfg, data=replace(cfg.data, on_skip="error")), store)
    with pytest.raises(UserError, match="shorter than every example; the shortest has 10 tokens"):
        pack(store, seq_len=8)


def test_failures_name_the_examples_of_a_sample() -> None:
    store = examples_store()
    batches = loader(pack(store, seq_len=SEQ_LEN))
    ids = batches.step_batch(STEPS).sample_ids
    (pair,) = batches.documents_of(ids)
    assert isinstance(batches.store, PackedExamples)
    numbers = batches.store.examples_of(int(ids[0]) * SEQ_LEN, SEQ_LEN)
    assert pair == [min(numbers), max(numbers)]
