"""A paged cache of keys and values (PagedAttention, arXiv 2309.06180), and attention over it.

Tokens of several sequences are packed into one row, each sequence's one after the other: a prompt of a hundred tokens,
the next token of a sequence that is being generated. Attention appends their keys and values to the sequences' blocks
and lets each query see its own sequence. The rest of a model treats tokens one by one, so nothing is padded for it.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatrain.nn.attention import Attention
from megatrain.nn.layer import replace_seam
from megatrain.nn.mla import MultiHeadLatentAttention
from megatrain_kernels import attention

BLOCK_SIZE = 16
"""Tokens of a block: few, so that a sequence wastes little of its last one."""


class Part(NamedTuple):
    """New tokens of one sequence in a packed row."""

    sequence: int
    start: int
    """Tokens of the sequence that are in the cache already."""
    n_tokens: int


class OutOfBlocksError(RuntimeError):
    """The cache has too few free blocks."""


@dataclass
class PagedCache:
    """Blocks of keys and values, and for each sequence a table of its blocks.

    A layer's memory is allocated when it first attends, in the type and with the heads that it has then.
    """

    n_blocks: int
    block_size: int = BLOCK_SIZE
    _free: list[int] = field(init=False)
    _tables: dict[int, list[int]] = field(default_factory=dict)
    _pools: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(self.n_blocks))[::-1]

    @property
    def n_free(self) -> int:
        """Number of blocks that no sequence has."""
        return len(self._free)

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that is allocated."""
        return sum(each.nbytes for pair in self._pools.values() for each in pair)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that `tokens` tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def extend(self, sequence: int, tokens: int) -> list[int]:
        """Give a sequence the blocks that it lacks for `tokens` tokens in all; returns these.

        Raises:
            OutOfBlocksError: there are not as many; nothing has changed.
        """
        table = self._tables.setdefault(sequence, [])
        lacking = self.blocks_for(tokens) - len(table)
        if lacking <= 0:
            return []
        if lacking > len(self._free):
            raise OutOfBlocksError(f"{lacking} blocks of {self.block_size} tokens wanted, {self.n_free} free")
        fresh = [self._free.pop() for _ in range(lacking)]
        table += fresh
        return fresh

    def release(self, sequence: int) -> None:
        """Take all blocks of a sequence back, if it has any."""
        self._free += reversed(self._tables.pop(sequence, []))

    def slots(self, sequence: int, tokens: int) -> np.ndarray:
        """Return where a sequence's first `tokens` keys are, `(tokens,)` int64 indices into the memory of a layer."""
        blocks = np.array(self._tables[sequence], dtype=np.int64)
        found: np.ndarray = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()[:tokens]
        return found

    def blocks(self, sequence: int) -> list[int]:
        """Return the blocks of a sequence, in order."""
        return self._tables[sequence]

    def pool(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory of a layer's keys and values, `(n_blocks * block_size, kv_heads, dim)` each.

        k, v: `(1, tokens, kv_heads, dim)`, after which it is modelled at first.
        """
        if layer not in self._pools:
            tokens = self.n_blocks * self.block_size
            self._pools[layer] = (k.new_empty(tokens, *k.shape[2:]), v.new_empty(tokens, *v.shape[2:]))
        return self._pools[layer]


class _Group(NamedTuple):
    """Adjacent parts of equally many tokens, which are attended to together."""

    tokens: slice
    """Place of its tokens in the packed row."""
    n_tokens: int
    """New tokens of each part."""
    slots: Tensor | None
    """`(parts, keys)`: where each part's keys are, the last ones on the right; None: all of them are new."""
    is_key: Tensor | None
    """`(parts, keys)` int32: 0 where a shorter sequence than the longest has no key; None: all have as many."""
    singles: tuple[Part, ...] = ()
    """The parts, if each has one new token and others in the cache."""


class _Pages(NamedTuple):
    """Where the keys of several sequences are that have one new token each: whole blocks, which are fast to copy."""

    blocks: Tensor
    """`(parts, blocks)`, flat; a sequence that needs fewer has its first one again."""
    seen: int
    """Keys of a part, from its first block on, that may be looked at."""
    mask: Tensor | None
    """`(parts, 1, 1, seen)`: which of them are; None: all."""


class PackedStep:
    """What a pass over one packed row reads and writes, computed once for all layers."""

    def __init__(self, cache: PagedCache, parts: Sequence[Part], device: torch.device) -> None:
        """Take the parts in the order of the row. Those of equally many tokens are attended to together if adjacent.

        Raises:
            OutOfBlocksError: the cache has too few free blocks.
        """
        self.cache = cache
        self.device = device
        self._pages: dict[tuple[int, int | None], _Pages] = {}
        fresh = [n for part in parts for n in cache.extend(part.sequence, part.start + part.n_tokens)]
        self.fresh = torch.tensor(fresh, device=device) if fresh else None
        self.slots = torch.from_numpy(self._written(parts)).to(device)
        self.groups: list[_Group] = []
        first = 0
        for (count, _), group in itertools.groupby(parts, key=lambda part: (part.n_tokens, part.start > 0)):
            members = list(group)
            tokens = slice(first, first + count * len(members))
            self.groups.append(self._group(members, tokens, count))
            first = tokens.stop

    def _written(self, parts: Sequence[Part]) -> np.ndarray:
        """Return where the new tokens' keys are to be, `(tokens,)` int64."""
        cache, size = self.cache, self.cache.block_size
        found: list[np.ndarray] = []
        ones: list[int] = []  # single tokens, which are many: without an array for each
        for part in parts:
            if part.n_tokens == 1:
                ones.append(cache.blocks(part.sequence)[part.start // size] * size + part.start % size)
                continue
            found += [np.array(ones, dtype=np.int64)] if ones else []
            ones = []
            found.append(cache.slots(part.sequence, part.start + part.n_tokens)[part.start :])
        return np.concatenate([*found, np.array(ones, dtype=np.int64)])

    def _group(self, parts: list[Part], tokens: slice, count: int) -> _Group:
        device = self.device
        if not any(part.start for part in parts):
            return _Group(tokens, count, None, None)
        if count == 1:
            return _Group(tokens, count, None, None, tuple(parts))
        lengths = [part.start + count for part in parts]
        longest = max(lengths)
        slots = np.empty((len(parts), longest), dtype=np.int64)
        for row, part, length in zip(slots, parts, lengths, strict=True):
            row[longest - length :] = self.cache.slots(part.sequence, length)
            # The place of a missing key is that of a real one: memory that was never written may hold NaN.
            row[: longest - length] = row[longest - length]
        is_key = None
        if min(lengths) < longest:
            places = torch.arange(longest, device=device)
            is_key = (places >= longest - torch.tensor(lengths, device=device)[:, None]).to(torch.int32)
        return _Group(tokens, count, torch.from_numpy(slots).to(device), is_key)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None
    ) -> Tensor:
        """Append keys and values to the cache, and attend; returns `(1, tokens, heads, v_dim)`.

        Args:
            q, k, v: `(1, tokens, heads, dim)` of the packed row, which tokens without a meaning may follow.
        """
        keys, values = self.cache.pool(layer, k, v)
        n = len(self.slots)
        # The unused end of a block is copied, too, and what was there before may be NaN.
        if self.fresh is not None:
            for memory in (keys, values):
                memory.view(self.cache.n_blocks, -1).index_fill_(0, self.fresh, 0.0)
        keys.index_copy_(0, self.slots, k[0, :n])
        values.index_copy_(0, self.slots, v[0, :n])
        outs = []
        for place, group in enumerate(self.groups):
            if group.singles:
                pages = self._pages_of(place, group.singles, window)
                outs.append(self._attend_singles(q[0, group.tokens], pages, keys, values, scale))
                continue
            rows = (-1, group.n_tokens)
            queries = q[0, group.tokens].unflatten(0, rows)
            if group.slots is None:
                own = (t[0, group.tokens].unflatten(0, rows) for t in (k, v))
                mixed = attention(queries, *own, scale=scale, window=window)
            else:
                seen = group.slots.shape[1]
                if window is not None:
                    seen = min(seen, window + group.n_tokens - 1)
                slots = group.slots[:, -seen:].flatten()
                mixed = attention(
                    queries,
                    keys.index_select(0, slots).unflatten(0, (-1, seen)),
                    values.index_select(0, slots).unflatten(0, (-1, seen)),
                    scale=scale,
                    window=window,
                    doc_ids=None if group.is_key is None else group.is_key[:, -seen:],
                    q_offset=seen - group.n_tokens,
                )
            assert isinstance(mixed, Tensor)
            outs.append(mixed.flatten(0, 1))
        if (rest := q.shape[1] - n) > 0:
            outs.append(q.new_zeros(rest, q.shape[2], v.shape[3]))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).unsqueeze(0)

    def _attend_singles(
        self, q: Tensor, pages: _Pages, keys: Tensor, values: Tensor, scale: float | None
    ) -> Tensor:
        """Attend with one query of each part, `(parts, heads, dim)`: all that the mask leaves is before it."""

        def gathered(memory: Tensor) -> Tensor:
            found = memory.view(self.cache.n_blocks, -1).index_select(0, pages.blocks)
            return found.view(len(q), -1, *memory.shape[1:])[:, : pages.seen].transpose(1, 2)

        mixed = scaled_dot_product_attention(
            q.unsqueeze(2),
            gathered(keys),
            gathered(values),
            attn_mask=pages.mask,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        return mixed.squeeze(2)

    def _pages_of(self, place: int, parts: tuple[Part, ...], window: int | None) -> _Pages:
        """Return where the keys of a group are, which is the same in all layers with that window."""
        known = self._pages.get((place, window))
        if known is not None:
            return known
        size = self.cache.block_size
        lengths = np.array([part.start + 1 for part in parts])
        oldest = np.zeros_like(lengths) if window is None else (lengths - window).clip(min=0)
        firsts = oldest // size
        counts = -(-lengths // size) - firsts
        table = np.empty((len(parts), counts.max()), dtype=np.int64)
        for row, part, first, count in zip(table, parts, firsts.tolist(), counts.tolist(), strict=True):
            blocks = self.cache.blocks(part.sequence)
            row[:count] = blocks[first : first + count]
            row[count:] = blocks[first]
        seen = int((lengths - firsts * size).max())
        places = firsts[:, None] * size + np.arange(seen)
        is_seen = (places < lengths[:, None]) & (places >= oldest[:, None])
        mask = None if is_seen.all() else torch.from_numpy(is_seen[:, None, None]).to(self.device)
        found = _Pages(torch.from_numpy(table.ravel()).to(self.device), seen, mask)
        self._pages[place, window] = found
        return found


class PagedCore(nn.Module):
    """An `AttentionCore` of one layer for packed rows, of which `step` is the present one."""

    step: PackedStep

    def __init__(self, layer: int, *, window: int | None, scale: float | None) -> None:
        super().__init__()
        self.layer, self.sliding_window, self.scale = layer, window, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        return self.step.attend(self.layer, q, k, v, window=self.sliding_window, scale=self.scale)


class PagedAttention:
    """The attention modules of a model, which attend over pages while `over` says so."""

    def __init__(self, model: nn.Module) -> None:
        kinds = Attention | MultiHeadLatentAttention
        self.parts = [part for part in model.modules() if isinstance(part, kinds)]
        self.cores = [
            PagedCore(layer, window=part.core.sliding_window, scale=part.core.scale)  # type: ignore[arg-type]
            for layer, part in enumerate(self.parts)
        ]

    @contextlib.contextmanager
    def over(self, step: PackedStep) -> Iterator[None]:
        """Attend to a packed row as `step` says, in the `with` block."""
        before = [part.core for part in self.parts]
        for part, core in zip(self.parts, self.cores, strict=True):
            core.step = step
            replace_seam(part, "core", core)
        try:
            yield
        finally:
            for part, usual in zip(self.parts, before, strict=True):
                replace_seam(part, "core", usual)
