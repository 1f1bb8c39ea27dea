"""The verification beside training: what it finds, that it waits where it should, and that it remembers."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatrain.data import background
from megatrain.data.background import CacheCheck, machine_id
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.loader import Loader, validation_batches
from megatrain.data.prepare import Prepared, prepare
from megatrain.data.store import DAMAGED_FILE, INDEX_FILE, DamagedDataError
from megatrain.data.verify import Damage


@pytest.fixture
def load(tmp_path: Path) -> Callable[[], Prepared]:
    """Find the tokens of a small corpus, or build them again."""
    text = "".join(f'{{"text": "document {n} with {n * n} words"}}\n' for n in range(60))
    (tmp_path / "a.jsonl").write_text(text)
    cfg = DataConfig(
        path=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(kind="bytes"),
        val_fraction=0.2,
    )
    return lambda: prepare(cfg, progress=lambda name, share: None)


def directory_of(data: Prepared) -> Path:
    assert data.directory is not None
    return data.directory


def whole(check: CacheCheck, step: int = 7) -> bool:
    return check.require_whole(step, waits=True, report=lambda: None)


def flip(tokens: np.ndarray) -> None:
    tokens[::16] ^= 1


def clear(tokens: np.ndarray) -> None:
    tokens[:] = 0


def set_high_bits(tokens: np.ndarray) -> None:
    tokens[100:103] |= 1 << 15


def plant(directory: Path, damage: Callable[[np.ndarray], None], name: str = "train.tokens") -> None:
    tokens = np.fromfile(directory / name, "<u2")
    damage(tokens)
    tokens.tofile(directory / name)


@pytest.mark.parametrize("damage", [flip, clear, set_high_bits])
@pytest.mark.parametrize("name", ["train.tokens", "val.tokens"])
def test_damage_is_found_put_aside_and_built_again(
    load: Callable[[], Prepared], damage: Callable[[np.ndarray], None], name: str
) -> None:
    first = load()
    directory = directory_of(first)
    content = (directory / name).read_bytes()
    assert whole(CacheCheck(directory, verifies=True))
    plant(directory, damage, name)
    assert load().fingerprint == first.fingerprint  # sizes alone do not show it
    with pytest.raises(
        DamagedDataError, match=rf"stopped at step 7.*In {directory}, {name} has the right size"
    ):
        whole(CacheCheck(directory, verifies=True))
    assert (directory / DAMAGED_FILE).exists()
    again = load()
    assert again.fingerprint == first.fingerprint
    assert (directory / name).read_bytes() == content
    assert whole(CacheCheck(directory, verifies=True))


def test_an_edited_fingerprint_or_a_truncated_shard_is_built_again(load: Callable[[], Prepared]) -> None:
    first = load()
    directory = directory_of(first)
    index = json.loads((directory / INDEX_FILE).read_text())
    (directory / INDEX_FILE).write_text(json.dumps(index | {"fingerprint": "0" * 64}))
    assert load().fingerprint == first.fingerprint
    content = (directory / "train.tokens").read_bytes()
    (directory / "train.tokens").write_bytes(content[:-32])
    assert load().fingerprint == first.fingerprint
    assert (directory / "train.tokens").read_bytes() == content


def test_a_machine_verifies_a_cache_once(
    load: Callable[[], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(load())
    seen: list[Path] = []

    def counted(directory: Path, **_: object) -> list[Damage]:
        seen.append(directory)
        return []

    monkeypatch.setattr(background, "verify", counted)
    for _ in range(2):
        assert whole(CacheCheck(directory, verifies=True))
    assert len(seen) == 1
    assert whole(CacheCheck(directory, verifies=False))
    assert whole(CacheCheck(None, verifies=True))
    os.utime(directory / "val.documents", ns=(1, 1))
    assert whole(CacheCheck(directory, verifies=True))
    assert len(seen) == 2
    monkeypatch.setattr(background.platform, "node", lambda: "another machine")
    assert whole(CacheCheck(directory, verifies=True))
    assert len(seen) == 3
    assert (directory / f".verified-{machine_id()}").exists()


def test_a_save_waits_for_the_verification_but_not_at_a_signal(
    load: Callable[[], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    reports: list[int] = []

    def slow(directory: Path, *, progress: Callable[[float], None], documents: bool) -> list[Damage]:
        assert not documents
        progress(0.5)
        gate.wait(60)
        return [Damage("train.tokens", "is damaged")]

    monkeypatch.setattr(background, "verify", slow)
    monkeypatch.setattr(background, "REPORT_S", 0.01)
    check = CacheCheck(directory_of(load()), verifies=True)
    check.begin(12, unverified_since=8)
    assert not check.require_whole(20, waits=False, report=lambda: None)
    assert check.since == 8

    def report() -> None:
        reports.append(1)
        gate.set()

    with pytest.raises(DamagedDataError, match=r"at step 24.*First remove the checkpoints after step 8"):
        check.require_whole(24, waits=True, report=report)
    assert reports


def test_the_end_of_a_run_ends_the_verification(
    load: Callable[[], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def endless(directory: Path, *, progress: Callable[[float], None], documents: bool) -> list[Damage]:
        while True:
            begun.set()
            progress(0.5)

    monkeypatch.setattr(background, "verify", endless)
    check = CacheCheck(directory_of(load()), verifies=True)
    assert begun.wait(60)
    check.close()
    assert check.damage is None
    assert not list(directory_of(load()).glob(".verified-*"))


def loader(data: Prepared, **fields: object) -> Loader:
    sizes = {"seq_len": 16, "global_batch_size": 8, "micro_batch_size": 4, "seed": 1, "mask_documents": True}
    return Loader(store=data.train, **{**sizes, **fields})


def test_the_loader_names_an_id_outside_the_vocabulary(load: Callable[[], Prepared]) -> None:
    data = load()
    directory = directory_of(data)
    tokens = np.fromfile(directory / "train.tokens", "<u2")
    starts = np.fromfile(directory / "train.documents", "<i8")
    plant(directory, lambda tokens: tokens.__setitem__(100, 999))
    says = (
        rf"{directory}/train.tokens: token 100 \(byte 200\), in document {int((starts <= 100).sum()) - 1}, "
        "has the id 999, and the vocabulary has 257 tokens"
    )
    steps = len(tokens) // 16 // 8 + 1
    with pytest.raises(DamagedDataError, match=says):
        list(map(loader(load()).step_batch, range(steps)))
    found: list[DamagedDataError] = []
    for step in range(steps):
        for part in loader(load(), on_damage=found.append).step_batch(step).micro_batches:
            assert int(part.tokens.max()) < 257
            assert part.doc_ids is not None
    assert found
    plant(directory, lambda tokens: tokens.__setitem__(slice(None), 257), "val.tokens")
    val = load().val
    assert val is not None
    check = CacheCheck(directory, verifies=False)
    with pytest.raises(DamagedDataError, match=r"before the first step.*val.tokens: token 0 \(byte 0\)"):
        check.guard(
            lambda: list(
                validation_batches(val, seq_len=16, tokens=64, micro_batch_size=2, mask_documents=True)
            )
        )
    assert (directory / DAMAGED_FILE).exists()


@pytest.mark.parametrize("seed", range(6))
def test_the_loader_names_documents_in_disorder(load: Callable[[], Prepared], seed: int) -> None:
    """Whatever the file says: an error that names it, or a batch that a model can take."""
    data = load()
    path = directory_of(data) / "train.documents"
    starts = np.fromfile(path, "<i8")
    draw = np.random.default_rng(seed)
    starts[draw.integers(0, len(starts), 20)] = draw.integers(-(1 << 62), 1 << 62, 20)
    starts.tofile(path)
    found: list[DamagedDataError] = []
    for step in range(10):
        for part in loader(load(), on_damage=found.append).step_batch(step).micro_batches:
            assert 0 <= int(part.positions.min()) <= int(part.positions.max()) < 16
    assert all(str(path) in str(each) for each in found)
    assert found
