"""Batches against a slow, plain reference; the same run whatever the number of ranks; errors and threads."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.errors import UserError
from megatrain.data.loader import Batch, Loader, validation_batches
from megatrain.data.store import SyntheticStore, TokenStore

EOS_ID = 0


def make_store(lengths: list[int]) -> TokenStore:
    """Documents of `lengths` tokens, the last of each EOS; tokens count up from 1, so that all are different."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    tokens[np.cumsum(lengths) - 1] = EOS_ID
    return TokenStore(tokens=tokens, document_starts=starts, fingerprint="f", text_bytes=0)


def random_store(seed: int = 0, documents: int = 300, longest: int = 60) -> TokenStore:
    return make_store(np.random.default_rng(seed).integers(1, longest, documents).tolist())


def reference_row(store: TokenStore, start: int, seq_len: int, mask_documents: bool) -> dict[str, list[int]]:
    """One row, token by token."""
    first_of_document = set(store.document_starts.tolist())
    row: dict[str, list[int]] = {"tokens": [], "targets": [], "positions": [], "doc_ids": []}
    document = position = 0
    for t in range(start, start + seq_len):
        if mask_documents and t in first_of_document and t > start:
            document, position = document + 1, 0
        row["tokens"].append(int(store.tokens[t]))
        crosses = mask_documents and t + 1 in first_of_document
        row["targets"].append(-100 if crosses else int(store.tokens[t + 1]))
        row["positions"].append(position)
        row["doc_ids"].append(document)
        position += 1
    return row


def loader(store: TokenStore | SyntheticStore, **fields: object) -> Loader:
    defaults = {
        "seq_len": 32,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seed": 1,
        "mask_documents": True,
    }
    return Loader(store, **{**defaults, **fields})


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("tokens", "targets", "positions"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    if a.doc_ids is None or b.doc_ids is None:
        assert a.doc_ids is b.doc_ids
    else:
        assert torch.equal(a.doc_ids, b.doc_ids)


# --- content ---


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    seq_len=st.integers(1, 20),
    mask_documents=st.booleans(),
    step=st.integers(0, 5),
)
def test_batches_equal_the_reference(
    lengths: list[int], seq_len: int, mask_documents: bool, step: int
) -> None:
    store = make_store([*lengths, seq_len + 1])
    made = loader(store, seq_len=seq_len, mask_documents=mask_documents, global_batch_size=4)
    batch = made.step_batch(step)
    rows = [reference_row(store, i * seq_len, seq_len, mask_documents) for i in batch.sample_ids.tolist()]
    assert len(batch.micro_batches) == 2
    for number, micro in enumerate(batch.micro_batches):
        expected = rows[2 * number : 2 * number + 2]
        assert micro.tokens.tolist() == [r["tokens"] for r in expected]
        assert micro.targets.tolist() == [r["targets"] for r in expected]
        assert micro.positions.tolist() == [r["positions"] for r in expected]
        if mask_documents:
            assert micro.doc_ids.tolist() == [r["doc_ids"] for r in expected]
        else:
            assert micro.doc_ids is None
    assert batch.valid_tokens == sum(t != -100 for r in rows for t in r["targets"])


def test_tensors_are_int64_and_contiguous() -> None:
    micro = loader(random_store()).step_batch(0).micro_batches[0]
    for tensor in (micro.tokens, micro.targets, micro.positions, micro.doc_ids):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (2, 32)
        assert tensor.is_contiguous()


def test_an_epoch_reads_every_sample_once() -> None:
    store = random_store()
    made = loader(store, global_batch_size=2)
    n = made.n_samples
    assert n == (store.n_tokens - 1) // 32
    seen = np.concatenate([made.step_batch(s).sample_ids for s in range(n)])  # two epochs
    assert sorted(seen[:n].tolist()) == sorted(seen[n:].tolist()) == list(range(n))
    assert seen[:n].tolist() != seen[n:].tolist()


# --- independence of the layout ---


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 8), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_ranks_cut_the_same_global_batch(size: int, micro_batch_size: int) -> None:
    store = random_store()
    whole = loader(store, micro_batch_size=8).step_batch(3)
    parts = [
        loader(store, micro_batch_size=micro_batch_size, rank=rank, size=size).step_batch(3)
        for rank in range(size)
    ]
    joined = [micro for part in parts for micro in part.micro_batches]
    fields = {
        name: torch.cat([getattr(m, name) for m in joined])
        for name in ("tokens", "targets", "positions", "doc_ids")
    }
    assert_equal(Batch(**fields), whole.micro_batches[0])
    for part in parts:
        assert part.digest == whole.digest
        assert part.valid_tokens == whole.valid_tokens
        assert np.array_equal(part.sample_ids, whole.sample_ids)


def test_any_step_can_be_the_first() -> None:
    made = loader(random_store())
    straight = [batch for batch, _ in zip(made.batches(0), range(8), strict=False)]
    resumed = [batch for batch, _ in zip(made.batches(5), range(3), strict=False)]
    assert [b.step for b in resumed] == [5, 6, 7]
    for a, b in zip(straight[5:], resumed, strict=True):
        assert a.digest == b.digest
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert_equal(x, y)
    assert len({b.digest for b in straight}) == 8


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetch_changes_nothing(prefetch: int) -> None:
    store = random_store()
    batches = [b for b, _ in zip(loader(store, prefetch=prefetch).batches(0), range(6), strict=False)]
    assert [b.digest for b in batches] == [loader(store).step_batch(s).digest for s in range(6)]


# --- threads ---


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("data-loader")]


def test_the_thread_ends_with_the_iteration() -> None:
    batches = loader(random_store()).batches(0)
    next(batches)
    assert len(threads()) == 1
    batches.close()
    assert threads() == []


def test_errors_reach_the_consumer() -> None:
    class Failing(SyntheticStore):
        def read(self, starts: np.ndarray, length: int) -> np.ndarray:
            raise OSError("disk gone")

    batches = loader(Failing(100)).batches(0)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert threads() == []


def test_batches_are_made_ahead() -> None:
    made: list[int] = []
    enough = threading.Event()

    class Counting(SyntheticStore):
        def read(self, starts: np.ndarray, length: int) -> np.ndarray:
            made.append(len(starts))
            if len(made) == 3:
                enough.set()
            return SyntheticStore.read(self, starts, length)

    batches = loader(Counting(100), micro_batch_size=8, prefetch=2).batches(0)
    next(batches)
    assert enough.wait(timeout=30)
    batches.close()
    assert len(made) == 3  # the one taken and two ahead


# --- wrong inputs ---


def test_a_sequence_longer_than_the_data() -> None:
    store = make_store([10, 20])
    with pytest.raises(UserError, match=r"seq_len=30: .* 30 tokens; the largest legal seq_len is 29"):
        loader(store, seq_len=30)
    only = loader(store, seq_len=29, global_batch_size=2).step_batch(0)
    assert only.sample_ids.tolist() == [0, 0]


def test_a_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(
        UserError, match=r"global_batch_size=8: must be a multiple of micro_batch_size \(2\) .* \(3\)"
    ):
        loader(random_store(), size=3)


# --- validation ---


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("seq_len", [7, 32, 5000])
def test_validation_predicts_every_token_once(seq_len: int, mask_documents: bool) -> None:
    store = random_store(documents=40)
    batches = list(
        validation_batches(
            store, seq_len=seq_len, tokens=10**9, micro_batch_size=4, mask_documents=mask_documents
        )
    )
    assert all(b.tokens.shape == (4, seq_len) for b in batches)
    targets = torch.cat([b.targets.flatten() for b in batches])
    targets = targets[targets != -100].tolist()
    first = set(store.document_starts.tolist()) if mask_documents else {0}
    assert targets == [int(t) for i, t in enumerate(store.tokens) if i > 0 and i not in first]


def test_validation_is_spread_and_repeatable() -> None:
    store = SyntheticStore(1000, n_tokens=100_001)
    fields = {"seq_len": 100, "tokens": 1000, "micro_batch_size": 4, "mask_documents": False}
    first, again = (list(validation_batches(store, **fields)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert sum(int((b.targets != -100).sum()) for b in first) == 1000
    expected = store.read(np.arange(10) * 10_000, 100)  # ten rows, evenly over a thousand
    assert np.array_equal(torch.cat([b.tokens for b in first])[:10].numpy(), expected)


# --- speed and real files ---


def test_memory_maps(tmp_path: Path) -> None:
    plain = random_store()
    plain.tokens.astype("<u2").tofile(tmp_path / "t")
    mapped = TokenStore(
        tokens=np.memmap(tmp_path / "t", dtype="<u2", mode="r"),
        document_starts=plain.document_starts,
        fingerprint="f",
        text_bytes=0,
    )
    for a, b in zip(
        loader(plain).step_batch(0).micro_batches, loader(mapped).step_batch(0).micro_batches, strict=True
    ):
        assert_equal(a, b)
