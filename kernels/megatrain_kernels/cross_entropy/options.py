"""The options of a loss over rows of logits, as its paths hand them to each other."""

from typing import NamedTuple

from torch import distributed as dist


class LossOptions(NamedTuple):
    """The options of one call, as `linear_cross_entropy` documents them."""

    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None
    """Rank r of the group holds the r-th of equal slices of the vocabulary."""

    def first(self, columns: int) -> int:
        """The token of the first of this rank's columns."""
        return 0 if self.group is None else dist.get_rank(self.group) * columns
