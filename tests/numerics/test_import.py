"""An imported model computes what transformers computes, and goes on as any other run, of every family."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface_experts import MODELS as EXPERTS
from test_huggingface_experts import hugging_face
from test_huggingface_parity import MODELS

from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import train_bpe
from megatrain.train.config import RunConfig
from megatrain.train.export import export
from megatrain.train.export_check import check_logits
from megatrain.train.files import read_config
from megatrain.train.import_hf import Imported, import_hf

FAMILIES = {name: MODELS[name] for name in ("gpt2", "llama, tied, llama3 scaling", "qwen3")}
FAMILIES |= {name: EXPERTS[name] for name in ("mixtral", "deepseek")}
TRAIN = (
    *("seq_len=16", "global_batch_size=4", "train.sample_tokens=0", "log.wandb=off"),
    *("log.display=off", "train.eval_tokens=64", "train.steps=4"),
)


def downloaded(directory: Path, family: str, *, shard: str = "5GB") -> Path:
    """What a user has: config.json, safetensors in one file or several, and the tokenizer's files."""
    model = hugging_face(replace(FAMILIES[family], vocab_size=300))  # type: ignore[arg-type]
    model.save_pretrained(directory, max_shard_size=shard)
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save_pretrained(directory)
    return directory


def imported(source: Path, name: str = "run") -> Imported:
    run = RunConfig(name=name, dir=str(source.parent))
    return import_hf(source, run, progress=lambda phase, fraction: None)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tensors_are_the_same(tmp_path: Path, family: str) -> None:
    source = downloaded(tmp_path / "source", family, shard="40KB")
    done = imported(source)
    assert done.files > 1
    assert check_logits(tmp_path / "run", source) < 1e-4  # logits of a few units in float32
    export(
        tmp_path / "run",
        tmp_path / "back",
        dtype="fp32",
        average=False,
        shard_bytes=1 << 40,
        progress=lambda phase, fraction: None,
    )
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert set(after) <= set(before) | {"lm_head.weight"}
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in after.items())
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run", "back"}


@pytest.mark.parametrize("family", ["llama, tied, llama3 scaling", "mixtral"])
def test_an_imported_run_trains_and_is_resumed(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    source = downloaded(tmp_path / "source", family)
    text = tmp_path / "my.txt"
    text.write_text("".join(f"Line {n}: the square of {n} is {n * n}.\n" for n in range(200)))
    for name in ("whole", "halves"):
        assert main(["import", str(source), f"run.name={name}", "--check"]) == 0
    assert float(capsys.readouterr().out.partition("transformers: ")[2].split()[0]) < 1e-4
    line = ["train", f"data.path={text}", "train.ema_decay=0.5", *TRAIN]
    assert main([*line, "run.name=whole"]) == 0
    assert main([*line, "run.name=halves", "train.stop_at=2"]) == 0
    assert main([*line, "run.name=halves"]) == 0
    cfg = read_config(tmp_path / "runs/halves")
    assert cfg.model == read_config(tmp_path / "runs/whole").model
    assert (cfg.model.vocab_size, cfg.optim.lr, cfg.data.tokenizer.kind) == (300, 2e-5, "huggingface")
    rows = [
        [json.loads(row) for row in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    assert [row.get("train/loss") for row in rows[0]] == [row.get("train/loss") for row in rows[1]]
    assert main([*line, "run.name=whole", "model.n_layers=1"]) == 2
    assert "the run was imported" in capsys.readouterr().err
    assert main([*line, "-m", "run.name=whole", "optim.lr=1e-3,2e-3"]) == 2
    assert "is an imported run" in capsys.readouterr().err
    checkpoints = tmp_path / "runs/whole/checkpoints"
    shutil.rmtree(checkpoints)
    assert main([*line, "run.name=whole"]) == 2
    assert "has no checkpoint any more" in capsys.readouterr().err


def test_a_check_that_fails_is_an_error(tmp_path: Path) -> None:
    source = downloaded(tmp_path / "source", "qwen3")
    imported(source)
    tensors = load_file(source / "model.safetensors")
    for factor in (1.01, float("nan")):
        save_file(
            tensors | {"model.norm.weight": tensors["model.norm.weight"] * factor},
            source / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(UserError, match="--check: the logits"):
            check_logits(tmp_path / "run", source)


def test_what_cannot_be_expressed_leaves_nothing_behind(tmp_path: Path) -> None:
    source = downloaded(tmp_path / "source", "qwen3")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act=relu"):
        imported(source)
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown: model\.extra"):
        imported(source)
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has the shape \(7,\)"):
        imported(source)
    tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is quantized"):
        imported(source)
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "linear"},
    }
    (source / "config.json").write_text(json.dumps(config | both))
    with pytest.raises(UserError, match="rope_parameters and rope_scaling differ"):
        imported(source)
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        imported(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = downloaded(tmp_path / "source", "qwen3")
    for words, says in (
        ([str(source)], "name the new run"),
        ([str(source), "run.name=x", "optim.lr=1"], "optim.lr: only run.name and run.dir"),
        ([str(tmp_path), "run.name=x"], "not a Hugging Face model directory"),
        ([str(source), "run.name=../x"], "must consist of letters"),
    ):
        assert main(["import", *words]) == 2
        assert says in capsys.readouterr().err
    imported(source)
    with pytest.raises(UserError, match="run exists already"):
        imported(source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors files"):
        imported(source, "other")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json"):
        imported(source, "other")
