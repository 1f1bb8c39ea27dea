"""What is written is read back, by MegaTrain, by transformers with compressed-tensors, and by formulas."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from numerics.test_huggingface_experts import MODELS as EXPERTS
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatrain.compress.codes import Codes
from megatrain.compress.methods import METHODS, Quantization
from megatrain.compress.run import Compressed, Plan, compress, make_plan
from megatrain.compress.text import text_of
from megatrain.compress.write_hf import require_expressible, write_hf
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.quantized_inputs import quantize_inputs, quantized_linear
from megatrain.runtime.processes import Processes
from megatrain.train.inference import load_trained
from megatrain.train.quantized_files import pack_words, unpack_words

TINY: dict[str, Any] = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "ffn_size": 96, "max_seq_len": 64}
MODELS: dict[str, ModelConfig] = {
    "llama3": Llama3Config(**TINY, n_kv_heads=2),
    "qwen3": Qwen3Config(**TINY, head_dim=32, n_kv_heads=2),
    "gpt2": GPT2Config(**TINY),
    "mixtral": replace(EXPERTS["mixtral"], hidden_size=64, ffn_size=96, n_heads=4, n_kv_heads=2, head_dim=16),
}
QUANTIZED = [name for name, method in METHODS.items() if isinstance(method, Quantization)]


RunOf = Callable[[ModelConfig], Path]
"""A function that returns a run of a model, `conftest.run_of`."""


def quiet(phase: str, share: float) -> None:
    pass


def compressed(run: Path, plan: Plan) -> Compressed:
    trained = load_trained(run, Processes(), average=False)
    text = run.parent / "calibration.txt"
    text.write_text("the square of the number of the square is a number " * 40)
    batches = text_of(str(text), trained, samples=16) if plan.method.needs_text else []
    return compress(trained, plan, batches, quiet)


def written(run: Path, target: Path, name: str, dtype: str = "fp16", **options: Any) -> Compressed:
    method = METHODS[name]
    plan = make_plan(load_trained(run, Processes()).cfg.model, method, dtype=dtype, **options)
    done = compressed(run, plan)
    target.mkdir()
    write_hf(target, done.trained, done.codes, method if isinstance(method, Quantization) else None, dtype)
    return done


def logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(1, 33).view(2, 16)
    with torch.no_grad():
        found: Tensor = model(tokens)
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [8, 32, 50, 72])
def test_words_are_those_of_compressed_tensors(bits: int, cols: int) -> None:
    most = 1 << (bits - 1)
    codes = torch.randint(-most, most, (7, cols), generator=torch.Generator().manual_seed(cols)).to(
        torch.int8
    )
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_words(words, bits, cols), codes)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("family", ["llama3", pytest.param("qwen3", marks=pytest.mark.slow), "mixtral"])
def test_what_is_written_is_read_back(tmp_path: Path, run_of: RunOf, family: str, name: str) -> None:
    if (family, name) == ("mixtral", "int4-awq"):
        return  # refused, below
    run = run_of(MODELS[family])
    done = written(run, tmp_path / "out", name)
    again = load_trained(tmp_path / "out", Processes())
    ours, theirs = done.trained.parallel.models[0], again.parallel.models[0]
    for key, parameter in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(key), parameter), key
    assert torch.equal(logits(theirs), logits(ours))
    assert len(done.codes) == len(
        [each for each in ours.state_dict() if "layers." in each and "norm" not in each]
    ) - (
        2 if family == "mixtral" else 0  # routers
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_transformers_computes_the_same(tmp_path: Path, run_of: RunOf, name: str) -> None:
    run = run_of(MODELS["qwen3"])
    done = written(run, tmp_path / "out", name, dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(done.trained.parallel.models[0])
    with torch.no_grad():
        found = theirs(torch.arange(1, 33).view(2, 16)).logits
    # compressed-tensors takes a scale for inputs of their largest size / 127.5, vLLM and MegaTrain / 127.
    tolerance = 5e-2 if name == "int8-dynamic" else 1e-5
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "fp8", "int4"])
def test_sizes_are_as_the_arithmetic_says(tmp_path: Path, run_of: RunOf, name: str) -> None:
    cfg = replace(MODELS["llama3"], vocab_size=300)
    run = run_of(MODELS["llama3"])
    written(run, tmp_path / "out", name)
    hidden, ffn, keys = 64, 96, 32
    matrices = (
        [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
        + [(ffn, hidden)] * 2
        + [(hidden, ffn)]
    )
    bits, group = (4, 32) if name == "int4" else (8, None)
    of_block = sum(
        out * size * bits // 8 + 2 * out * (size // group if group else 1) + 16 * (name in ("int8", "int4"))
        for out, size in matrices
    )
    whole = 2 * of_block + 2 * (
        5 * hidden + 2 * cfg.vocab_size * hidden
    )  # norms, embedding and head in 16 bits
    path = tmp_path / "out" / "model.safetensors"
    assert sum(each.nbytes for each in load_file(path).values()) == whole
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert path.stat().st_size == whole + 8 + header


@pytest.mark.parametrize("name", ["int4-gptq", "fp8"])
def test_tensors_are_code_times_scale(tmp_path: Path, run_of: RunOf, name: str) -> None:
    """Read by nothing but safetensors and the description of the format."""
    run = run_of(MODELS["llama3"])
    done = written(run, tmp_path / "out", name)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    at = "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{at}_scale"].float()
    if name == "fp8":
        numbers = tensors[at].float() * scales
    else:
        words, shape = tensors[f"{at}_packed"], tensors[f"{at}_shape"].tolist()
        numbers = torch.empty(shape)
        for row in range(shape[0]):
            for column in range(shape[1]):
                code = (int(words[row, column // 8]) >> (4 * (column % 8)) & 15) - 8
                numbers[row, column] = code * scales[row, column // 32]
    kept: Codes = done.codes["layers.1.mlp.down.weight"]
    assert torch.equal(numbers, kept.numbers())


def test_head_is_quantized_if_asked(tmp_path: Path, run_of: RunOf) -> None:
    run = run_of(MODELS["llama3"])
    written(run, tmp_path / "out", "int8", head=True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight_packed" in tensors
    assert "model.embed_tokens.weight" in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == []
    load_trained(tmp_path / "out", Processes())


@pytest.mark.parametrize("name", ["magnitude", "prune", "none"])
def test_other_methods_write_a_plain_directory(tmp_path: Path, run_of: RunOf, name: str) -> None:
    run = run_of(MODELS["gpt2"])
    options = {"ffn": 40} if name == "prune" else {}
    done = written(run, tmp_path / "out", name, **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(done.trained.parallel.models[0])
    with torch.no_grad():
        assert torch.allclose(theirs(torch.arange(1, 33).view(2, 16)).logits, expected, rtol=0, atol=1e-4)


def test_models_that_a_method_or_format_does_not_know_are_refused() -> None:
    for family, name, match in (
        ("mixtral", "int4-awq", "int4-gptq"),
        ("mixtral", "prune", "experts"),
    ):
        with pytest.raises(UserError, match=match):
            make_plan(MODELS[family], METHODS[name], ffn=8)
    method = METHODS["int8"]
    assert isinstance(method, Quantization)
    with pytest.raises(UserError, match="transposed"):
        require_expressible(MODELS["gpt2"], make_plan(MODELS["gpt2"], method).names, method)
    with pytest.raises(UserError, match="share their weight"):
        require_expressible(MODELS["qwen3"], make_plan(MODELS["qwen3"], method, head=True).names, method)


@pytest.mark.parametrize(
    ("group", "match"), [(128, "usual sizes these do: 32"), (0, "multiple of 8"), (12, "multiple of 8")]
)
def test_groups_must_divide(group: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_plan(MODELS["llama3"], METHODS["int4"], group=group)


def test_inputs_are_rounded_to_codes_of_each_token() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.eye(16), torch.arange(16.0)
    scales = x.abs().amax(-1, keepdim=True) / 127
    expected = (x / scales).round() * scales + bias
    assert torch.allclose(quantized_linear(x, weight, bias), expected, atol=1e-6)


def test_a_layout_that_would_scale_inputs_by_rank_is_refused() -> None:
    with pytest.raises(UserError, match="--tp 1"):
        quantize_inputs(ParallelModel(ParallelConfig(tp=2), None, []))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "nvfp4-pack-quantized"},
        {"config_groups": {}},
        {"weights": {"symmetric": False}},
        {"weights": {"num_bits": 2}},
        {"weights": {"actorder": "group"}},
        {"input_activations": {"num_bits": 8, "type": "int", "dynamic": False}},
    ],
    ids=str,
)
def test_other_quantizations_are_refused(tmp_path: Path, run_of: RunOf, changed: dict[str, Any]) -> None:
    run = run_of(MODELS["llama3"])
    written(run, tmp_path / "out", "int4")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    found = config["quantization_config"]
    if "weights" in changed:
        found["config_groups"]["group_0"]["weights"] |= changed["weights"]
    elif "input_activations" in changed:
        found["config_groups"]["group_0"] |= changed
    else:
        found |= changed
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not supported"):
        load_trained(tmp_path / "out", Processes())


def test_calibration_text_is_cut_into_whole_sequences(tmp_path: Path, run_of: RunOf) -> None:
    run = run_of(MODELS["llama3"])
    trained = load_trained(run, Processes())
    (tmp_path / "a.txt").write_text("the square of the number " * 50)
    (tmp_path / "b.txt").write_text("a number " * 50)
    batches = text_of(str(tmp_path / "*.txt"), trained, samples=1000)
    ids = [
        [*trained.tokenizer.encode((tmp_path / f"{n}.txt").read_text()), trained.tokenizer.eos_id]
        for n in "ab"
    ]
    stream = [token for each in ids for token in each]
    tokens = torch.cat([batch.tokens for batch in batches])
    assert tokens.shape == ((len(stream) - 1) // 16, 16)
    assert tokens.flatten().tolist() == stream[: tokens.numel()]
    assert sum(len(batch.tokens) for batch in text_of(str(tmp_path / "*.txt"), trained, samples=3)) == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("")
    with pytest.raises(UserError):
        text_of(str(tmp_path / "empty"), trained, samples=3)
