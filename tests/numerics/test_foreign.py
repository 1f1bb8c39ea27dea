"""Checkpoints that Megatron Core and DeepSpeed wrote give the logits that those libraries compute.

`foreign/*.zip` were made by `foreign/make_megatron.py` (Megatron Core 0.16.1, layouts with and without tensor
parallelism) and `foreign/make_universal.py` (DeepSpeed 0.19.8, two processes), with Python 3.11 and torch 2.13.
"""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_huggingface_parity import hugging_face
from workplace import TINY

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.reader import read_tensors
from megatrain.checkpoint.store import Checkpointer
from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import train_bpe
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import get_spec
from megatrain.train.config import RunConfig
from megatrain.train.import_megatron import find_megatron, import_megatron
from megatrain.train.import_universal import find_universal, import_universal
from megatrain.train.restore import restore_model

HERE = Path(__file__).parent / "foreign"
SHAPE = {"n_layers": 2, "hidden_size": 16, "n_heads": 4, "ffn_size": 24, "vocab_size": 300, "max_seq_len": 64}
MODELS: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(**SHAPE),  # type: ignore[arg-type]
    "llama": Llama3Config(**SHAPE, n_kv_heads=2, rope_theta=1e4, norm_eps=1e-6),  # type: ignore[arg-type]
    "qwen3": Qwen3Config(**SHAPE, n_kv_heads=2, head_dim=8, rope_theta=1e4, tie_embeddings=False),  # type: ignore[arg-type]
}


def silent(phase: str, fraction: float) -> None: ...


def unpacked(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(HERE / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder


def like(folder: Path, model: ModelConfig) -> Path:
    """What a user has beside the checkpoint: config.json and the tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(get_spec(model.kind).hf_config(model)))
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save_pretrained(folder)
    return folder


def logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = restore_model(run, torch.device("cpu"))[0].eval()
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("kind", MODELS)
def test_megatron_computes_the_same(kind: str, tmp_path: Path) -> None:
    source = unpacked(f"megatron-{kind}", tmp_path / "source")
    description = like(tmp_path / "like", MODELS[kind])
    import_megatron(source, description, RunConfig(name="run", dir=str(tmp_path)), progress=silent)
    reference = load_file(source / "reference.safetensors")
    torch.testing.assert_close(
        logits(tmp_path / "run", reference["tokens"]), reference["logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["universal-zero1", "universal-zero3"])
def test_deepspeed_has_the_same_weights_and_moments(name: str, tmp_path: Path) -> None:
    source = unpacked(name, tmp_path)
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save_pretrained(tmp_path / "like")
    run = RunConfig(name="run", dir=str(tmp_path))
    done = import_universal(source / "universal", tmp_path / "like", run, progress=silent)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "back"), "--check"]) == 0
    before = load_file(tmp_path / "like" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert done.has_moments == (name == "universal-zero1")
    if done.has_moments:
        state = load_file(source / "state.safetensors")
        reader = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig()).open(0)
        names = [key for key in reader.tensor_specs() if key.startswith("optim.")]
        assert len(names) == len(state)  # two moments and a step here, two moments and the weight there
        found = {key: torch.empty(reader.tensor_specs()[key].size) for key in names}
        read_tensors(reader, found)
        pairs = {
            "layers.1.attn.wk.weight": "model.layers.1.self_attn.k_proj.weight",
            "embed.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
        }
        for ours, theirs in pairs.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[f"optim.{ours}.{moment}"], state[f"{theirs}.{moment}"])
            assert found[f"optim.{ours}.step"] == 3


def test_training_takes_up_the_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step with them is another one than without: Adam's step count is 4, not 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.txt").write_text("".join(f"the square of the number {n}.\n" for n in range(300)))
    unpacked("universal-zero1", tmp_path)
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save_pretrained(tmp_path / "like")
    own = [word for word in TINY if word.startswith(("train.", "log.", "checkpoint.", "global", "micro"))]
    line = ["data.path=my.txt", "seq_len=16", *own, "train.steps=1", "log.display=off", "train.eval_every=0"]
    for optimizer, step in (("adamw", 4.0), ("muon", 1.0)):
        assert main(["import", ".", "--like", "like", f"run.name={optimizer}"]) == 2
        assert main(["import", "universal", "--like", "like", f"run.name={optimizer}"]) == 0
        assert main(["train", f"run.name={optimizer}", f"optim={optimizer}", *line]) == 0
        reader = Checkpointer(tmp_path / "runs" / optimizer / "checkpoints", CheckpointConfig()).open(1)
        found = {"optim.norm.weight.step": torch.zeros(())}
        read_tensors(reader, found)
        assert found["optim.norm.weight.step"] == step


def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    source = unpacked("megatron-llama", tmp_path / "source")
    description = like(tmp_path / "like", MODELS["llama"])
    run = RunConfig(name="run", dir=str(tmp_path))

    def refused(model: dict[str, object], match: str) -> None:
        config = get_spec("llama3").hf_config(MODELS["llama"])
        (description / "config.json").write_text(json.dumps(config | model))
        with pytest.raises(UserError, match=match):
            import_megatron(source, description, run, progress=silent)
        assert not (tmp_path / "run").exists()

    refused({"num_hidden_layers": 3}, "stacks 2 layers, but the model has 3")
    refused({"num_key_value_heads": 4}, r"linear_qkv\.weight has the shape")
    refused({"intermediate_size": 20}, r"linear_fc[12]\.weight has the shape")
    refused({"vocab_size": 330}, r"word_embeddings\.weight has the shape")
    refused({"attention_bias": True}, r"no tensor for layers\.0\.attn\.w.\.bias")
    refused({"tie_word_embeddings": True}, r"lacks: output_layer\.weight")
    assert find_megatron(tmp_path) is None
    assert find_universal(tmp_path) is None


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """A pickle that would write a file is read, or refused, without writing it."""
    mark = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(mark),)  # type: ignore[return-value]

    source = unpacked("megatron-llama", tmp_path / "source")
    raw = pickle.dumps(Attack())
    (source / ".metadata").write_bytes(raw)
    (source / "common.pt").write_bytes(raw)
    description = like(tmp_path / "like", MODELS["llama"])
    run = RunConfig(name="run", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"\.metadata is refused"):
        import_megatron(source, description, run, progress=silent)
    unpacked("universal-zero1", tmp_path / "deepspeed")
    weights = next((tmp_path / "deepspeed" / "universal" / "zero").glob("*norm*/fp32.pt"))
    torch.save({"param": Attack()}, weights)
    shutil.copytree(description, tmp_path / "deepspeed" / "like", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"fp32\.pt can't be read"):
        import_universal(tmp_path / "deepspeed" / "universal", description, run, progress=silent)
    assert not mark.exists()


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = unpacked("megatron-llama", tmp_path / "source")
    assert main(["import", str(source), "run.name=run", f"run.dir={tmp_path}"]) == 2
    assert "--like DIRECTORY" in capsys.readouterr().err
    hugging_face(MODELS["llama"]).save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    words = ["import", str(tmp_path / "hf"), "--like", str(tmp_path / "hf"), "run.name=run"]
    assert main(words) == 2
    assert "--like is for checkpoints of Megatron-LM and DeepSpeed" in capsys.readouterr().err
