"""Construction of a run's parts from its config: layout, state, loader, validation batches."""

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import nn

from megatrain.config.errors import UserError
from megatrain.config.load import rule_problems
from megatrain.config.schema import ConfigError
from megatrain.data.build import Progress
from megatrain.data.loader import Batch, Loader, validation_batches
from megatrain.data.packing import PackedExamples, pack, too_long
from megatrain.data.prepare import Prepared, prepare
from megatrain.data.store import DamagedDataError, TokenSource, TokenStore
from megatrain.engines.config import zero_stage
from megatrain.engines.engine import Engine
from megatrain.models.registry import get_spec
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.moe import use_experts_backend
from megatrain.optim.build import RULES, build_optimizer, start_state
from megatrain.optim.ema import WeightAverage
from megatrain.optim.master import MasterWeights
from megatrain.optim.rule import Updater
from megatrain.parallel.apply import ParallelModel, parallelize
from megatrain.parallel.float8 import Float8, check_float8
from megatrain.parallel.layout import data_ranks, fill, require_processes
from megatrain.parallel.lora import add_adapters, with_adapters
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shards import shard_of
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config
from megatrain.train.objective_config import GRPOConfig
from megatrain.train.private_step import private_gradients
from megatrain.train.state import TrainState

COMPUTE_DTYPE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,  # dtype of everything but the products of linear layers
    "fp64": torch.float64,
}


def with_layout(cfg: Config, processes: int) -> Config:
    """Return `cfg` with its layout filled up to `processes`, and checked again.

    Raises:
        UserError: the layout has another number of ranks, or breaks a rule.
    """
    filled = dataclasses.replace(cfg, parallel=fill(cfg.parallel, processes))
    require_processes(filled.parallel, processes)
    if broken := list(rule_problems(filled)):
        raise ConfigError(broken)
    return filled


def prepare_together(cfg: Config, processes: Processes, *, progress: Progress) -> Prepared:
    """Prepare the data of `cfg` on all processes, which wait as long as one of them is at work.

    Raises:
        UserError: the data is unusable, on any of them.
        StalledError: nobody prepares it any more.
    """

    def advance(phase: str, share: float) -> None:
        progress(phase, share)
        processes.report()

    vocab_size, patience_s = cfg.model.vocab_size, cfg.resilience.timeout_s
    return processes.agree(
        lambda: prepare(cfg.data, progress=advance, vocab_size=vocab_size, patience_s=patience_s)
    )


def build_state(cfg: Config, device: torch.device, mesh: Mesh | None = None) -> TrainState:
    """Make the model with its initial weights on `device`, and a new optimizer.

    Weights are float32 (float64 under `train.precision=fp64`). Each rank of `mesh` initializes only its shards.

    Raises:
        UserError: the device cannot compute in `train.precision`.
    """
    compute_dtype = COMPUTE_DTYPE[cfg.train.precision]
    options = Float8(cfg.train.fp8_scaling, cfg.train.fp8_gradients)
    float8 = options if cfg.train.precision == "fp8" else None
    if float8 is not None:
        check_float8(device)
    master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32

    parallel = build_model(
        cfg,
        device,
        mesh if cfg.engine == "native" else None,
        master_dtype=master_dtype,
        float8=float8,
        rounding=None if cfg.train.qat == "none" else (cfg.train.qat, cfg.train.qat_group),
        shards_data=not is_whole(cfg),
    )
    plan = parallel.plan
    for model in parallel.models:
        init_weights(
            model, plan, seed=cfg.train.seed, shard_of=lambda name, p: shard_of(p, parallel.splits.get(name))
        )
    if cfg.engine != "native":
        return _state_of_engine(cfg, dataclasses.replace(parallel, mesh=mesh), plan)
    # Where FSDP is applied, it makes the copies in the compute dtype.
    is_copied = mesh is None or is_whole(cfg)
    weights = MasterWeights(parallel.parameters(), compute_dtype if is_copied else master_dtype)
    optimizer = build_optimizer(
        cfg.optim,
        weights.trained,
        plan.roles,
        parallel.splits,
        copies=weights.copies,
        seed=cfg.train.seed,
    )
    decay = cfg.train.ema_decay
    average = None if decay is None else WeightAverage(weights.trained, decay)
    privacy = private_gradients(cfg)
    return TrainState(
        parallel=parallel, weights=weights, optimizer=optimizer, average=average, privacy=privacy
    )


def is_whole(cfg: Config) -> bool:
    """Return whether each data-parallel rank trains the whole model, without FSDP."""
    return cfg.privacy.is_on or (cfg.lora.rank > 0 and cfg.lora.base != "full")


def build_model(
    cfg: Config,
    device: torch.device,
    mesh: Mesh | None,
    *,
    master_dtype: torch.dtype,
    float8: Float8 | None = None,
    rounding: tuple[str, int] | None = None,
    shards_data: bool = True,
) -> ParallelModel:
    """Make this rank's part of the model on `device`, its weights not yet set.

    Args:
        master_dtype: of the weights; they compute in `train.precision`.
        float8, rounding, shards_data: as in `parallelize`.
    """
    compute_dtype = COMPUTE_DTYPE[cfg.train.precision]
    spec = get_spec(cfg.model.kind)
    plan = with_adapters(spec.plan(cfg.model), cfg.lora)

    def make_model() -> Decoder:
        with torch.device("meta"):
            model = spec.build(cfg.model)
            add_adapters(model, plan, cfg.lora, seed=cfg.train.seed)
            return model.to(master_dtype)

    parallel = parallelize(
        make_model,
        plan,
        mesh,
        cfg.parallel,
        seq_len=cfg.seq_len,
        compute_dtype=compute_dtype,
        float8=float8,
        rounding=rounding,
        shards_data=shards_data,
    )
    for model in parallel.models:
        model.to_empty(device=device)
        use_experts_backend(model, cfg.moe.backend, compute_dtype)
    return parallel


def _state_of_engine(cfg: Config, parallel: ParallelModel, plan: Plan) -> TrainState:
    """Wrap the full model of `parallel` in the config's engine, which shards it."""
    optimizer = build_optimizer(cfg.optim, parallel.parameters(), plan.roles)
    engine = _engine(cfg, parallel, plan, optimizer)
    named = parallel.parameters()  # FSDP2 has replaced them
    decay = cfg.train.ema_decay
    average = None if decay is None else WeightAverage(named, decay)
    weights = MasterWeights(named, next(iter(named.values())).dtype)
    return TrainState(parallel=parallel, weights=weights, optimizer=optimizer, average=average, engine=engine)


def _engine(cfg: Config, parallel: ParallelModel, plan: Plan, optimizer: Updater) -> Engine:
    """Make the config's engine, and the state of `optimizer` for the parameters that it has then."""
    model, ranks = parallel.models[0], data_ranks(cfg.parallel)
    # DeepSpeed, which Accelerate imports too where it is installed, would search for a device and print what it found.
    os.environ.setdefault("DS_ACCELERATOR", parallel.device.type)
    compute_dtype = COMPUTE_DTYPE[cfg.train.precision]
    if cfg.engine == "accelerate":
        from megatrain.engines.accelerate import AccelerateEngine

        made = AccelerateEngine(model, optimizer, cfg.parallel, ranks=ranks, compute_dtype=compute_dtype)
        start_state(optimizer, cfg.optim)
        return made
    from megatrain.engines.deepspeed import DeepSpeedEngine, ZeroEngine, options

    stage = zero_stage(cfg.parallel, cfg.deepspeed)
    chosen = options(
        stage=stage,
        offload=cfg.deepspeed.offload_optimizer,
        clip_norm=cfg.optim.clip_norm,
        is_bf16=compute_dtype == torch.bfloat16,
        micro_batch_size=cfg.resolved_micro_batch_size,
        micro_batches=cfg.global_batch_size // ranks // cfg.resolved_micro_batch_size,
    )
    if stage == 0:
        return DeepSpeedEngine(model, optimizer, chosen, ranks=ranks)
    make_state = RULES[cfg.optim.kind].initial_state
    return ZeroEngine(
        model,
        optimizer,
        chosen,
        plan=plan,
        mesh=parallel.mesh,
        initial_state=lambda flat: make_state(nn.Parameter(flat), {}, "full", cfg.optim),
    )


def build_loader(
    cfg: Config,
    store: TokenSource,
    mesh: Mesh | None,
    *,
    on_damage: Callable[[DamagedDataError], None] | None = None,
) -> Loader:
    """Make the loader of the rows that this rank reads; see `Loader` for `on_damage`.

    Raises:
        UserError: the data is too short for `seq_len`, or for a batch of a private run.
    """
    readers = {"rank": 0 if mesh is None else mesh.data_rank, "size": data_ranks(cfg.parallel)}
    batch, rows = cfg.global_batch_size, cfg.resolved_micro_batch_size
    if isinstance(
        cfg.objective, GRPOConfig
    ):  # every rank reads the prompts, each of which gets several answers
        batch //= cfg.objective.group_size
        rows, readers = batch, {}
    loader = Loader(
        store=packed(cfg, store),
        seq_len=cfg.seq_len,
        global_batch_size=batch,
        micro_batch_size=rows,
        seed=cfg.train.seed,
        mask_documents=cfg.data.mask_documents,
        **readers,
        prefetch=cfg.data.prefetch,
        numbers_tokens=cfg.lora.dropout > 0,
        on_damage=on_damage,
    )
    if cfg.privacy.is_on and loader.n_samples < cfg.global_batch_size:
        raise UserError(
            f"global_batch_size={cfg.global_batch_size}: must not exceed the {loader.n_samples:,} samples of "
            "a private run (privacy.noise_multiplier)"
        )
    return loader


def packed(cfg: Config, store: TokenSource) -> TokenSource:
    """Return `store` as samples are made of it: of examples, whole ones packed together.

    In a private run, and in GRPO, each is a sample of its own.

    Raises:
        UserError: all examples are longer than a sample, or one is and `data.on_skip` is `error`.
    """
    if not isinstance(store, TokenStore) or not store.is_of_examples:
        return store
    alone = cfg.privacy.is_on or cfg.objective.kind == "grpo"
    found = pack(store, seq_len=cfg.seq_len, alone=alone)
    if cfg.data.on_skip == "error" and (text := too_long(found)):
        raise UserError(
            f"data.on_skip=error, and this would be left out: {text}. Raise seq_len, or allow it with warn"
        )
    return found


def left_out_of(loader: Loader) -> list[str]:
    """Return a notice if the loader leaves out examples."""
    text = too_long(loader.store) if isinstance(loader.store, PackedExamples) else ""
    return [f"Left out of training: {text}. Raise seq_len to take them in."] if text else []


def build_eval_batches(cfg: Config, store: TokenSource | None) -> list[Batch]:
    """Return the validation batches, the same on every rank; empty if nothing is held out."""
    if store is None:
        return []
    return list(
        validation_batches(
            packed(cfg, store),
            seq_len=cfg.seq_len,
            tokens=cfg.train.eval_tokens,
            micro_batch_size=cfg.resolved_micro_batch_size,
            mask_documents=cfg.data.mask_documents,
        )
    )
