"""Comparison of an exported model with transformers."""

from pathlib import Path

import torch

from megatrain.config.errors import UserError
from megatrain.train.restore import restore_model

TOKENS = 64


@torch.no_grad()
def largest_difference(run: Path, exported: Path) -> float:
    """Return the largest difference of logits between `run`'s newest model and `exported`, on random tokens.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("--check needs the package transformers: pip install transformers") from None
    ours, _, cfg, _ = restore_model(run, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    length = min(TOKENS, cfg.model.max_seq_len)
    tokens = torch.randint(cfg.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return float((ours.eval()(tokens) - theirs.eval()(tokens).logits).abs().max())
