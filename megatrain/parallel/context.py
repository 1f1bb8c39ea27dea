"""Context parallelism: a sequence is sharded over the cp axis; attention communicates in one of three ways.

The sequence is split into 2 · cp chunks; rank r has chunks r and 2 · cp - 1 - r, so that under a causal mask all ranks
have equal work (head-tail balance; Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import replace_seam
from megatrain.nn.moe import MoE
from megatrain.parallel.collectives import Group, exchange, gather_from, shift, sum_over
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh
from megatrain_kernels import attention
from megatrain_kernels.flash_attention.reference import Rule

SEQ = 1  # dimension of `(batch, seq, ...)`


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return which two of the 2 · `size` chunks of a sequence `rank` holds, in order."""
    return rank, 2 * size - 1 - rank


def shard_sequence(x: Tensor, rank: int, size: int) -> Tensor:
    """Return `rank`'s shard `(batch, seq / size, ...)` of `x` `(batch, seq, ...)`."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, SEQ)
    return torch.cat([chunks[place] for place in chunks_of(rank, size)], SEQ)


def in_order(gathered: Tensor, size: int) -> Tensor:
    """Put the shards of all ranks, concatenated along the sequence, into the order of the sequence."""
    chunks = gathered.chunk(2 * size, SEQ)
    where = {
        chunk: 2 * rank + half for rank in range(size) for half, chunk in enumerate(chunks_of(rank, size))
    }
    return torch.cat([chunks[where[chunk]] for chunk in range(2 * size)], SEQ)


def context_parallel(model: Decoder, plan: Plan, mesh: Mesh, cfg: ParallelConfig) -> None:
    """Replace the attention core of every block by one over a sharded sequence. Causal attention only."""
    group = mesh.cp.get_group()
    core = {"all_gather": GatheredCore, "ring": RingCore, "ulysses": UlyssesCore}[cfg.cp_kind]
    for _, block in model.blocks():
        replace_seam(block.attn, "core", core(block.attn.core, group))
        if block.moe is not None:
            sum_sequences_over(block.moe, group)


def sum_sequences_over(moe: MoE, group: Group) -> None:
    """Let the balance loss, which is computed per sequence, also sum over the shards of a sequence in `group`."""
    inner = moe.balance.sequence_sum
    replace_seam(moe.balance, "sequence_sum", lambda part: sum_over(inner(part), group))


class _Core(nn.Module):
    """An `nn.attention.AttentionCore` on a rank's shard of a sequence; `doc_ids` are those of the full sequence."""

    def __init__(self, core: Any, group: Group) -> None:
        super().__init__()
        self.sliding_window, self.scale, self.group = core.sliding_window, core.scale, group


class GatheredCore(_Core):
    """Attention that all-gathers keys and values (in one collective); queries stay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        size, rank = self.group.size(), self.group.rank()
        both = in_order(gather_from(torch.cat([k, v], -1), SEQ, self.group), size)
        keys, values = both.split([k.shape[-1], v.shape[-1]], -1)
        length = q.shape[SEQ] // 2
        outs = []
        for part, chunk in zip(q.split(length, SEQ), chunks_of(rank, size), strict=True):
            end = (chunk + 1) * length  # later keys are masked
            docs = None if doc_ids is None else doc_ids[:, :end]
            outs.append(
                attention(
                    part,
                    keys[:, :end],
                    values[:, :end],
                    scale=self.scale,
                    window=self.sliding_window,
                    doc_ids=docs,
                    q_offset=chunk * length,
                )
            )
        return torch.cat(outs, SEQ)  # type: ignore[arg-type]


class UlyssesCore(_Core):
    """Ulysses attention: an all-to-all gives each rank the full sequence for its share of the heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        q, k, v = (self._to_heads(t) for t in (q, k, v))
        out = attention(q, k, v, scale=self.scale, window=self.sliding_window, doc_ids=doc_ids)
        assert isinstance(out, Tensor)
        return self._to_positions(out)

    def _to_heads(self, x: Tensor) -> Tensor:
        """Exchange `(batch, seq / cp, heads, dim)` for `(batch, seq, heads / cp, dim)`."""
        size = self.group.size()
        parts = exchange(torch.stack(x.chunk(size, 2)), self.group)
        return in_order(torch.cat(parts.unbind(0), SEQ), size)

    def _to_positions(self, x: Tensor) -> Tensor:
        size = self.group.size()
        parts = torch.stack([shard_sequence(x, rank, size) for rank in range(size)])
        return torch.cat(exchange(parts, self.group).unbind(0), 2)


class RingCore(_Core):
    """Ring attention (arXiv 2310.01889): keys and values go around the ring; results are combined by log-sum-exp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        size, rank = self.group.size(), self.group.rank()
        length = q.shape[SEQ] // 2
        queries = list(zip(q.split(length, SEQ), chunks_of(rank, size), strict=True))
        joined: list[tuple[Tensor, Tensor] | None] = [None, None]
        both = torch.cat([k, v], -1)
        for turn in range(size):
            keys, values = both.split([k.shape[-1], v.shape[-1]], -1)
            places = chunks_of((rank - turn) % size, size)
            for n, (part, chunk) in enumerate(queries):
                for half, place in enumerate(places):
                    if self._sees(chunk, place, length):
                        at = slice(half * length, (half + 1) * length)
                        found = self._block(part, keys[:, at], values[:, at], doc_ids, chunk, place)
                        joined[n] = found if joined[n] is None else _join(joined[n], found)  # type: ignore[arg-type]
            if turn < size - 1:
                both = shift(both, self.group)
        return torch.cat([each[0] for each in joined if each is not None], SEQ).to(q.dtype)

    def _sees(self, chunk: int, place: int, length: int) -> bool:
        """Tell whether any query of `chunk` sees a key of chunk `place`."""
        offset = (chunk - place) * length
        rule = Rule(causal=True, scale=1.0, window=self.sliding_window, softcap=None, q_offset=offset)
        return rule.sees_any(0, length, length)

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, chunk: int, place: int
    ) -> tuple[Tensor, Tensor]:
        length = q.shape[SEQ]
        # Ids of the positions from the first key to the last query.
        docs = None if doc_ids is None else doc_ids[:, place * length : (chunk + 1) * length]
        offset = (chunk - place) * length
        out, lse = attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.sliding_window,
            doc_ids=docs,
            q_offset=offset,
            return_lse=True,
        )
        return out, lse.transpose(1, 2).unsqueeze(-1)


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine two results of attention over different keys.

    Each is an output `(batch, seq, heads, dim)` with its log-sum-exp `(batch, seq, heads, 1)`.
    """
    lse = torch.logaddexp(a[1], b[1])
    outs = [out.to(lse.dtype) * torch.exp(part - lse) for out, part in (a, b)]
    return outs[0] + outs[1], lse
