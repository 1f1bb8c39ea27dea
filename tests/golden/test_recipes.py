"""Every model preset brings its own recipe, which the user's choices win over."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatrain.cli.compose import Source, compose
from megatrain.cli.conf import group_options
from megatrain.cli.recipes import recipe_table
from megatrain.config.schema import ConfigError
from megatrain.optim.config import AdamWConfig, LionConfig, MuonConfig
from megatrain.optim.schedule import CosineConfig, LinearConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.auto import resolve_auto
from megatrain.train.config import Config

PRESETS = group_options()["model"]
GIB = 1 << 30


@cache
def composed(model: str) -> Config:
    """The config of a preset alone; composing takes most of a second."""
    return compose([f"model={model}"])


def test_recipes_are_as_they_were() -> None:
    assert recipe_table() == (Path(__file__).parent / "recipes.md").read_text(encoding="utf-8")


def test_every_preset_that_is_no_debugging_one_has_a_recipe() -> None:
    with_recipe = {name for name in PRESETS if not name.endswith("_debug")}
    assert with_recipe | {"imported"} == set(group_options()["recipe"])


@pytest.mark.parametrize("model", PRESETS)
def test_a_run_of_any_length_and_any_data_degree_is_legal(model: str) -> None:
    cfg = composed(model)
    for steps in (1, 6, 100_000):
        shorter = replace(cfg, train=replace(cfg.train, steps=steps))
        assert not list(shorter.problems())
        assert shorter.schedule.resolved_warmup(steps) <= steps
    least = min(cfg.global_batch_size, 8)
    for degree in (1, 2, least, cfg.global_batch_size):
        wider = replace(cfg, parallel=replace(cfg.parallel, dp_shard=degree))
        assert not list(wider.problems())
        resolved = resolve_auto(wider, memory=80 * GIB)
        assert (cfg.global_batch_size // degree) % resolved.resolved_micro_batch_size == 0


def test_large_models_have_large_models_rates() -> None:
    for model in PRESETS:
        cfg = composed(model)
        if model not in ("small", "vit", "convnet"):
            assert 5e-5 <= cfg.optim.lr <= 1e-3
            assert cfg.seq_len <= cfg.model.max_seq_len


def test_the_users_words_win() -> None:
    cfg = compose(
        ["model=llama3_8b", "optim.lr=1", "seq_len=64", "schedule.final_ratio=0.5", "train.steps=7"]
    )
    assert (cfg.optim.lr, cfg.seq_len, cfg.schedule, cfg.train.steps) == (
        1.0,
        64,
        CosineConfig(warmup_fraction=0.004, final_ratio=0.5),
        7,
    )
    assert compose(["model=llama3_8b", "optim=lion"]).optim == LionConfig()
    assert compose(["model=llama3_8b", "optim=muon"]).optim == MuonConfig(lr=3e-4)
    assert compose(["model=small", "schedule=cosine"]).schedule == CosineConfig(
        warmup_fraction=0.025, final_ratio=0.0
    )


def test_another_recipe_or_none() -> None:
    assert compose(["model=llama3_8b", "recipe=gpt2_124m"]).optim.lr == 6e-4
    without = compose(["model=llama3_8b", "~recipe"])
    plain = Config()
    assert (without.optim, without.schedule, without.train) == (plain.optim, plain.schedule, plain.train)
    assert (without.seq_len, without.global_batch_size) == (plain.seq_len, plain.global_batch_size)


def own(directory: Path, path: str, text: str) -> Source:
    file = directory / path
    file.parent.mkdir()
    file.write_text(text)
    return Source(str(directory))


def test_an_experiment_brings_its_models_recipe_and_wins_over_it(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults: [override /model: gpt2_350m]\nseq_len: 512\n"
    cfg = compose(["experiment=mine"], own(tmp_path, "experiment/mine.yaml", text))
    assert (cfg.seq_len, cfg.optim.lr, cfg.global_batch_size) == (512, 3e-4, 512)
    text = "# @package _global_\ndefaults: [override /recipe: gpt2_1_5b, override /schedule: linear]\n"
    (tmp_path / "experiment/other.yaml").write_text(text)
    cfg = compose(["experiment=other"], Source(str(tmp_path)))
    assert (cfg.model.n_layers, cfg.optim.lr) == (2, 2e-4)
    assert cfg.schedule == LinearConfig(warmup_fraction=0.00125, final_ratio=0.1)


def test_a_users_own_model_may_bring_a_recipe(tmp_path: Path) -> None:
    source = own(tmp_path, "model/mine.yaml", "defaults: [base_llama3, _self_]\n")
    assert compose(["model=mine"], source).optim == AdamWConfig()
    own(tmp_path, "recipe/mine.yaml", "# @package _global_\nrecipe: {lr: 0.5, steps: 3}\n")
    cfg = compose(["model=mine"], source)
    assert (cfg.optim.lr, cfg.train.steps) == (0.5, 3)
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\nrecipe: {learning_rate: 0.5, step: 3}\n")
    with pytest.raises(
        ConfigError, match=r"recipe.learning_rate=0.5: .*\n.*recipe.step=3: .*Nearest legal: steps"
    ):
        compose(["model=mine"], source)


def test_pipelines_get_enough_micro_batches() -> None:
    cfg = compose(["model=llama3_8b", "parallel.pp=4"])
    assert 512 // resolve_auto(cfg, memory=1000 * GIB).resolved_micro_batch_size >= 16
    layout = ParallelConfig(pp=4, pp_schedule="interleaved_1f1b")
    resolved = resolve_auto(replace(cfg, parallel=layout, global_batch_size=12), memory=1000 * GIB)
    assert resolved.resolved_micro_batch_size == 1
    assert not list(resolved.problems())
