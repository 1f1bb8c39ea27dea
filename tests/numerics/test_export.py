"""An exported run is the same model in transformers, of every family, in one file or many."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_huggingface_experts import MODELS as EXPERTS
from test_huggingface_parity import MODELS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.reader import CheckedReader, read_tensors
from megatrain.checkpoint.safetensors_file import SafetensorsFile
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.tokenizer import train_bpe
from megatrain.models.config import ModelConfig
from megatrain.models.llama3.config import Llama3Config
from megatrain.train.build import build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.export import export
from megatrain.train.export_check import check_logits
from megatrain.train.files import write_config

FAMILIES = {name: MODELS[name] for name in ("gpt2", "llama, tied, llama3 scaling", "qwen3")}
FAMILIES |= {name: EXPERTS[name] for name in ("mixtral", "deepseek")}
ALL = 1 << 40  # bytes of a file


def make_run(
    directory: Path,
    model: ModelConfig,
    *,
    precision: Literal["fp32", "fp64"] = "fp32",
    seq_len: int = 16,
) -> Path:
    """A run with one checkpoint, whose weights and averages are random."""
    model = replace(model, vocab_size=300)
    data = DataConfig(tokenizer=TokenizerConfig(vocab_size=300))
    cfg = Config(
        model=model, data=data, train=TrainConfig(ema_decay=0.9, precision=precision), seq_len=seq_len
    )
    state = build_state(cfg, torch.device("cpu"))
    tensors = state.tensors()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith(("model.", "ema.")) and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    Checkpointer(directory / "checkpoints", CheckpointConfig()).save(3, tensors, state.metadata())
    write_config(directory, cfg)
    (directory / "tokenizer").mkdir()
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save(directory / "tokenizer")
    return directory


def exported(run: Path, target: Path, *, average: bool = False, shard_bytes: int = ALL) -> int:
    done = export(
        run,
        target,
        dtype="fp32",
        average=average,
        shard_bytes=shard_bytes,
        progress=lambda phase, fraction: None,
    )
    return done.files


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same(tmp_path: Path, family: str) -> None:
    run = make_run(tmp_path / "run", FAMILIES[family])
    assert exported(run, tmp_path / "whole") == 1
    assert check_logits(run, tmp_path / "whole", average=False) < 1e-4  # logits of a few units in float32
    assert exported(run, tmp_path / "cut", shard_bytes=20_000) > 2
    assert check_logits(run, tmp_path / "cut", average=False) < 1e-4


@pytest.mark.parametrize("shard_bytes", [ALL, 20_000])
def test_each_tensor_is_written_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    """However large a file may be: no more than one Hugging Face tensor, or stack of experts, is in memory."""
    run = make_run(tmp_path / "run", MODELS["qwen3"])
    log: list[tuple[str, int]] = []

    def read(reader: CheckedReader, tensors: dict[str, Tensor]) -> None:
        log.append(("read", sum(tensor.numel() for tensor in tensors.values())))
        read_tensors(reader, tensors)

    class Spy(SafetensorsFile):
        def write(self, name: str, tensor: Tensor) -> None:
            log.append(("write", tensor.numel()))
            super().write(name, tensor)

    monkeypatch.setattr("megatrain.checkpoint.rows.read_tensors", read)
    monkeypatch.setattr("megatrain.checkpoint.safetensors_file.SafetensorsFile", Spy)
    exported(run, tmp_path / "out", shard_bytes=shard_bytes)
    assert [what for what, _ in log] == ["read", "write"] * (len(log) // 2)
    assert [size for what, size in log if what == "read"] == [size for what, size in log if what == "write"]


def test_the_average_is_exported_instead(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MODELS["qwen3"])
    exported(run, tmp_path / "weights")
    exported(run, tmp_path / "average", average=True)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("weights", "average")]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert not torch.equal(a, b)


def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    exported(make_run(tmp_path / "run", MODELS["qwen3"]), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the square")["input_ids"]) == "the square"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.eos_token_id == tokenizer.eos_token_id


def test_what_cannot_be_expressed_leaves_nothing_behind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(MODELS["qwen3"], logit_softcap=30.0))
    with pytest.raises(UserError, match=r"model\.logit_softcap=30"):
        exported(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", Llama3Config(n_layers=1, hidden_size=16, n_heads=2, ffn_size=16))
    exported(run, tmp_path / "out")
    with pytest.raises(UserError, match="out exists already"):
        exported(run, tmp_path / "out")
    with pytest.raises(UserError, match="is not a run directory"):
        exported(tmp_path, tmp_path / "other")
