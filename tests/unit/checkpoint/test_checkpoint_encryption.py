"""Encrypted checkpoints come back bit for bit, hold no plain byte of a weight, and show every change and wrong key."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from unit.checkpoint.samples import all_bits, make_tensors, targets_for

from megatrain.checkpoint.cipher import HEADER, FileCipher
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointSaveError, CorruptCheckpointError
from megatrain.checkpoint.inspect import open_checkpoint, verify
from megatrain.checkpoint.keys import Key
from megatrain.checkpoint.manifest import Manifest, hash_file, read_manifest
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError

SECRET, OTHER = "0123456789abcdef" * 4, "f" * 64
ENCRYPTED = CheckpointConfig(encryption="aes-256-gcm", keep=0)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRAIN_KEY", SECRET)
    monkeypatch.delenv("MEGATRAIN_KEY_FILE", raising=False)


def silent(phase: str, done: float) -> None:
    pass


def saved(directory: Path, step: int = 100, cfg: CheckpointConfig = ENCRYPTED) -> Path:
    return Checkpointer(directory, cfg).save(
        step, make_tensors(step), {"step": step, "tokens": 7}, {"seed": 1}
    )


def decrypt_by_hand(raw: bytes, label: str, name: str) -> bytes:
    """Decrypt a file by the description in docs/checkpoint-format.md, with the library alone."""
    header, body = raw[:52], raw[52:]
    size, salt = int.from_bytes(header[16:20], "little"), header[20:52]
    info = b"megatrain file\0" + header + b"\0" + label.encode() + b"\0" + name.encode()
    derived = HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(bytes.fromhex(SECRET))
    chunks = [body[start : start + size + 16] for start in range(0, len(body), size + 16)]
    return b"".join(
        AESGCM(derived).decrypt(n.to_bytes(11, "big") + bytes([n == len(chunks) - 1]), chunk, None)
        for n, chunk in enumerate(chunks)
    )


def test_every_kind_of_tensor_comes_back_bitwise_and_needs_no_setting_to_be_read(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = targets_for(make_tensors(100))
    found = Checkpointer(tmp_path, CheckpointConfig()).load(loaded)
    assert found is not None
    assert (found.state, found.warnings) == ({"step": 100, "tokens": 7}, ())
    assert all_bits(loaded) == all_bits(make_tensors(100))


def test_the_plain_files_are_those_of_a_plain_checkpoint(tmp_path: Path) -> None:
    """An independent decryption finds, byte for byte, what is written without encryption."""
    sealed, plain = saved(tmp_path / "sealed"), saved(tmp_path / "plain", cfg=CheckpointConfig())
    for path in plain.iterdir():
        if path.name != "manifest.json":
            raw = (sealed / path.name).read_bytes()
            assert decrypt_by_hand(raw, sealed.name, path.name) == path.read_bytes()


def test_no_plain_byte_of_a_weight_or_name_is_on_the_disk(tmp_path: Path) -> None:
    tensors = make_tensors(100)
    wide = [tensors[name] for name in ("model.layers.0.w", "model.layers.0.bf16", "optim.count")]
    pieces = [each.view(torch.uint8).numpy().tobytes()[:32] for each in wide] + [b"layers.0.w"]
    plain = b"".join(f.read_bytes() for f in saved(tmp_path / "plain", cfg=CheckpointConfig()).iterdir())
    assert all(piece in plain for piece in pieces)  # so the search below would find them
    sealed = b"".join(f.read_bytes() for f in saved(tmp_path / "sealed").iterdir())
    assert not any(piece in sealed for piece in pieces)
    assert SECRET.encode() not in sealed
    assert bytes.fromhex(SECRET) not in sealed


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 129, 1000])
def test_a_file_of_any_size_is_read_whole_and_in_parts(size: int) -> None:
    cipher, data = FileCipher(Key(bytes(32)), "place"), bytes(n % 251 for n in range(size))
    sink = io.BytesIO()
    writer = cipher.writer(sink, "file", chunk_bytes=64)
    for start in range(0, size, 50):
        writer.write(data[start : start + 50])
    writer.finish()
    reader = cipher.reader(io.BytesIO(sink.getvalue()), "file", len(sink.getvalue()))
    assert reader.read() == data
    for start in range(0, size, 37):
        reader.seek(start)
        assert reader.read(90) == data[start : start + 90]


def sealed_chunks() -> tuple[FileCipher, bytes, list[bytes]]:
    cipher, sink = FileCipher(Key(bytes(32)), "place"), io.BytesIO()
    writer = cipher.writer(sink, "file", chunk_bytes=64)
    writer.write(bytes(range(256)) + b"the end")
    writer.finish()
    raw = sink.getvalue()
    return cipher, raw[: HEADER.size], [raw[n : n + 80] for n in range(HEADER.size, len(raw), 80)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("swapped", lambda chunks: [chunks[1], chunks[0], *chunks[2:]]),
        ("repeated", lambda chunks: [chunks[0], chunks[0], *chunks[2:]]),
        ("left out", lambda chunks: [chunks[0], *chunks[2:]]),
        ("cut after a chunk", lambda chunks: chunks[:-1]),
        ("cut to one chunk", lambda chunks: chunks[:1]),
        ("cut in a chunk", lambda chunks: [*chunks[:-1], chunks[-1][:-1]]),
        ("cut to the tag", lambda chunks: [*chunks[:-1], chunks[-1][:16]]),
        ("lengthened", lambda chunks: [*chunks, bytes(16)]),
        ("flipped", lambda chunks: [*chunks[:2], bytes([chunks[2][0] ^ 1]) + chunks[2][1:], *chunks[3:]]),
        ("empty", lambda chunks: []),
    ],
)
def test_chunks_that_were_changed_moved_or_cut_off_do_not_decrypt(name: str, change: object) -> None:
    cipher, header, chunks = sealed_chunks()
    raw = header + b"".join(change(chunks))  # type: ignore[operator]
    with pytest.raises(CorruptCheckpointError):
        cipher.decrypt(raw, "file")
    assert cipher.decrypt(header + b"".join(chunks), "file").endswith(b"the end")


def test_a_file_in_the_place_of_another_or_of_another_step_does_not_decrypt() -> None:
    cipher = FileCipher(Key(bytes(32)), "step-00000100")
    raw = cipher.encrypt(b"weights", "__0_0_0.distcp")
    for other, name in (
        (cipher, "__0_1_0.distcp"),
        (FileCipher(cipher.key, "step-00000200"), "__0_0_0.distcp"),
    ):
        with pytest.raises(CorruptCheckpointError, match="is not what was encrypted"):
            other.decrypt(raw, name)


@pytest.mark.parametrize("damage", ["flip", "cut", "exchange"])
def test_a_change_is_found_although_the_manifest_was_made_to_match(tmp_path: Path, damage: str) -> None:
    """Whoever can write the files can write hashes, but no tag."""
    path = saved(tmp_path)
    first, second = sorted(path.glob("*.distcp"))
    raw = bytearray(first.read_bytes())
    if damage == "exchange":
        raw = bytearray(second.read_bytes())
    raw = raw[:-20] if damage == "cut" else raw
    raw[1000] ^= damage == "flip"
    first.write_bytes(raw)
    assert verify(path, progress=silent).state == "damaged"  # by its hash

    manifest = read_manifest(path)
    record = manifest.files[first.name]._replace(size=len(raw), sha256=hash_file(first))
    forged = Manifest(**{**vars(manifest), "files": manifest.files | {first.name: record}})
    (path / "manifest.json").write_bytes(forged.render())
    (found,) = verify(path, progress=silent).damages
    assert found.file == first.name
    assert found.what.startswith("was changed")
    loaded = targets_for(make_tensors(100))
    with pytest.raises(UserError, match=f"{first.name}"):
        Checkpointer(tmp_path, CheckpointConfig()).load(loaded)


def test_a_wrong_or_missing_key_is_named_and_nothing_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    mine, other = Key(bytes.fromhex(SECRET)).id, Key(bytes.fromhex(OTHER)).id
    assert json.loads((path / "manifest.json").read_text())["encryption"] == {
        "cipher": "aes-256-gcm",
        "key_id": mine,
    }
    monkeypatch.setenv("MEGATRAIN_KEY", OTHER)
    for read in (lambda: Checkpointer(tmp_path, CheckpointConfig()).latest(), lambda: open_checkpoint(path)):
        with pytest.raises(UserError, match=f"was encrypted with the key {mine}; the given one is {other}"):
            read()
    monkeypatch.delenv("MEGATRAIN_KEY")
    with pytest.raises(UserError, match=f"encrypted with the key {mine}, and no key is given") as caught:
        open_checkpoint(path)
    assert "MEGATRAIN_KEY_FILE" in str(caught.value)
    assert verify(path, progress=silent).state == "whole"  # hashes need no key
    with pytest.raises(UserError, match="Encryption needs a key"):
        Checkpointer(tmp_path, ENCRYPTED).preflight(make_tensors(1))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "abc", SECRET + "0", "no key", f"{SECRET}\nabc"])
def test_a_key_file_that_holds_no_key_is_refused_without_being_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("MEGATRAIN_KEY")
    monkeypatch.setenv("MEGATRAIN_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(UserError, match="the key file can't be read"):
        saved(tmp_path / "run")
    (tmp_path / "key").write_text(text)
    with pytest.raises(UserError, match="64 hexadecimal digits") as caught:
        saved(tmp_path / "run")
    assert SECRET not in str(caught.value)


def test_a_key_file_may_hold_old_keys_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "run", 100)
    monkeypatch.delenv("MEGATRAIN_KEY")
    (tmp_path / "key").write_text(f"{OTHER}\n{SECRET}\n")
    monkeypatch.setenv("MEGATRAIN_KEY_FILE", str(tmp_path / "key"))
    newer = saved(tmp_path / "run", 200)
    encryption = read_manifest(newer).encryption
    assert encryption is not None
    assert encryption["key_id"] == Key(bytes.fromhex(OTHER)).id
    for step in (100, 200):
        assert Checkpointer(tmp_path / "run", CheckpointConfig()).load(
            targets_for(make_tensors(step)), step=step
        )


def test_a_step_that_is_saved_again_is_compared_by_its_plain_text(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = (path / "manifest.json").read_bytes()
    assert saved(tmp_path) == path
    assert saved(tmp_path, cfg=CheckpointConfig()) == path  # also by a run that encrypts no more
    assert (path / "manifest.json").read_bytes() == before
    with pytest.raises(CheckpointSaveError, match="differs in"):
        Checkpointer(tmp_path, ENCRYPTED).save(100, make_tensors(101), {"step": 100, "tokens": 7}, {})


def test_an_unencrypted_checkpoint_has_the_manifest_that_it_always_had(tmp_path: Path) -> None:
    fields = json.loads((saved(tmp_path, cfg=CheckpointConfig()) / "manifest.json").read_text())
    assert fields["format_version"] == 1
    assert "encryption" not in fields
    shutil.rmtree(tmp_path)
    assert json.loads((saved(tmp_path) / "manifest.json").read_text())["format_version"] == 2
