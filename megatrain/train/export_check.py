"""Comparison of an exported model with transformers."""

from pathlib import Path

import torch

from megatrain.config.errors import UserError
from megatrain.runtime.packages import require_package
from megatrain.train.restore import restore_model

TOKENS = 64


@torch.no_grad()
def check_logits(run: Path, exported: Path, *, tolerance: float = 1e-3, average: bool | None = None) -> float:
    """Compare the logits of `run`'s newest model with those of `exported` in transformers, on random tokens.

    Returns the largest difference, as a share of the largest logit. `average` is as in `takes_average`.

    Raises:
        UserError: transformers is not installed, or the difference is above `tolerance` or not a number.
    """
    require_package("transformers", "--check")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ours, _, cfg, _ = restore_model(run, torch.device("cpu"), average=average)
    classifies = cfg.model.classifier is not None
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    theirs = kind.from_pretrained(exported, dtype=torch.float32)
    length = min(TOKENS, cfg.model.max_seq_len)
    tokens = torch.randint(cfg.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    logits = ours.eval()(tokens)[:, -1] if classifies else ours.eval()(tokens)
    difference = float((logits - theirs.eval()(tokens).logits).abs().max() / logits.abs().max())
    if not difference <= tolerance:  # not: also for NaN
        raise UserError(
            f"--check: the logits of {run} and of {exported} in transformers differ by {difference:.2e} of the "
            f"largest, more than {tolerance:g}. Both directories stay as they are; do not rely on this conversion."
        )
    return difference
