"""Loading of a trained model from a run directory."""

from pathlib import Path

import torch
from torch import nn

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.models.registry import get_spec
from megatrain.train.config import Config
from megatrain.train.files import read_config


def restore_model(directory: Path, device: torch.device) -> tuple[nn.Module, Tokenizer, Config, int]:
    """Load the model of the newest checkpoint in float32, its tokenizer, its config, and the step.

    Raises:
        UserError: `directory` is not a run directory, or has no checkpoint.
    """
    cfg = read_config(directory)
    with torch.device("meta"):
        model = get_spec(cfg.model.kind).build(cfg.model)
    dtype = torch.float64 if cfg.train.precision == "fp64" else torch.float32
    model = model.to(dtype).to_empty(device=device)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    found = Checkpointer(directory / "checkpoints", cfg.checkpoint).load(tensors, only="model.")
    if found is None:
        raise UserError(f"{directory} has no checkpoint yet")
    return model, load_tokenizer(directory / "tokenizer"), cfg, found.step
