"""GGUF files: read by gguf's reader they hold the compressed model, and transformers computes the same from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from unit.compress.test_files import RunOf, compressed, logits

from megatrain.compress.methods import METHODS
from megatrain.compress.run import Compressed, make_plan
from megatrain.compress.write_gguf import require_gguf, write_gguf
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import RopeScaling
from megatrain.runtime.processes import Processes
from megatrain.train.inference import load_trained

TINY: dict[str, Any] = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "ffn_size": 96, "max_seq_len": 64}
MODELS: dict[str, ModelConfig] = {
    "llama3": Llama3Config(**TINY, n_kv_heads=2),
    "qwen3": Qwen3Config(**TINY, n_kv_heads=2, head_dim=128),
    "gpt2": GPT2Config(**TINY | {"ffn_size": 256, "max_seq_len": 1024}),
}
"""Transformers takes for granted: heads of 128 in Qwen3; 1,024 positions, and four times the hidden size, in GPT-2."""
KINDS = {"none": "F16", "int8": "Q8_0", "int4": "Q4_0", "int4-gptq": "Q4_0", "int4-awq": "Q4_0"}


def written(run: Path, path: Path, name: str, **options: Any) -> Compressed:
    plan = make_plan(load_trained(run, Processes()).cfg.model, METHODS[name], **options)
    done = compressed(run, plan)
    write_gguf(path, done.trained, done.codes, "tiny")
    return done


CASES = [
    pytest.param(family, name, marks=[] if family == "llama3" or name == "int4" else pytest.mark.slow)
    for family in MODELS
    for name in KINDS
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_reader_finds_the_numbers_of_the_model(
    tmp_path: Path, run_of: RunOf, family: str, name: str
) -> None:
    run = run_of(MODELS[family])
    done = written(run, tmp_path / "x.gguf", name)
    tensors = {each.name: each for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    model = dict(done.trained.parallel.models[0].named_parameters())

    def numbers(at: str) -> torch.Tensor:
        return torch.from_numpy(
            gguf.quants.dequantize(tensors[at].data, tensors[at].tensor_type).copy()
        ).float()

    assert {each.tensor_type.name for each in tensors.values()} == {"F16", "F32", KINDS[name]}
    pairs = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}
    for layer in range(2):
        pairs |= {f"blk.{layer}.ffn_{x}.weight": f"layers.{layer}.mlp.{x}.weight" for x in ("up", "down")}
        pairs[f"blk.{layer}.attn_output.weight"] = f"layers.{layer}.attn.wo.weight"
        pairs[f"blk.{layer}.attn_norm.weight"] = f"layers.{layer}.attn_norm.weight"
    for theirs, ours in pairs.items():
        assert torch.equal(numbers(theirs), model[ours].detach()), theirs
        expected = "F32" if "norm" in theirs else "F16" if "embd" in theirs else KINDS[name]
        assert tensors[theirs].tensor_type.name == expected
    if family == "gpt2":
        joined = torch.cat([model[f"layers.1.attn.{part}.weight"] for part in ("wq", "wk", "wv")])
        assert torch.equal(numbers("blk.1.attn_qkv.weight"), joined.detach())


@pytest.mark.parametrize("name", ["none", "int8", "int4-gptq"])
@pytest.mark.parametrize("family", MODELS)
def test_transformers_computes_the_same(tmp_path: Path, run_of: RunOf, family: str, name: str) -> None:
    """It reads GGUF files by code of its own: names, order of rotary rows, head counts."""
    run = run_of(MODELS[family])
    done = written(run, tmp_path / "x.gguf", name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    expected = logits(done.trained.parallel.models[0])
    with torch.no_grad():
        found = theirs(torch.arange(1, 33).view(2, 16)).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_scales_of_large_groups_are_repeated(tmp_path: Path, run_of: RunOf) -> None:
    run = run_of(replace(MODELS["llama3"], ffn_size=128))
    written(run, tmp_path / "x.gguf", "int4-gptq", group=64)
    (tensor,) = [
        each for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors if each.name == "blk.0.ffn_down.weight"
    ]
    scales = np.asarray(tensor.data).reshape(64, 4, 18)[..., :2].copy().view(np.float16)[..., 0]
    assert (scales[:, 0::2] == scales[:, 1::2]).all()
    assert tensor.n_bytes == 64 * 128 * 18 // 32


def test_a_tied_head_is_quantized_if_asked(tmp_path: Path, run_of: RunOf) -> None:
    run = run_of(MODELS["qwen3"])
    written(run, tmp_path / "x.gguf", "int8", head=True)
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"


def test_the_tokenizer_is_in_the_file(tmp_path: Path, run_of: RunOf) -> None:
    run = run_of(MODELS["qwen3"])
    done = written(run, tmp_path / "x.gguf", "none")
    tokenizer = done.trained.tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    text = "the square of the number of the square"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 300
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"


def test_what_the_format_lacks_is_refused() -> None:
    def refused(model: ModelConfig, name: str, match: str, dtype: str = "fp16", **options: Any) -> None:
        plan = make_plan(model, METHODS[name], **options)
        group = None if plan.grid is None else plan.grid.group
        with pytest.raises(UserError, match=match):
            require_gguf(model, plan.names, METHODS[name], group=group, dtype=dtype)

    llama = MODELS["llama3"]
    refused(llama, "fp8", "as int8")
    refused(llama, "int8-dynamic", "as they are")
    refused(llama, "int4", "multiples of 32", group=16)
    refused(replace(llama, ffn_size=80), "int8", "mlp.down.weight 80")
    refused(replace(MODELS["qwen3"], sliding_window=8), "none", "sliding window")
    refused(replace(MODELS["gpt2"], activation="gelu"), "none", "gelu_tanh")
    refused(llama, "int8", "fp16", dtype="bf16")
    scaled = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)
    refused(replace(llama, rope_scaling=scaled), "none", "yarn")
