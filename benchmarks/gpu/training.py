"""Whole training steps of three models on one device, with packed documents and without: tokens/s, MFU and peak memory.

The models are those of conf/model, written as dataclasses, since composing YAML takes packages that a bare GPU machine
may lack.
"""

import dataclasses
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.steps import Row, Setting, Step
from benchmarks.gpu.supervise import STEP_S
from benchmarks.gpu.tuning import compiling
from benchmarks.synthetic import Documents, mean_document, random_batch, visible_pairs
from megatrain.models.config import ModelConfig
from megatrain.models.flops import flops_per_token, n_params
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import RopeScaling
from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.profile import OF_PROFILER
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
    precision: Precision = "bf16"
    documents: bool = True
    """Whether sequences are packed documents, each of which attends to itself alone, as a run on text has them."""
    compiled: bool = False
    scaling: Literal["tensor", "row", "block"] = "row"
    """Of fp8."""


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


IMPORTANT = (Way("gpt2_124m"), Way("llama3_8b"), Way("llama3_1b"), Way("llama3_8b", "fp8"))
"""What is timed first: packed documents, as they come with text."""


def important_steps(setting: Setting) -> list[Step]:
    """List the steps of `IMPORTANT`, which `steps` leaves out."""
    return [Step({"part": "training", **way._asdict()}, partial(_train, setting, way)) for way in IMPORTANT]


def steps(setting: Setting) -> list[Step]:
    """List one step for each other way to train each model, and one for the seconds to a first step."""
    found = [first_step(setting), launches(setting)]
    by_tensor = Way("llama3_8b", "fp8", scaling="tensor")
    found.append(Step(by_tensor._asdict(), partial(_train, setting, by_tensor)))
    for compiled in (False,) if setting.small else (False, True):
        for precision in PRECISIONS:
            for documents in (True, False):
                for name in MODELS:
                    way = Way(name, precision, documents, compiled)
                    if way not in IMPORTANT:
                        found.append(Step(way._asdict(), partial(_train, setting, way)))
    return found


def ahead() -> list[tuple[str, Callable[[Setting], None]]]:
    """Return what compiles the kernels of each model's step, by a name; the most important first."""
    order = [(way.model, way.precision) for way in IMPORTANT]
    order += [(name, precision) for precision in PRECISIONS for name in MODELS]
    return [
        (f"{name} {precision}", partial(_compile, name=name, precision=precision))
        for name, precision in dict.fromkeys(order)
    ]


def _compile(setting: Setting, *, name: str, precision: Precision) -> None:
    """Run one step of a single layer, with documents and without."""
    cfg = _config(setting, Way(name, precision))
    model = dataclasses.replace(cfg.model, n_layers=1)
    cfg = dataclasses.replace(cfg, model=model, global_batch_size=cfg.micro_batch_size)
    state = build_state(cfg, setting.device)
    with compiling():
        for documents in (True, False):
            batch = random_batch(cfg, seed=0, packed=_packing(setting, documents))
            train_step(state, batch, cfg, lr=1e-4).loss.item()


def _packing(setting: Setting, documents: bool) -> Documents | None:
    if not documents:
        return None
    return "short" if setting.small else "text"


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
        train=TrainConfig(precision=way.precision, fp8_scaling=way.scaling),
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
                {
                    **way._asdict(),
                    "layers_of_model": MODELS[way.model].n_layers,
                    **_measured(setting, cfg, way.documents),
                }
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


def _measured(setting: Setting, cfg: Config, documents: bool) -> Row:
    """Time steps over the same random tokens again and again, so that the loss must fall."""
    reset_peak_memory(setting.device)
    state = build_state(cfg, setting.device)
    batch = random_batch(cfg, seed=0, packed=_packing(setting, documents))
    times, losses = [], []
    for _ in range(WARM_UP + COUNTED):
        started = time.perf_counter()
        losses.append(train_step(state, batch, cfg, lr=1e-4).loss.item())  # item() waits for the device
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[WARM_UP:])
    peak = peak_flops(setting.device, COMPUTE_DTYPE[cfg.train.precision])
    full, causal = (flops_per_token(cfg.model, cfg.seq_len, causal=each) for each in (False, True))
    rates = throughput(
        cfg.global_batch_size * cfg.seq_len,
        seconds,
        flops_per_token_full=full,
        flops_per_token_causal=causal,
        peak=peak,
        devices=1,
    )
    needed = flops_needed(full, causal, seq_len=cfg.seq_len, pairs=visible_pairs(batch))
    return {
        "layers": cfg.model.n_layers,
        "parameters": n_params(cfg.model),
        "seq_len": cfg.seq_len,
        "micro": cfg.micro_batch_size,
        "whole": cfg.global_batch_size,
        "mean_document": mean_document(batch),
        "step_time_s": seconds,
        "warm_up_s": sum(times[:WARM_UP]),
        "tokens_per_sec": rates["perf/tokens_per_sec"],
        "mfu_full": rates.get("perf/mfu"),
        "mfu_causal": rates.get("perf/mfu_causal"),
        "mfu_needed": None if peak is None else needed * rates["perf/tokens_per_sec"] / peak.flops,
        "peak_gib": peak_memory_gib(setting.device),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def flops_needed(full: float, causal: float, *, seq_len: int, pairs: float) -> float:
    """Return the FLOPs of one token whose attention has `pairs` query-key pairs a sequence, of models without windows.

    Args:
        full, causal: FLOPs of one token if attention has all seq_len² pairs, and if it has the causal ones.
    """
    all_pairs, half = seq_len**2, seq_len * (seq_len + 1) / 2
    per_pair = (full - causal) / (all_pairs - half)
    return full - per_pair * (all_pairs - pairs)


FIRST_STEP = """
import sys
from torch import device
from benchmarks.gpu.steps import Setting
from benchmarks.gpu.training import one_step
one_step(Setting(device(sys.argv[1]), sys.argv[2] == "small"))
"""


def first_step(setting: Setting) -> Step:
    """Return the step that measures a process's seconds to the end of its first training step of GPT-2 124M.

    Cold with empty caches of compiled kernels, warm with those that the first process left.
    """
    about = {"measure": "first_step", "model": "gpt2_124m"}
    return Step(about, partial(_first_step, setting, about))


def one_step(setting: Setting) -> None:
    """Train GPT-2 124M for one step on packed documents."""
    cfg = _config(setting, Way("gpt2_124m"))
    state = build_state(cfg, setting.device)
    train_step(state, random_batch(cfg, seed=0, packed=_packing(setting, True)), cfg, lr=1e-4).loss.item()


def _first_step(setting: Setting, about: Row) -> list[Row]:
    _free(setting.device)
    command = [sys.executable, "-c", FIRST_STEP, str(setting.device), "small" if setting.small else "whole"]
    with tempfile.TemporaryDirectory() as folder:
        caches = dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), folder)
        caches |= {"MEGATRAIN_TUNE": "0", "MEGATRAIN_TUNED": f"{folder}/none"}  # as for a new user
        seconds = []
        for _ in ("cold", "warm"):
            started = time.perf_counter()
            subprocess.run(
                command, env={**os.environ, **caches}, check=True, capture_output=True, timeout=STEP_S
            )
            seconds.append(time.perf_counter() - started)
    return [{**about, "cold_s": seconds[0], "warm_s": seconds[1]}]


TINY = Llama3Config(n_layers=4, hidden_size=128, n_heads=4, n_kv_heads=2, ffn_size=352, vocab_size=2048)
"""1.3M parameters: a step of it is bound by launches."""


def launches(setting: Setting) -> Step:
    """Return the step that counts what a training step of a tiny model launches on the device."""
    about = {"measure": "launches", "model": "tiny"}
    return Step(about, partial(_launches, setting, about))


def _launches(setting: Setting, about: Row) -> list[Row]:
    """Count kernels on a GPU, and on a CPU PyTorch's operators, of one step after two others."""
    cfg = Config(
        model=TINY,
        train=TrainConfig(precision="bf16"),
        seq_len=256,
        micro_batch_size=4,
        global_batch_size=4,
    )
    state = build_state(cfg, setting.device)
    batch = random_batch(cfg, seed=0, packed="text")
    on_gpu = setting.device.type == "cuda"

    def step() -> float:
        started = time.perf_counter()
        train_step(state, batch, cfg, lr=1e-4).loss.item()
        return time.perf_counter() - started

    seconds = statistics.median([step() for _ in range(WARM_UP + COUNTED)][WARM_UP:])
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        step()
    launched = [
        event
        for event in recorded.events() or ()
        if (event.device_type == DeviceType.CUDA) == on_gpu and event.name not in OF_PROFILER
    ]
    count = sum(not event.name.startswith(("Memcpy", "Memset")) for event in launched)
    return [{**about, "launches": count, "step_time_s": seconds, "parameters": n_params(TINY)}]
