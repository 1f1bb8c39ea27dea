"""Which keys a query sees and how it scores them: what the paths of `attention` hand to each other."""

from typing import NamedTuple


class Rule(NamedTuple):
    """The options of one call, as `attention` documents them, with the scale filled in."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    q_offset: int

    def keys(self, start: int, end: int, k_seq: int) -> tuple[int, int]:
        """The keys that queries `start` to `end` can see lie in this range (first, one past the last)."""
        first = 0 if self.window is None else start + self.q_offset - self.window + 1
        last = end + self.q_offset if self.causal else k_seq
        first, last = (min(max(edge, 0), k_seq) for edge in (first, last))
        return first, max(first, last)

    def sees_all(self, k_seq: int) -> bool:
        """Does every query see every key, documents aside?"""
        return self.window is None and (not self.causal or self.q_offset >= k_seq - 1)

    def masks(self, q_seq: int, k_seq: int) -> bool:
        """Does it take more than "all keys" or the triangle of self-attention to say what is seen?"""
        triangle = self.causal and self.window is None and q_seq == k_seq and self.q_offset == 0
        return not (triangle or self.sees_all(k_seq))
