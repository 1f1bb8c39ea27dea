"""Random tokens to train on."""

import torch

from megatrain.data.loader import Batch, StepBatch
from megatrain.train.config import Config


def random_batch(cfg: Config, seed: int) -> StepBatch:
    """Draw one step of random tokens in documents of one sequence each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cfg.micro_batch_size, cfg.seq_len)
    parts = []
    for _ in range(cfg.global_batch_size // cfg.micro_batch_size):
        tokens = torch.randint(cfg.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        positions = torch.arange(cfg.seq_len).expand(shape).contiguous()
        parts.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, None))
    tokens_per_step = cfg.global_batch_size * cfg.seq_len
    return StepBatch(0, torch.arange(cfg.global_batch_size).numpy(), parts, tokens_per_step, "")
