"""Shrinking a config to a size that a CPU trains in seconds, with its architecture and the way its sizes divide.

A size of the small model leaves the same remainders as the real one, when divided by the degrees of the layouts to be
tried: what divides evenly still does, and what does not still does not.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from megatrain.models.config import ModelConfig
from megatrain.nn.config import ExpertsConfig, MLAConfig, MoEBackendConfig
from megatrain.optim.config import STATE_BLOCK
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import data_ranks
from megatrain.train.config import Config
from megatrain.train.objective_config import LikelihoodConfig

SEQ_LEN = 64
LAYERS = 4
FFN_SIZE = 96
EXPERTS = 8
EXPERT_FFN_SIZE = 32
VOCABULARY = 128
HEAD_DIM = 8


def shrink(cfg: Config, layouts: Sequence[ParallelConfig]) -> Config:
    """Return a small config that can run in every one of `layouts` in which `cfg` can.

    Kept are the kind of the model and its options, which sizes the degrees divide, the ratio of query to key heads as
    far as that needs, documents, optimizer and weight average. Depth, width, vocabulary, batch and sequence shrink, and
    the loss is that of next tokens.
    """
    layers = _shrink_layers(cfg.model.n_layers, layouts)
    lengths = [(2 * layout.cp if layout.cp > 1 else 1) * layout.tp for layout in layouts]
    seq_len = _shrink_size(cfg.seq_len, SEQ_LEN, lengths)
    # Rows of whole blocks of 8-bit states, between which tensor parallelism cuts.
    block = STATE_BLOCK if cfg.optim.states == "int8" else 0
    batch = math.lcm(4, *(data_ranks(layout) * micro_batches(layout) for layout in layouts))
    return dataclasses.replace(
        cfg,
        model=_shrink_model(cfg.model, layers, seq_len, layouts, block=block),
        data=dataclasses.replace(cfg.data, kind="synthetic", path=None),
        train=dataclasses.replace(cfg.train, precision="fp64"),
        objective=LikelihoodConfig(),
        # Backends for GPUs compute the same up to rounding.
        moe=MoEBackendConfig() if cfg.moe.backend in ("triton", "megablocks") else cfg.moe,
        parallel=ParallelConfig(),
        engine="native",
        seq_len=seq_len,
        global_batch_size=batch,
        micro_batch_size=batch // 2,
    )


def micro_batches(layout: ParallelConfig) -> int:
    """Return the number of micro-batches of a rank in which `layout` is tried: two, or what every schedule allows."""
    return 2 * layout.pp


def in_layout(small: Config, layout: ParallelConfig, n_layers: int) -> Config:
    """Return the shrunk config in one of the layouts that it was made for.

    Args:
        n_layers: layers of the real model, which `pp_split` counts.
    """
    rows = small.global_batch_size // data_ranks(layout)
    split = _shrink_split(layout.pp_split, n_layers, small.model.n_layers)
    return dataclasses.replace(
        small,
        parallel=dataclasses.replace(layout, pp_split=split),
        micro_batch_size=max(1, rows // micro_batches(layout)),
    )


def _shrink_size(size: int, floor: int, degrees: Iterable[int]) -> int:
    """Return the smallest size of at least `floor` and all `degrees` that leaves the remainders of `size` by these.

    A size that is smaller than that already is returned as it is.
    """
    found = list(degrees)
    least = max(floor, *found, 1)
    return size if size <= least else least + (size - least) % math.lcm(*found)


def _shrink_layers(layers: int, layouts: Sequence[ParallelConfig]) -> int:
    stages = [layout.stages for layout in layouts if layout.pp > 1]
    uneven = [2 * layout.stages for layout in layouts if layout.pp_split]
    return _shrink_size(layers, max([LAYERS, *uneven]), stages)


def _shrink_split(split: tuple[int, ...], real: int, small: int) -> tuple[int, ...]:
    """Return where stages begin in `small` layers, at about the same fractions as in `real` ones."""
    firsts: list[int] = []
    for place, first in enumerate(split):
        most = small - (len(split) - place)  # each later stage needs a layer
        least = firsts[-1] + 1 if firsts else 1
        firsts.append(max(least, min(most, round(first * small / real))))
    return tuple(firsts)


def _shrink_model(
    model: ModelConfig, layers: int, seq_len: int, layouts: Sequence[ParallelConfig], *, block: int
) -> ModelConfig:
    tp = [layout.tp for layout in layouts]
    # Ulysses also distributes the heads of a tp rank.
    heads = tp + [layout.tp * layout.cp for layout in layouts if layout.cp_kind == "ulysses"]
    n_heads, n_kv_heads = _shrink_heads(model, heads)
    every = model.full_attention_every
    small: ModelConfig = dataclasses.replace(
        model,
        n_layers=layers,
        hidden_size=block or 64,
        n_heads=n_heads,
        n_kv_heads=None if model.n_kv_heads is None else n_kv_heads,
        head_dim=None if model.mla else block or HEAD_DIM,
        ffn_size=block * math.lcm(*tp) or _shrink_size(model.ffn_size, FFN_SIZE, tp),
        vocab_size=_shrink_size(model.vocab_size, VOCABULARY, tp),
        max_seq_len=max(seq_len, 128),
        sliding_window=None if model.sliding_window is None else seq_len // 3,
        full_attention_every=every
        if every is None
        else max(2, min(every, layers)),  # so that both kinds remain
        init_std=0.1,
        classifier=None,
        experts=None
        if model.experts is None
        else _shrink_experts(model.experts, model.expert_ffn_size, layouts, block=block),
        mla=None if model.mla is None else _shrink_latent(model.mla, block or HEAD_DIM),
    )
    return small


def _shrink_heads(model: ModelConfig, degrees: list[int]) -> tuple[int, int]:
    """Return numbers of query and key heads that leave the remainders of the real ones by `degrees`."""
    n_kv_heads = _shrink_size(model.kv_heads, 4, degrees)
    ratio = model.n_heads // model.kv_heads
    least = max(2, math.ceil(max(degrees) / n_kv_heads))
    unit = math.lcm(*degrees)
    return n_kv_heads * (ratio if ratio <= least else least + (ratio - least) % unit), n_kv_heads


def _shrink_latent(mla: MLAConfig, v_head_dim: int) -> MLAConfig:
    return dataclasses.replace(
        mla,
        q_lora_rank=None if mla.q_lora_rank is None else 24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=v_head_dim,
    )


def _shrink_experts(
    moe: ExpertsConfig, ffn_size: int, layouts: Sequence[ParallelConfig], *, block: int
) -> ExpertsConfig:
    tp = [layout.tp for layout in layouts]
    n_experts = _shrink_size(moe.n_experts, EXPERTS, [layout.ep for layout in layouts])
    groups = next(
        (n for n in (min(2, moe.n_groups), moe.n_groups) if n_experts % n == 0 and n_experts // n > 1), 1
    )
    return dataclasses.replace(
        moe,
        n_experts=n_experts,
        top_k=min(2, moe.top_k),
        ffn_size=block * math.lcm(*tp) or _shrink_size(ffn_size, EXPERT_FFN_SIZE, tp),
        n_groups=groups,
        top_groups=1 if moe.top_groups < moe.n_groups else groups,
        first_k_dense=min(1, moe.first_k_dense),
        layer_frequency=min(2, moe.layer_frequency),
    )
