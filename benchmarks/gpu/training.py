"""Whole training steps of three models on one device: tokens/s, MFU and peak memory.

The models are those of conf/model, written as dataclasses, since composing YAML takes packages that a bare GPU machine
may lack.
"""

import dataclasses
import gc
import statistics
import time
from functools import partial
from typing import Literal, NamedTuple

import torch

from benchmarks.gpu.steps import Row, Setting, Step
from benchmarks.synthetic import random_batch
from megatrain.models.config import ModelConfig
from megatrain.models.flops import flops_per_token, n_params
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import RopeScaling
from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.parallel.config import ParallelConfig
from megatrain.runtime.device import peak_flops
from megatrain.train.build import COMPUTE_DTYPE, build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.step import train_step

MODELS: dict[str, ModelConfig] = {
    "gpt2_124m": GPT2Config(n_layers=12, hidden_size=768, n_heads=12, ffn_size=3072),
    "llama3_1b": Llama3Config(
        n_layers=16,
        hidden_size=2048,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        ffn_size=8192,
        max_seq_len=131072,
        tie_embeddings=True,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    ),
    "llama3_8b": Llama3Config(
        n_layers=32,
        hidden_size=4096,
        n_heads=32,
        n_kv_heads=8,
        ffn_size=14336,
        max_seq_len=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    ),
}
"""By the names of the presets."""


Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
"""MFU is a share of the peak in bf16 in both."""


class Way(NamedTuple):
    """What is trained, and how."""

    model: str
    precision: Precision
    compiled: bool


class Batch(NamedTuple):
    """How much is computed at once, and in a step; in sequences but for seq_len."""

    seq_len: int
    micro: int
    whole: int


BATCHES = {"gpt2_124m": Batch(1024, 32, 128), "llama3_1b": Batch(8192, 2, 8), "llama3_8b": Batch(8192, 1, 4)}
SMALL_BATCH = Batch(32, 2, 4)
WARM_UP, COUNTED = 2, 5
STATE_BYTES = 20
"""Of a parameter: its bf16 copy and gradient, float32 master, gradient and AdamW's two moments."""
SHARE = 0.85
"""Of the memory that is free, to be filled: the rest is for the loss and for what the allocator cannot use."""


def steps(setting: Setting) -> list[Step]:
    """List one step for each model as it is, in bf16 and in fp8, then for each with compiled blocks."""
    found = []
    for compiled in (False,) if setting.small else (False, True):
        for precision in PRECISIONS:
            for name in MODELS:
                way = Way(name, precision, compiled)
                found.append(Step(way._asdict(), partial(_train, setting, way)))
    return found


def _config(setting: Setting, way: Way) -> Config:
    model, batch = MODELS[way.model], BATCHES[way.model]
    if setting.small:
        kv_heads = None if model.n_kv_heads is None else 2
        model = dataclasses.replace(model, n_layers=2, hidden_size=32, ffn_size=64, vocab_size=199)
        model = dataclasses.replace(model, n_heads=4, n_kv_heads=kv_heads, head_dim=8)
        batch = SMALL_BATCH
    if setting.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(setting.device)
        model = dataclasses.replace(model, n_layers=layers_that_fit(model, batch, SHARE * free))
    return Config(
        model=model,
        train=TrainConfig(precision=way.precision),
        parallel=ParallelConfig(compile=way.compiled),
        seq_len=batch.seq_len,
        micro_batch_size=batch.micro,
        global_batch_size=batch.whole,
    )


def layers_that_fit(model: ModelConfig, batch: Batch, memory: float) -> int:
    """Return the most layers, up to the model's, whose states and activations take at most `memory` bytes; at least 1.

    Kept for the backward pass are, in bf16: of each block the inputs of both norms and of the matrices behind them,
    queries, keys and values before and after their rotation, attention's output, and three tensors as wide as the
    feed-forward block.
    """
    heads = model.n_heads * model.qk_head_dim + 2 * model.kv_heads * model.qk_head_dim
    numbers = 6 * model.hidden_size + 2 * heads + 3 * model.ffn_size
    kept = 2 * batch.micro * batch.seq_len * numbers

    def fits(layers: int) -> bool:
        parameters = n_params(dataclasses.replace(model, n_layers=layers))
        return STATE_BYTES * parameters + layers * kept <= memory

    return max((n for n in range(1, model.n_layers + 1) if fits(n)), default=1)


def _train(setting: Setting, way: Way) -> list[Row]:
    """Train with as many layers as fit, and with fewer if memory runs out nevertheless."""
    _free(setting.device)
    cfg = _config(setting, way)
    while True:
        try:
            return [
                {**way._asdict(), "layers_of_model": MODELS[way.model].n_layers, **_measured(setting, cfg)}
            ]
        except torch.OutOfMemoryError:
            if cfg.model.n_layers < 4:
                raise
        _free(setting.device)  # only now: the error keeps what its frames hold
        model = dataclasses.replace(cfg.model, n_layers=cfg.model.n_layers * 3 // 4)
        cfg = dataclasses.replace(cfg, model=model)


def _free(device: torch.device) -> None:
    torch._dynamo.reset()  # else what it has compiled counts against the next model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(setting: Setting, cfg: Config) -> Row:
    """Time steps over the same random tokens again and again, so that the loss must fall."""
    reset_peak_memory(setting.device)
    state = build_state(cfg, setting.device)
    batch = random_batch(cfg, seed=0)
    times, losses = [], []
    for _ in range(WARM_UP + COUNTED):
        started = time.perf_counter()
        losses.append(train_step(state, batch, cfg, lr=1e-4).loss.item())  # item() waits for the device
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[WARM_UP:])
    rates = throughput(
        cfg.global_batch_size * cfg.seq_len,
        seconds,
        flops_per_token_full=flops_per_token(cfg.model, cfg.seq_len, causal=False),
        flops_per_token_causal=flops_per_token(cfg.model, cfg.seq_len, causal=True),
        peak=peak_flops(setting.device, COMPUTE_DTYPE[cfg.train.precision]),
        devices=1,
    )
    return {
        "layers": cfg.model.n_layers,
        "parameters": n_params(cfg.model),
        "seq_len": cfg.seq_len,
        "micro": cfg.micro_batch_size,
        "whole": cfg.global_batch_size,
        "step_time_s": seconds,
        "tokens_per_sec": rates["perf/tokens_per_sec"],
        "mfu_full": rates.get("perf/mfu"),
        "mfu_causal": rates.get("perf/mfu_causal"),
        "peak_gib": peak_memory_gib(setting.device),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
