"""Loading of a trained model from a run directory."""

from pathlib import Path

import torch
from torch import nn

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_files import load_tokenizer
from megatrain.models.registry import get_spec
from megatrain.parallel.lora import add_adapters, with_adapters
from megatrain.parallel.packed_base import round_base
from megatrain.train.adopt import WEIGHTS, adopted, names_of, require_same_base
from megatrain.train.config import Config
from megatrain.train.files import read_config, require_unchanged

AVERAGE = "ema."
"""Prefix of the names of the parameters' moving averages."""


def takes_average(directory: Path, cfg: Config, average: bool | None) -> bool:
    """Tell whether to use the moving average of the weights; `average` None means where the run keeps one.

    Raises:
        UserError: an average is asked for, and the run keeps none.
    """
    kept = cfg.train.ema_decay is not None
    if average and not kept:
        raise UserError(f"{directory} keeps no moving average of its weights (train.ema_decay is null)")
    return kept if average is None else average


def restore_model(
    directory: Path, device: torch.device, *, average: bool | None = None
) -> tuple[nn.Module, Tokenizer, Config, int]:
    """Load the model of the newest checkpoint in float32, its tokenizer, its config, and the step.

    Args:
        average: as in `takes_average`.

    Raises:
        UserError: `directory` is not a run directory, has no checkpoint, or lacks the average that is asked for.
    """
    cfg = read_config(directory)
    prefix = AVERAGE if takes_average(directory, cfg, average) else WEIGHTS
    spec = get_spec(cfg.model.kind)
    with torch.device("meta"):
        model = spec.build(cfg.model)
        add_adapters(model, with_adapters(spec.plan(cfg.model), cfg.lora), cfg.lora)
    dtype = torch.float64 if cfg.train.precision == "fp64" else torch.float32
    model = model.to(dtype).to_empty(device=device)
    own = {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    tensors = {prefix + name: parameter for name, parameter in own.items()}
    buffers = {WEIGHTS + name: buffer for name, buffer in model.named_buffers()}  # these have no average
    checkpointer = Checkpointer(directory / "checkpoints", cfg.checkpoint, moves_damaged=False)
    found = checkpointer.load(tensors | buffers, only=(prefix, *buffers))
    if found is None:
        raise UserError(f"{directory} has no checkpoint yet")
    require_unchanged(directory, cfg, found.manifest.info, found.path)
    if cfg.lora.rank:
        frozen = {WEIGHTS + name: p.detach() for name, p in model.named_parameters() if name not in own}
        base, step = adopted(cfg)
        only = names_of(frozen, spec.plan(cfg.model), base.processes)
        require_same_base(found.manifest.info, base.load(frozen, only=only, step=step), found.path)
        round_base(model, cfg.lora)
    return model, load_tokenizer(directory / "tokenizer"), cfg, found.step
