"""A model in any layout as text is generated from it: from packed tokens to logits that are equal on all ranks."""

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import pad

from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.layout import stage_rank


class PackedLogits(nn.Module):
    """Packed tokens `(1, tokens)` to logits `(1, kept, vocab)`; all ranks call it with the same tokens.

    It is the forward pass of training, so no rank holds more of the model than there. Data-parallel and
    context-parallel ranks all compute every token: attention is not sharded over the sequence here, since a cache
    takes its place (`nn.paged`). The tokens are padded at their end to what the layout can split.
    """

    def __init__(self, parallel: ParallelModel, *, multiple_of: int = 1, by_copy: bool = False) -> None:
        """Take the model.

        Args:
            multiple_of: what a rank's number of tokens must be a multiple of.
            by_copy: whether each data-parallel replica is called with tokens of its own, and gets their logits.
        """
        super().__init__()
        self.models = nn.ModuleList(parallel.models)
        self.parallel = parallel
        self.by_copy = by_copy
        self.unit = math.lcm(parallel.cfg.tp, multiple_of)
        """The padded length is a multiple of this."""

    @torch.no_grad()
    def forward(self, tokens: Tensor, *, positions: Tensor, keep: Tensor) -> Tensor:
        parallel = self.parallel
        more = (0, -tokens.shape[1] % self.unit)
        tokens, positions = pad(tokens, more), pad(positions, more)
        if parallel.pipeline is None:
            logits: Tensor | None = self.models[0](tokens, positions=positions, keep=keep)
        else:
            batch = {"tokens": tokens, "positions": positions, "keep": keep, "targets": None, "doc_ids": None}
            logits = parallel.pipeline.forward(batch)
        if parallel.mesh is None or (self.by_copy and parallel.pipeline is None):
            assert logits is not None
            return logits
        model = parallel.models[0]
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        found = torch.zeros(1, len(keep), model.n_logits, dtype=dtype, device=tokens.device)
        if logits is not None and self._answers():
            found.copy_(logits)
        if self.by_copy:
            dist.all_reduce(found, group=parallel.mesh.pp.get_group())
            return found
        return parallel.total(found)

    def _answers(self) -> bool:
        """Tell whether this rank's logits are those that all ranks get."""
        mesh, cfg = self.parallel.mesh, self.parallel.cfg
        assert mesh is not None
        if not self.by_copy and any(
            mesh.coordinate(axis) for axis in ("dp_replicate", "dp_shard", "cp", "tp")
        ):
            return False
        return mesh.coordinate("pp") == stage_rank(cfg.stages - 1, cfg)
