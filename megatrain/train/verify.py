"""Check that parallel layouts match a single process, with a shrunk config on this machine's CPU."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatrain.data.store import SyntheticStore
from megatrain.models.config import ModelConfig
from megatrain.nn.config import ExpertsConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import layout_summary, world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config
from megatrain.train.parity import Trace, merged, relative_errors, trace

STEPS = 3
SEQ_LEN = 64
LAYERS = 4
MOST_PROCESSES = 8
BOUND = 1e-9  # float64: sums in another order differ by 1e-15, and Adam divides by small gradients
LAYOUTS: tuple[dict[str, Any], ...] = (
    *({"dp_shard": 2, "zero_stage": stage} for stage in range(4)),
    {"dp_replicate": 2},
    {"tp": 2},
    *({"cp": 2, "cp_kind": kind} for kind in ("all_gather", "ring", "ulysses")),
    {"pp": 2},
    {"pp": 2, "pp_schedule": "interleaved_1f1b"},
    {"pp": 2, "pp_schedule": "zbv", "zero_stage": 2},
    {"dp_shard": 2, "tp": 2},
    {"pp": 2, "dp_shard": 2},
    {"cp": 2, "tp": 2},
)
"""Layouts that are tried in addition to the config's own."""
EXPERT_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"dp_shard": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 1},
    {"dp_shard": 2, "tp": 2, "ep": 4},
    {"pp": 2, "dp_shard": 2, "ep": 2},
)
"""Further layouts for models with experts."""


@dataclass(frozen=True)
class Verdict:
    """Comparison of one layout with a single process; errors are relative."""

    layout: str
    loss: float
    grad_norm: float
    gradient: tuple[str, float]
    """Parameter with the largest error of the first gradient, and that error."""
    weight: tuple[str, float]
    """Parameter with the largest error of the weights after the last step, and that error."""
    same_samples: bool
    same_start: bool

    @property
    def good(self) -> bool:
        errors = (self.loss, self.grad_norm, self.gradient[1], self.weight[1])
        return self.same_samples and self.same_start and all(error <= BOUND for error in errors)


def shrink(cfg: Config) -> Config:
    """Return a config that runs in seconds, with `cfg`'s heads, experts, tying, window, documents and optimizer."""
    model = cfg.model
    ratio = min(8, model.n_heads // model.kv_heads)
    every = model.full_attention_every
    small: ModelConfig = dataclasses.replace(
        model,
        n_layers=LAYERS,
        hidden_size=64,
        n_heads=4 * ratio,
        n_kv_heads=4,
        head_dim=8,
        ffn_size=96,
        vocab_size=128,
        max_seq_len=max(SEQ_LEN, 128),
        sliding_window=None if model.sliding_window is None else SEQ_LEN // 3,
        full_attention_every=every if every is None else min(every, LAYERS),  # so that both kinds remain
        init_std=0.1,
        experts=None if model.experts is None else _shrink_experts(model.experts),
        mla=None
        if model.mla is None
        else dataclasses.replace(
            model.mla,
            q_lora_rank=None if model.mla.q_lora_rank is None else 24,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
    )
    return dataclasses.replace(
        cfg,
        model=small,
        data=dataclasses.replace(cfg.data, kind="synthetic", path=None),
        train=dataclasses.replace(cfg.train, precision="fp64", ema_decay=None),
        parallel=ParallelConfig(),
        engine="native",
        seq_len=SEQ_LEN,
        global_batch_size=8,
        micro_batch_size=1,
    )


def _shrink_experts(moe: ExpertsConfig) -> ExpertsConfig:
    groups = min(2, moe.n_groups)
    return dataclasses.replace(
        moe,
        n_experts=8,
        top_k=min(2, moe.top_k),
        ffn_size=32,
        n_groups=groups,
        top_groups=1,
        first_k_dense=min(1, moe.first_k_dense),
    )


def layouts(cfg: Config) -> list[ParallelConfig]:
    """Return the layouts to try: the config's own, if this machine can hold its processes, and `LAYOUTS` or more."""
    own = dataclasses.replace(cfg.parallel, dp_shard=max(1, cfg.parallel.dp_shard), pp_split=())
    chosen = [own] if 1 < world_size(own) <= MOST_PROCESSES else []
    tried = LAYOUTS if cfg.model.experts is None else LAYOUTS + EXPERT_LAYOUTS
    return chosen + [ParallelConfig(**layout) for layout in tried if ParallelConfig(**layout) != own]


def verify(cfg: Config, *, fault: str | None, progress: Callable[[str, float], None]) -> Iterator[Verdict]:
    """Yield a verdict for each layout that fits the shrunk config.

    Args:
        fault: one of `parity.FAULTS`, injected in every layout to check that it is detected.
    """
    small = shrink(cfg)
    store = SyntheticStore(small.model.vocab_size, n_tokens=1 << 14, documents=600)
    truth = trace(small, store, STEPS)
    tried = layouts(cfg)
    with WorkerPool("megatrain.train.parity") as pool:
        for n, layout in enumerate(tried):
            progress(layout_summary(layout, options=True), n / len(tried))
            each = dataclasses.replace(small, parallel=layout)
            if not list(each.problems()):
                ranks = pool.run(trace, world_size(layout), each, store, STEPS, fault)
                yield compare(layout_summary(layout, options=True), merged(ranks), truth)


def compare(layout: str, found: Trace, truth: Trace) -> Verdict:
    """Compare `found` with `truth`."""

    def worst(a: Any, b: Any) -> tuple[str, float]:
        errors = relative_errors(a, b)
        name = max(errors, key=lambda each: errors[each])
        return name, errors[name]

    def relative_error(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    return Verdict(
        layout=layout,
        loss=relative_error([*found.losses, found.eval_loss], [*truth.losses, truth.eval_loss]),
        grad_norm=relative_error(found.grad_norms, truth.grad_norms),
        gradient=worst(found.gradients, truth.gradients),
        weight=worst(found.final, truth.final),
        same_samples=found.digests == truth.digests,
        same_start=all((found.initial[name] == values).all() for name, values in truth.initial.items()),
    )
