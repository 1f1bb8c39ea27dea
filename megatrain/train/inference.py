"""A trained model in tensor-parallel and pipeline ranks, or one process, to generate from or to be evaluated."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_files import load_tokenizer
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import problems, require_processes, world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.parallel.packed_base import round_base
from megatrain.parallel.packed_logits import PackedLogits
from megatrain.parallel.quantized_inputs import quantize_inputs
from megatrain.parallel.shards import shard_of, tell_place
from megatrain.runtime.device import pick_device
from megatrain.runtime.processes import Processes
from megatrain.train.adopt import WEIGHTS, adopted, names_of, require_same_base
from megatrain.train.build import build_model
from megatrain.train.config import Config
from megatrain.train.files import CONFIG_FILE, read_config, require_unchanged
from megatrain.train.import_hf import as_numbers, map_tensors, open_shards, read_model_config, storage_of
from megatrain.train.imported import SEQ_LEN, read_model_tokenizer
from megatrain.train.restore import AVERAGE, takes_average

HF_CONFIG = "config.json"


@dataclass(frozen=True)
class TrainedModel:
    """A model with what is needed to use it; each process holds its shards."""

    parallel: ParallelModel
    tokenizer: Tokenizer
    cfg: Config
    """Of the run, in the layout of these processes; of a Hugging Face directory, its model with defaults."""
    step: int | None
    """Of the checkpoint; None: a Hugging Face directory."""
    in_training: bool = False
    """Whether it is a model while it trains, whose data-parallel ranks compute all texts together: its weights may be
    sharded over them."""

    @property
    def context(self) -> int:
        """Most tokens that the model sees: those of a training sequence."""
        return self.cfg.seq_len

    def packed(self) -> PackedLogits:
        """Return the model as `models.runner.Runner` takes it; each copy of it takes texts of its own."""
        return PackedLogits(self.parallel, by_copy=not self.in_training)


def load_trained(
    directory: Path,
    processes: Processes,
    layout: ParallelConfig | None = None,
    *,
    average: bool | None = None,
    device: torch.device | None = None,
) -> TrainedModel:
    """Load the newest checkpoint of a run, or a Hugging Face directory; all processes call this together.

    Weights and computation are in float32; in float64 if the run is.

    Args:
        layout: whose ranks the processes are: tp, pp, and dp_replicate for copies. None: each has the full model.
        average: as in `takes_average`.

    Raises:
        UserError: `directory` is neither, lacks what is asked for, or the model does not fit the layout.
    """
    layout = layout or ParallelConfig()
    cfg = processes.agree(partial(config_for_inference, directory, layout, average))
    is_run = (directory / CONFIG_FILE).is_file()
    device = device or pick_device(processes.local_rank)
    if world_size(layout) > 1:
        require_processes(layout, processes.size)
    mesh = make_mesh(layout, device) if world_size(layout) > 1 else None
    dtype = torch.float64 if cfg.train.precision == "fp64" else torch.float32
    parallel = build_model(cfg, device, mesh, master_dtype=dtype, shards_data=False)
    if is_run:
        together = processes if mesh is not None else Processes()
        return _from_run(directory, cfg, parallel, together, average)
    with torch.no_grad():
        _read_hf(directory, cfg.model, parallel)
    storage = storage_of(directory)
    if storage is not None and storage.quantizes_inputs:
        quantize_inputs(parallel)
    return TrainedModel(parallel, read_model_tokenizer(directory, cfg.model), cfg, None)


def config_for_inference(directory: Path, layout: ParallelConfig, average: bool | None) -> Config:
    """Return the config of the model in `directory`, in `layout`.

    Raises:
        UserError: `directory` has no model, or it does not fit.
    """
    is_run = (directory / CONFIG_FILE).is_file()
    if not is_run and not (directory / HF_CONFIG).is_file():
        raise UserError(
            f"{directory} is neither a run directory nor a Hugging Face model directory: it has no {CONFIG_FILE} and "
            f"no {HF_CONFIG}"
        )
    if not is_run and average:
        raise UserError(
            f"{directory} is a Hugging Face directory, which has no moving average of its weights"
        )
    return _for_inference(read_config(directory) if is_run else _config_of_hf(directory), layout)


def _for_inference(cfg: Config, layout: ParallelConfig) -> Config:
    """Return `cfg` without what only training does, in `layout`.

    Raises:
        UserError: the model does not fit the layout.
    """
    plan = get_spec(cfg.model.kind).plan(cfg.model)
    broken = list(
        problems(layout, plan, math.lcm(2, layout.tp), rows=layout.pp * layout.dp_replicate, micro_batch=1)
    )
    if broken:
        flags = {"parallel.dp_replicate": "--dp", "parallel.": "--"}
        for field, flag in flags.items():
            broken = [replace(each, field=each.field.replace(field, flag)) for each in broken]
        text = " ".join(map(str, broken))
        raise UserError(f"{text} It is the layout in which the model is loaded.")
    train = replace(cfg.train, precision="fp64" if cfg.train.precision == "fp64" else "fp32")
    return replace(cfg, train=train, parallel=layout, engine="native")


def _config_of_hf(directory: Path) -> Config:
    model = read_model_config(directory)
    return Config(model=model, seq_len=min(SEQ_LEN, model.max_seq_len))


def _from_run(
    directory: Path, cfg: Config, parallel: ParallelModel, processes: Processes, average: bool | None
) -> TrainedModel:
    prefix = AVERAGE if takes_average(directory, cfg, average) else WEIGHTS
    tensors: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}  # beside adapters: those of the run that they were trained on
    for name, parameter in parallel.parameters().items():
        split = parallel.splits.get(name)
        own = parameter.detach()
        placed = own if split is None else tell_place(own, split)
        if parameter.requires_grad:
            tensors[prefix + name] = placed
        else:
            frozen[WEIGHTS + name] = placed
    buffers = {  # these have no average
        WEIGHTS + name: buffer for model in parallel.models for name, buffer in model.named_buffers()
    }
    checkpointer = Checkpointer(directory / "checkpoints", cfg.checkpoint, processes, moves_damaged=False)
    everywhere = sorted({name for names in processes.gather(list(buffers)) for name in names})
    found = checkpointer.load(tensors | buffers, only=(prefix, *everywhere))
    if found is None:
        raise UserError(f"{directory} has no checkpoint yet")
    require_unchanged(directory, cfg, found.manifest.info, found.path)
    if cfg.lora.rank:
        base, step = adopted(cfg, checkpointer)
        only = names_of(frozen, parallel.plan, processes)
        require_same_base(found.manifest.info, base.load(frozen, only=only, step=step), found.path)
        if cfg.lora.base != "full" and cfg.parallel.tp > 1:
            raise UserError(
                f"{directory}: its adapters fit a base of four bits, whose groups tensor parallelism would cut: use "
                "one process, or pp, or `megatrain export --merge`"
            )
        for model in parallel.models:
            round_base(model, cfg.lora)
    _sync_copies(parallel)
    return TrainedModel(parallel, load_tokenizer(directory / "tokenizer"), cfg, found.step)


def _read_hf(directory: Path, model: ModelConfig, parallel: ParallelModel) -> None:
    """Read this process's shards of the weights in a Hugging Face directory."""
    rows = map_tensors(as_numbers(directory, open_shards(directory)), model)
    named = parallel.parameters()
    for part in parallel.models:
        named |= dict(part.named_buffers())  # type: ignore[arg-type]
    for name, tensor in named.items():
        shard = shard_of(tensor, parallel.splits.get(name))
        first, size = shard.offsets[0], shard.values.shape[0]
        found = rows[name][1](first, first + size)
        for dim in range(1, found.ndim):
            found = found.narrow(dim, shard.offsets[dim], shard.values.shape[dim])
        shard.values.copy_(found)
    _sync_copies(parallel)


def _sync_copies(parallel: ParallelModel) -> None:
    if parallel.pipeline is not None:
        parallel.pipeline.sync_tied_embeddings()
