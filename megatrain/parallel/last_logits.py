"""A model in any layout as text is generated from it: from tokens to the logits of the next one, equal on all ranks."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.context import chunks_of
from megatrain.parallel.layout import stage_rank


class LastLogits(nn.Module):
    """Tokens `(1, seq)` to the logits `(1, 1, vocab)` after the last one; all ranks call it with the same tokens.

    It is the forward pass of training, so no rank holds more of the model than there. The tokens are padded at their
    end, which a causal model does not see, to what the layout can split.
    """

    def __init__(self, parallel: ParallelModel, *, multiple_of: int = 1) -> None:
        """Take the model, and what a rank's number of tokens must be a multiple of."""
        super().__init__()
        self.models = nn.ModuleList(parallel.models)
        self.parallel = parallel
        cfg = parallel.cfg
        chunks = 2 * cfg.cp if cfg.cp > 1 else 1
        self.unit = math.lcm(chunks, cfg.cp * math.lcm(cfg.tp, multiple_of))
        """The padded length is a multiple of this."""

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        parallel, length = self.parallel, tokens.shape[1]
        padded = pad(tokens, (0, -length % self.unit))
        positions = torch.arange(padded.shape[1], device=tokens.device).unsqueeze(0)
        batch = parallel.shard_batch({"tokens": padded, "positions": positions})
        if parallel.pipeline is None:
            logits: Tensor | None = self.models[0](batch["tokens"], positions=batch["positions"])
        else:
            logits = parallel.pipeline.forward({"targets": None, "doc_ids": None} | batch)
        if parallel.mesh is None:
            assert logits is not None
            return logits[:, length - 1 : length]
        found = torch.zeros(parallel.models[0].cfg.vocab_size, device=tokens.device)
        place = self._place(length - 1, padded.shape[1])
        if logits is not None and place is not None:
            found.copy_(logits[0, place])
        return parallel.total(found).view(1, 1, -1)

    def _place(self, position: int, length: int) -> int | None:
        """Return where this rank has the position of a sequence of `length`, if it is the one that answers for it."""
        mesh, cfg = self.parallel.mesh, self.parallel.cfg
        assert mesh is not None
        if any(mesh.coordinate(axis) for axis in ("dp_replicate", "dp_shard", "tp")):
            return None
        if mesh.coordinate("pp") != stage_rank(cfg.stages - 1, cfg):
            return None
        if cfg.cp == 1:
            return position
        chunk, offset = divmod(position, length // (2 * cfg.cp))
        held = chunks_of(mesh.coordinate("cp"), cfg.cp)
        return held.index(chunk) * (length // (2 * cfg.cp)) + offset if chunk in held else None
