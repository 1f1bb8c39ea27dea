"""The small runs that are trained in many layouts, and how two runs are compared."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.labels import LabelSet
from megatrain.data.store import SyntheticStore, TokenSource, TokenStore
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import ClassifierConfig, ExpertsConfig, MLAConfig
from megatrain.optim.config import AdamWConfig, LionConfig, MuonConfig, SGDConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import data_ranks, world_size
from megatrain.parallel.lora_config import LoRAConfig
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config, TrainConfig
from megatrain.train.objective_config import DistillConfig, DPOConfig, GRPOConfig
from megatrain.train.parity import Trace, merged, trace

STEPS = 3
REWARD = f"{Path(__file__).parents[1] / 'planted_reward.py'}:even_tokens"
STORE = SyntheticStore(64, n_tokens=1 << 14, documents=700)  # about 23 tokens each: most rows have several
SIZES = {"n_layers": 4, "hidden_size": 32, "n_heads": 8, "ffn_size": 48, "vocab_size": 64, "init_std": 0.2}

CFG = Config(
    model=Qwen3Config(
        **SIZES, n_kv_heads=4, head_dim=8, tie_embeddings=False, sliding_window=20, full_attention_every=2
    ),
    data=DataConfig(kind="synthetic", mask_documents=True),
    optim=AdamWConfig(lr=1e-2, clip_norm=0.5),  # the norm is about 4: every step is clipped
    train=TrainConfig(precision="fp64", z_loss=1e-3, seed=3),
    seq_len=32,
    global_batch_size=8,
    micro_batch_size=1,
)
TIED = replace(CFG, model=replace(CFG.model, tie_embeddings=True))
GPT2 = replace(CFG, model=GPT2Config(**SIZES, max_seq_len=64))
"""Biases, LayerNorm, learned positions, a tied head."""
MUON = replace(CFG, optim=MuonConfig(lr=1e-2, clip_norm=0.5))
MOE = ExpertsConfig(
    n_experts=4, top_k=2, ffn_size=24, n_shared_experts=1, aux_loss=0.01, bias_rate=1e-3, first_k_dense=1
)
EXPERTS = replace(CFG, model=replace(CFG.model, experts=MOE))
LATENT = replace(
    CFG,
    model=DeepseekV3Config(
        **SIZES,
        max_seq_len=64,
        mla=MLAConfig(q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        experts=replace(MOE, routing="sigmoid", n_groups=2, top_groups=1),
    ),
)
UNEVEN = replace(CFG, model=replace(CFG.model, n_heads=6, n_kv_heads=2, ffn_size=49, vocab_size=67))
"""Sizes that no number of ranks divides: with more than two, they hold parts of grouped heads."""
UNEVEN_EXPERTS = replace(UNEVEN, model=replace(UNEVEN.model, experts=replace(MOE, n_experts=6, ffn_size=25)))
ROUNDED = AdamWConfig(lr=1e-2, clip_norm=0.5, states="bf16", stochastic_rounding=True)
WIDE = replace(
    CFG, model=replace(CFG.model, n_layers=2, hidden_size=128, n_heads=4, head_dim=64, ffn_size=256)
)
"""Rows of one block of 8-bit states, and of two, which the ranks of a tp group share."""
WIDE_EXPERTS = replace(
    WIDE, model=replace(WIDE.model, experts=replace(MOE, ffn_size=256, n_experts=4, first_k_dense=1))
)
INT8 = AdamWConfig(lr=1e-2, clip_norm=0.5, states="int8")
LORA = LoRAConfig(rank=4, alpha=64.0, dropout=0.3, targets=("wq", "wk", "wv", "wo", "down"))
"""Adapters of layers that tensor parallelism shards by outputs, by inputs, and by heads."""


def classifying(
    cfg: Config, labels: tuple[str, ...], *, weights: tuple[float, ...], is_multi: bool = False
) -> Config:
    """`cfg` with a classifier of these labels."""
    classifier = ClassifierConfig(labels=labels, multi_label=is_multi, class_weights=weights)
    return replace(
        cfg,
        model=replace(cfg.model, classifier=classifier),
        data=replace(cfg.data, kind="classify", path="rows", tokenizer=TokenizerConfig(kind="bytes")),
    )


RUNS = {
    "untied": CFG,
    "tied": TIED,
    "gpt2": GPT2,
    "experts": EXPERTS,
    "latent": LATENT,
    "muon": MUON,
    "muon_experts": replace(EXPERTS, optim=MUON.optim),
    "sgd_experts": replace(EXPERTS, optim=SGDConfig(lr=1e-2, clip_norm=0.5)),
    "rounded": replace(CFG, optim=ROUNDED),
    "rounded_experts": replace(EXPERTS, optim=ROUNDED),
    "rounded_sgd": replace(
        TIED, optim=SGDConfig(lr=1e-2, clip_norm=0.5, states="bf16", stochastic_rounding=True)
    ),
    "rounded_uneven": replace(UNEVEN, optim=ROUNDED),
    "int8": replace(WIDE, optim=INT8),
    "int8_lion": replace(WIDE, optim=LionConfig(lr=1e-3, clip_norm=0.5, states="int8")),
    "int8_experts": replace(WIDE_EXPERTS, optim=INT8),
    "uneven": UNEVEN,
    "uneven_tied": replace(UNEVEN, model=replace(UNEVEN.model, n_kv_heads=3, tie_embeddings=True)),
    "uneven_gpt2": replace(
        GPT2, model=replace(GPT2.model, n_heads=5, head_dim=8, ffn_size=49, vocab_size=65)
    ),
    "uneven_experts": UNEVEN_EXPERTS,
    "uneven_latent": replace(
        LATENT,
        model=replace(
            LATENT.model, n_heads=5, vocab_size=67, experts=replace(LATENT.model.experts, n_experts=6)
        ),
    ),
    "uneven_muon": replace(UNEVEN_EXPERTS, optim=MUON.optim),
    "chat": CFG,
    "pairs": replace(
        CFG,
        data=replace(CFG.data, kind="preferences", path="rows", tokenizer=TokenizerConfig(kind="bytes")),
        objective=DPOConfig(beta=0.3, label_smoothing=0.1),
        train=replace(CFG.train, z_loss=0.0),
    ),
    "distilled": replace(TIED, objective=DistillConfig(teacher="itself", temperature=2.0, alpha=0.6)),
    "answers": replace(
        CFG,
        data=replace(CFG.data, kind="chat", path="rows", tokenizer=TokenizerConfig(kind="bytes")),
        objective=GRPOConfig(reward=REWARD, group_size=4, answer_tokens=5, clip=0.1, updates=2),
        train=replace(CFG.train, z_loss=0.0),
    ),
    "classes": classifying(TIED, ("a", "b", "c"), weights=(0.5, 1.0, 2.5)),
    "labels": classifying(GPT2, ("a", "b", "c", "d", "e"), weights=(0.5, 1.0, 2.0, 1.0, 1.5), is_multi=True),
    "lora": replace(CFG, lora=LORA, checkpoint=CheckpointConfig(adopt="base")),
    "lora_int4": replace(
        CFG, lora=replace(LORA, base="int4", base_group=16), checkpoint=CheckpointConfig(adopt="base")
    ),
    "lora_gpt2": replace(GPT2, lora=replace(LORA, targets=()), checkpoint=CheckpointConfig(adopt="base")),
    "lora_uneven": replace(UNEVEN, lora=LORA, checkpoint=CheckpointConfig(adopt="base")),
    "gpt2_vocabulary": replace(
        GPT2, model=replace(GPT2.model, n_layers=2, n_heads=12, head_dim=4, vocab_size=50257)
    ),
}


@cache
def store_of(name: str) -> TokenSource:
    """The data of the run `name`."""
    classifier = RUNS[name].model.classifier
    if classifier is not None:
        return labelled_store(LabelSet(tuple(classifier.labels), classifier.multi_label is True))
    if name == "answers":
        return examples_store([n % 9 + 3 for n in range(60)])
    if name == "pairs":
        return replace(examples_store([n % 11 + 3 for n in range(200)]), together=2)
    return examples_store() if name == "chat" else STORE


@cache
def single(name: str, precision: str = "fp64") -> Trace:
    """The run in one process."""
    return trace(with_layout(RUNS[name], precision, {}), store_of(name), STEPS)


def in_layout(workers: WorkerPool, name: str, layout: dict[str, Any], precision: str = "fp64") -> Trace:
    """The run in `layout`."""
    cfg = with_layout(RUNS[name], precision, layout)
    return merged(workers.run(trace, world_size(cfg.parallel), cfg, store_of(name), STEPS))


def with_layout(cfg: Config, precision: str, layout: dict[str, Any]) -> Config:
    """`cfg` in `layout`, where a rank has two micro-batches a step (a pipeline four, if it has so many rows)."""
    parallel = ParallelConfig(**layout)
    rows = cfg.global_batch_size // data_ranks(parallel)
    changed = replace(
        cfg,
        train=replace(cfg.train, precision=precision),
        parallel=parallel,
        micro_batch_size=max(1, rows // (4 if parallel.pp > 1 else 2)),
    )
    assert not list(changed.problems()), list(map(str, changed.problems()))
    return changed


def examples_store(lengths: list[int] | None = None) -> TokenStore:
    """Random examples: of each the first third, and a few tokens after it, are what is asked, the rest is answered."""
    random = np.random.default_rng(5)
    sizes = random.integers(3, 40, size=200) if lengths is None else np.array(lengths)
    starts = np.cumsum(sizes) - sizes
    tokens = random.integers(0, 64, size=sizes.sum(), dtype=np.uint16)
    answers = random.random(len(tokens)) < 0.8
    for start, size in zip(starts, sizes, strict=True):
        answers[start : start + max(1, size // 3)] = False
    return TokenStore(tokens, starts, "examples", text_bytes=0, vocab_size=64, answers=answers)


def labelled_store(labels: LabelSet) -> TokenStore:
    """Random documents with random labels."""
    store, random = examples_store(), np.random.default_rng(6)
    count = len(labels.names)
    values = random.integers(0, 1 << count if labels.is_multi else count, size=len(store.document_starts))
    return replace(store, answers=None, labels=values, label_set=labels)
