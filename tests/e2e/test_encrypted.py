"""An encrypted run is the same run: in any layout, in its durable tier, for every command, and never on the disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workplace import TINY, Workplace

from megatrain.checkpoint.keys import Key
from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.train.import_hf import open_shards

SECRET, OTHER = "0123456789abcdef" * 4, "f" * 64
ENCRYPTED = "checkpoint.encryption=aes-256-gcm"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.txt").write_text("".join(f"The square of {n} is {n * n}.\n" for n in range(400)))
    (tmp_path / "key").write_text(SECRET + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEGATRAIN_KEY", raising=False)
    monkeypatch.setenv("MEGATRAIN_KEY_FILE", str(tmp_path / "key"))
    return tmp_path


def train(name: str, *overrides: str) -> int:
    return main(["train", *TINY, "data.path=my.txt", "log.display=off", f"run.name={name}", *overrides])


def contents(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


def pieces(weights: Path) -> list[bytes]:
    """Bytes of every tensor of more than 32 bytes."""
    found = load_file(weights).values()
    return [each.flatten().view(torch.uint8).numpy().tobytes()[:32] for each in found if each.nbytes >= 32]


def test_a_run_is_encrypted_wherever_it_lies_and_ends_as_the_plain_one(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (ENCRYPTED, f"checkpoint.durable={place}/store", "checkpoint.async_save=true")
    run, stored = place / "runs/mine", place / "store/mine"
    assert train("mine", *line, "train.stop_at=8") == 0
    shutil.rmtree(place / "runs")
    assert train("mine", *line) == 0  # from the tier
    assert train("plain") == 0
    capsys.readouterr()
    assert main(["checkpoint", "diff", "runs/plain", "runs/mine"]) == 0  # bitwise equal
    assert main(["checkpoint", "consolidate", "runs/plain", "plain.safetensors"]) == 0
    known = pieces(place / "plain.safetensors")
    assert len(known) > 20
    assert all(
        piece in contents(place / "runs/plain") for piece in known[:3]
    )  # the search finds what is there
    on_disk = contents(run, stored)
    assert not any(piece in on_disk for piece in known)
    for secret in (SECRET.encode(), bytes.fromhex(SECRET)):
        assert secret not in on_disk
    for action in ("ls", "show", "verify"):
        for each in ("runs/mine", f"file://{stored}"):
            assert main(["checkpoint", action, each]) == 0
    assert "aes-256-gcm" in capsys.readouterr().out
    assert main(["generate", f"file://{stored}", "The", "--tokens", "3"]) == 0
    assert main(["evaluate", "runs/mine", "--text", "my.txt"]) == 0

    assert main(["checkpoint", "decrypt", "runs/mine", "opened"]) == 0
    assert main(["checkpoint", "diff", "runs/plain", "opened/step-00000012"]) == 0
    assert "encryption" not in json.loads((place / "opened/step-00000012/manifest.json").read_text())
    assert main(["checkpoint", "decrypt", "runs/plain", "opened-again"]) == 2
    assert "is not encrypted" in capsys.readouterr().err

    monkeypatch.setenv("MEGATRAIN_KEY_FILE", str(place / "other"))
    (place / "other").write_text(OTHER)
    for verb, *rest in (("generate", "The"), ("export", "out"), ("evaluate", "--text", "my.txt")):
        assert main([verb, "runs/mine", *rest]) == 2
        words = capsys.readouterr().err
        assert f"was encrypted with the key {Key(bytes.fromhex(SECRET)).id}" in words
        assert f"the given one is {Key(bytes.fromhex(OTHER)).id}" in words
    monkeypatch.delenv("MEGATRAIN_KEY_FILE")
    before = contents(run / "checkpoints")
    for encryption, words in (
        (ENCRYPTED, "Encryption needs a key"),
        ("log.wandb=off", "and no key is given"),
    ):
        assert train("mine", encryption) == 2
        assert words in capsys.readouterr().err
    assert train("new", ENCRYPTED) == 2
    assert "Encryption needs a key" in capsys.readouterr().err
    assert not (place / "runs/new/checkpoints").exists()
    assert contents(run / "checkpoints") == before
    assert main(["checkpoint", "ls", "runs/mine"]) == 0  # names, sizes and hashes need no key
    assert main(["checkpoint", "verify", "runs/mine"]) == 0


def test_an_encrypted_export_is_decrypted_to_the_plain_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("mine", "model=llama3_1b", *TINY, "train.stop_at=2") == 0
    assert main(["export", "runs/mine", "plain", "--shard-gb", "0.00002"]) == 0
    assert main(["export", "runs/mine", "sealed", "--shard-gb", "0.00002", "--encrypt"]) == 0
    weights = sorted((place / "plain").glob("*.safetensors"))
    assert len(weights) > 2
    assert sorted(each.name for each in (place / "sealed").glob("*.safetensors*")) == sorted(
        [*(f"{each.name}.enc" for each in weights), "model.safetensors.index.json"]
    )
    on_disk = contents(place / "sealed")
    assert not any(piece in on_disk for each in weights for piece in pieces(each))
    assert main(["checkpoint", "decrypt", "sealed", "opened"]) == 0
    files = {each.name: each.read_bytes() for each in (place / "plain").iterdir()}
    assert {each.name: each.read_bytes() for each in (place / "opened").iterdir()} == files
    with pytest.raises(UserError, match="sealed is encrypted"):
        open_shards(place / "sealed")
    first, second = sorted((place / "sealed").glob("*.enc"))[:2]
    second.write_bytes(first.read_bytes())
    assert main(["checkpoint", "decrypt", "sealed", "exchanged"]) == 3
    assert f"{second.name.removesuffix('.enc')} was changed" in capsys.readouterr().err
    assert not (place / "exchanged").exists()


@pytest.mark.slow
def test_other_layouts_go_on_from_it(workplace: Workplace) -> None:
    """Saved by two processes with ZeRO 3, resumed with tensor parallelism: as the plain run of one process."""
    key = {"MEGATRAIN_KEY": SECRET}
    exact = ("train.precision=fp64", "train.sample_tokens=0")
    workplace.run(workplace.tiny(*exact, "run.name=whole"))
    line = workplace.tiny(*exact, "run.name=mine", ENCRYPTED)
    workplace.run([*line, "parallel.dp_shard=2", "parallel.zero_stage=3", "train.stop_at=4"], environment=key)
    workplace.run([*line, "parallel.tp=2"], environment=key)
    losses = [[row["train/loss"] for row in workplace.rows(name)[1:]] for name in ("whole", "mine")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
