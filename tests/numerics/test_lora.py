"""Adapters: what peft and transformers compute from an export is what the run computes; the base stays as it was."""

import json
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import RUNS, STORE
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from megatrain.cli.compose import compose
from megatrain.cli.main import main
from megatrain.config.load import rule_problems
from megatrain.data.tokenizer import train_bpe
from megatrain.models.registry import get_spec
from megatrain.parallel.lora import with_adapters
from megatrain.parallel.lora_config import LoRAConfig
from megatrain.parallel.packed_base import PackedProduct, adapted_layers, pack_base, round_base
from megatrain.runtime.processes import Processes
from megatrain.train.build import build_loader, build_state
from megatrain.train.inference import load_trained
from megatrain.train.restore import restore_model
from megatrain.train.step import train_step

SIZES = {"vocab_size": 270, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ),
    "gpt2": GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}  # fmt: skip
"""Separate products, and fused ones that are stored transposed."""
WORDS = [
    "data.path=sums.jsonl", "seq_len=64", "global_batch_size=4", "micro_batch_size=4", "train.steps=2", "optim.lr=0.05",
    "train.precision=fp32", "train.eval_every=0", "train.sample_tokens=0", "log.wandb=off", "log.display=off",
    "data.prefetch=0", "lora.rank=3", "lora.alpha=12",
]  # fmt: skip
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the models, each with random weights, examples, and a run of adapters of each."""
    place = tmp_path_factory.mktemp("lora")
    rows = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(40)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch, chdir(place):
        patch.setenv("MEGATRAIN_CACHE", str(place / "cache"))
        for name, config in CONFIGS.items():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(name)
            train_bpe(iter(["1 + 1 = 2"]), vocab_size=258).save_pretrained(place / name)
            assert main(["finetune", name, *WORDS, f"run.name={name}-lora"]) == 0
        yield place


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    out = model.eval()(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_and_merged_models_compute_the_same(folder: Path, name: str) -> None:
    run = f"runs/{name}-lora"
    ours = logits_of(restore_model(Path(run), torch.device("cpu"))[0])
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    size = ours.abs().max()
    assert (logits_of(plain) - ours).abs().max() > 0.02 * size  # the adapters do something
    assert main(["export", run, f"{name}-adapter"]) == 0
    assert sorted(path.suffix for path in Path(f"{name}-adapter").glob("adapter*")) == [
        ".json",
        ".safetensors",
    ]
    adapted = PeftModel.from_pretrained(plain, f"{name}-adapter")
    assert (logits_of(adapted) - ours).abs().max() < 1e-5 * size
    trained = load_trained(Path(run), Processes())
    assert torch.equal(logits_of(trained.parallel.models[0]), ours)
    assert main(["export", run, f"{name}-merged", "--merge", "--check"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(f"{name}-merged", dtype=torch.float32)
    assert (logits_of(merged) - ours).abs().max() < 1e-5 * size


def test_a_run_goes_on_beside_the_same_weights_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run.name=llama-lora", "train.steps=3", "train.allow_changes=['*']"]
    assert main(["finetune", "llama", *WORDS, *words]) == 0
    checkpoint = Path("runs/llama-lora/checkpoints/step-00000003/manifest.json")
    assert json.loads(checkpoint.read_text())["info"]["base"]["step"] == 0
    assert main(["finetune", "gpt2", *WORDS, *words]) == 2
    assert main(["finetune", "llama", *WORDS, *words, "lora.rank=4"]) == 2
    assert main(["finetune", "runs/llama-lora", *WORDS, "run.name=on-adapters"]) == 2
    said = capsys.readouterr().err
    assert "were begun on" in said or "don't fit this config" in said
    assert "lora.rank: was 3, now 4" in said
    assert "holds adapters alone" in said


def test_flags_of_export_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/llama", "nowhere", "--merge"]) == 2
    assert main(["export", "runs/llama-lora", "nowhere", "--check"]) == 2
    assert "this one has none" in (said := capsys.readouterr().err)
    assert "add --merge" in said
    assert not Path("nowhere").exists()


def test_adapters_are_a_small_part() -> None:
    cfg = compose(["model=llama3_8b"])
    plan = get_spec("llama3").plan(cfg.model)
    more = with_adapters(plan, LoRAConfig(rank=16)).n_params() - plan.n_params()
    assert more == 41_943_040  # as peft counts for Llama 3 8B with all linear layers
    assert more < 0.02 * plan.n_params()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=4"], "megatrain finetune SOURCE"),
        (["lora.rank=4", "lora.targets=[wq,q_proj]"], "q_proj is no linear layer"),
        (["lora.rank=4", "model=mixtral_debug"], "with experts"),
        (["lora.rank=4", "train.precision=fp8"], "does not train adapters"),
        (["lora.rank=4", "engine=accelerate"], "is not supported by engine=accelerate"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        compose(words)
    assert not list(rule_problems(compose([])))


def test_a_base_of_four_bits_is_the_rounded_base() -> None:
    """Training beside codes is, to the last bits of float64, training beside the numbers that they stand for."""
    cfg = RUNS["lora_int4"]
    assert cfg.lora.base == "int4"
    whole = replace(cfg, lora=replace(cfg.lora, base="full"))
    packed, plain = (build_state(each, torch.device("cpu")) for each in (cfg, whole))
    first = next(iter(adapted_layers(packed.model).values()))
    size = first.weight.numel()
    pack_base(packed.model, packed.weights.parameters, cfg.lora)
    round_base(plain.model, cfg.lora)
    assert first.weight.numel() == 0
    assert isinstance(first.product, PackedProduct)
    assert first.product.nbytes == size / 2 + size / 16 * 4  # codes, and a float32 for each group
    for step in range(3):
        both = [
            train_step(state, build_loader(each, STORE, None).step_batch(step), each, lr=1e-2).read()
            for state, each in ((packed, cfg), (plain, whole))
        ]
        assert both[0] == pytest.approx(both[1], rel=1e-12)
    for name, parameter in packed.weights.trained.items():
        torch.testing.assert_close(parameter, plain.weights.trained[name], rtol=1e-9, atol=1e-12)


def test_a_base_of_four_bits_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, goes on, is used and merged with the rounded base, and refuses layouts that would cut it."""
    words = [*WORDS, "lora.base=int4", "lora.base_group=16", "run.name=qlora", "train.steps=6"]
    assert main(["finetune", "llama", *words, "train.stop_at=3"]) == 0
    assert main(["finetune", "llama", *words]) == 0
    ours = logits_of(restore_model(Path("runs/qlora"), torch.device("cpu"))[0])
    assert torch.equal(logits_of(load_trained(Path("runs/qlora"), Processes()).parallel.models[0]), ours)
    assert main(["export", "runs/qlora", "qlora-merged", "--merge", "--check"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("qlora-merged", dtype=torch.float32)
    assert (logits_of(merged) - ours).abs().max() < 1e-5 * ours.abs().max()
    plain = [*WORDS, "run.name=not-rounded", "train.steps=6"]
    assert main(["finetune", "llama", *plain]) == 0
    other = logits_of(restore_model(Path("runs/not-rounded"), torch.device("cpu"))[0])
    assert (other - ours).abs().max() > 1e-3 * ours.abs().max()
    capsys.readouterr()
    assert main(["finetune", "llama", *words, "parallel.tp=2", "run.name=cut"]) == 2
    assert "must be 1 with lora.base=int4" in capsys.readouterr().err
