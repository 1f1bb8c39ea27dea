"""What `megatrain verify` is going to try: the layouts, the model that is shrunk for them, and where faults reach."""

import math
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatrain.cli.compose import compose
from megatrain.config.load import rule_problems
from megatrain.models.config import ModelConfig
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import ExpertsConfig
from megatrain.nn.plan import decoder_plan
from megatrain.optim.config import AdamWConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.train.candidates import PROCESSES, candidates, reduced
from megatrain.train.config import Config
from megatrain.train.faults import FAULTS
from megatrain.train.shrink import in_layout, shrink


def shrunk(cfg: Config, *layouts: dict[str, Any]) -> Config:
    return shrink(cfg, [ParallelConfig(**layout) for layout in layouts])


@pytest.mark.parametrize("seed", range(20))
def test_sizes_divide_as_the_real_ones_do(seed: int) -> None:
    draw = random.Random(seed)
    print("seed", seed)
    kv_heads = draw.choice([1, 2, 3, 4, 5, 8, 12, 16])
    model = Llama3Config(
        n_layers=draw.randint(8, 90),
        hidden_size=8192,
        head_dim=128,
        n_heads=kv_heads * draw.randint(1, 16),
        n_kv_heads=kv_heads,
        ffn_size=draw.randint(1000, 30000),
        vocab_size=draw.randint(2000, 200000),
        experts=ExpertsConfig(n_experts=draw.randint(8, 300), ffn_size=draw.randint(100, 3000)),
    )
    degrees = [draw.randint(1, 8) for _ in range(3)]
    tp, ep, pp = degrees
    small = shrunk(
        Config(model=model, seq_len=4096), {"tp": tp}, {"tp": 2}, {"ep": ep, "dp_shard": ep}, {"pp": pp}
    ).model
    assert model.experts is not None
    assert small.experts is not None
    for real, found, by in (
        (model.n_heads, small.n_heads, (tp, 2)),
        (model.kv_heads, small.kv_heads, (tp, 2)),
        (model.ffn_size, small.ffn_size, (tp, 2)),
        (model.vocab_size, small.vocab_size, (tp, 2)),
        (model.expert_ffn_size, small.expert_ffn_size, (tp, 2)),
        (model.experts.n_experts, small.experts.n_experts, (ep,)),
        (model.n_layers, small.n_layers, (pp,)),
    ):
        assert found <= real
        for degree in by:
            assert found % degree == real % degree
            assert found >= degree or found == real
    assert small.n_heads % small.kv_heads == 0


@pytest.mark.parametrize("preset", ["small", "gpt2_124m", "llama3_70b", "qwen3_0_6b", "deepseek_v3_671b"])
def test_a_shrunk_preset_fits_its_layouts(preset: str) -> None:
    """Every layout of the list is legal for it, or illegal for the real model for the same rule."""
    cfg = compose([f"model={preset}"])
    found = candidates([], "all", cfg)
    assert any(each.layout.ep > 1 for each in found) == (cfg.model.experts is not None)
    small = shrink(cfg, [each.layout for each in found])
    assert small.model.n_layers <= 8
    assert small.model.n_heads <= 16
    for each in found:
        problems = list(rule_problems(in_layout(small, each.layout, cfg.model.n_layers)))
        rows = 64 * world_size(each.layout)
        real = replace(cfg, parallel=each.layout, global_batch_size=rows, micro_batch_size=1)
        assert {p.field for p in problems} == {p.field for p in rule_problems(real)}, each.label


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (Llama3Config(n_layers=80, n_heads=64, n_kv_heads=8, ffn_size=28672), {"tp": 8}),
        (Llama3Config(n_layers=80), {"pp": 4, "pp_schedule": "interleaved_1f1b", "dp_shard": 2}),
        (Llama3Config(n_layers=61), {"pp": 8, "pp_schedule": "dualpipe_v"}),
        (Llama3Config(n_layers=80), {"pp": 4, "pp_split": (30, 60, 79)}),
        (Llama3Config(n_layers=32, n_heads=32, n_kv_heads=8), {"cp": 4, "tp": 2, "cp_kind": "ulysses"}),
        (GPT2Config(n_layers=12, hidden_size=768, n_heads=12, ffn_size=3072, vocab_size=50304), {"tp": 3}),
        (DeepseekV3Config(n_layers=61, n_heads=128), {"dp_shard": 8, "ep": 8}),
        (DeepseekV3Config(n_layers=61, n_heads=128), {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 8}),
    ],
    ids=str,
)
def test_a_legal_layout_can_be_tried(model: ModelConfig, layout: dict[str, Any]) -> None:
    cfg = Config(model=model, seq_len=3072, global_batch_size=96, micro_batch_size=1)
    cfg = replace(cfg, model=replace(model, max_seq_len=4096))
    own = replace(cfg, parallel=ParallelConfig(**layout))
    assert not list(rule_problems(own)), "the test's own layout"
    first, *_ = found = candidates([own.parallel], "all", own)
    assert (first.layout, first.asked, first.reason) == (own.parallel, True, "")
    small = in_layout(shrink(own, [each.layout for each in found]), first.layout, model.n_layers)
    assert not list(rule_problems(small))
    if own.parallel.pp_split:
        assert small.parallel.pp_split == (3, 6, 7)  # of 8 layers


def test_a_layout_of_too_many_processes_is_named_and_a_smaller_one_tried() -> None:
    own = ParallelConfig(tp=8, dp_shard=8, ep=4)
    cfg = Config(
        model=DeepseekV3Config(n_layers=8, n_heads=16), parallel=own, seq_len=256, global_batch_size=64
    )
    first, second = candidates([own], "mine", cfg)
    assert (first.layout, first.asked) == (own, True)
    assert "64 processes" in first.reason
    assert (second.layout, second.asked, second.reason) == (replace(own, tp=4, dp_shard=2), False, "")
    assert candidates([own], "mine", cfg, processes=64)[0].reason == ""


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_reduced_degrees_divide_the_given_ones(processes: int) -> None:
    layout = ParallelConfig(pp=6, dp_replicate=2, dp_shard=9, cp=2, tp=4, ep=6)
    small = reduced(layout, processes)
    assert world_size(small) <= processes
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"):
        assert getattr(layout, axis) % getattr(small, axis) == 0
    assert math.prod((small.dp_shard, small.cp, small.tp)) % small.ep == 0


def test_an_unknown_degree_is_tried_with_the_smallest_legal_one() -> None:
    own = ParallelConfig(dp_shard=-1, ep=4)
    cfg = Config(model=DeepseekV3Config(n_layers=8, n_heads=16), parallel=own, global_batch_size=16)
    (only,) = candidates([own], "mine", cfg)
    assert only.layout == replace(own, dp_shard=4)
    assert "dp_shard=-1" in only.note


def test_each_layout_is_tried_once_and_no_list_has_too_many_processes() -> None:
    cfg = compose(["model=mixtral_8x7b"])
    found = candidates([ParallelConfig(tp=2), ParallelConfig(tp=2)], "all", cfg)
    labels = [each.label for each in found]
    assert labels[0] == "tp=2"
    assert len(set(labels)) == len(labels)
    assert not any(each.reason for each in found)
    assert max(world_size(each.layout) for each in found) <= PROCESSES


def test_each_fault_reaches_a_layout_of_the_list() -> None:
    cfg = compose(["model=mixtral_8x7b", "model.tie_embeddings=true"])
    found = candidates([], "all", cfg)
    for fault in FAULTS.values():
        assert any(fault.reaches(cfg.model, each.layout) for each in found), fault.effect
        assert not fault.reaches(cfg.model, ParallelConfig()), fault.effect  # one process has no such errors


def test_layouts_and_faults_are_known_without_torch() -> None:
    code = (
        "import sys, megatrain.train.faults, megatrain.train.candidates, megatrain.train.shrink, megatrain.cli.verify\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_eight_bit_states_keep_whole_blocks() -> None:
    model = Llama3Config(n_layers=16, hidden_size=2048, n_heads=32, n_kv_heads=8, ffn_size=8192)
    cfg = Config(model=model, optim=AdamWConfig(states="int8"), seq_len=2048)
    layouts = [ParallelConfig(tp=2), ParallelConfig(tp=4, dp_shard=2)]
    small = shrink(cfg, layouts)
    forms = [small.optim.state_format(w.shape, w.role) for w in decoder_plan(small.model).weights.values()]
    assert "int8" in forms
    for layout in layouts:
        assert not list(rule_problems(in_layout(small, layout, 16)))
