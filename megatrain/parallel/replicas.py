"""Comparison of what several ranks hold alike, which silent errors of hardware make differ."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.parallel.sharding import Split
from megatrain.parallel.shards import shard_of

CHUNK = 1 << 20
"""Elements that are hashed at a time."""
FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd number, so that multiplying by it modulo 2^64 loses nothing."""
Shards = dict[tuple[str, tuple[int, ...]], int]
"""(name, offsets in the full tensor) -> hash of the values that a rank holds."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor of which ranks that must hold the same values do not."""

    name: str
    odd: tuple[int, ...]
    """The ranks that differ from most; all holders if there is no majority."""
    holders: tuple[int, ...]


def hash_bits(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of the bits of `tensor` (int64 scalar on its device); any changed bit changes it.

    The sum, modulo 2^64, of the elements' bits, each times an odd number of its own.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.element_size() not in (1, 2, 4, 8):
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        numbers = torch.arange(start, start + len(part), dtype=torch.int64, device=flat.device)
        total += (part * ((numbers * FACTOR) | 1)).sum()
    return total


def hash_shards(tensors: Mapping[str, Tensor], splits: Mapping[str, Split]) -> Shards:
    """Return the hash of this rank's shard of each of `tensors`.

    Args:
        splits: as in `ParallelModel.splits`, by the parameter's name, which a key of `tensors` contains.
    """
    shards = {name: shard_of(tensor, _split(name, tensor, splits)) for name, tensor in tensors.items()}
    hashes = [hash_bits(shard.values) for shard in shards.values()]
    if not hashes:
        return {}
    device = hashes[0].device
    numbers: list[int] = torch.stack([each.to(device) for each in hashes]).tolist()
    return {
        (name, tuple(shard.offsets)): number
        for (name, shard), number in zip(shards.items(), numbers, strict=True)
    }


def _split(name: str, tensor: Tensor, splits: Mapping[str, Split]) -> Split | None:
    if tensor.ndim == 0:
        return None
    _, _, rest = name.partition(".")
    return splits.get(rest) or splits.get(rest.rpartition(".")[0])


def differences(held: Sequence[Shards]) -> list[Difference]:
    """Return the tensors that differ among ranks, from what each of them holds, by rank."""
    values: dict[tuple[str, tuple[int, ...]], dict[int, int]] = defaultdict(dict)
    for rank, shards in enumerate(held):
        for key, value in shards.items():
            values[key][rank] = value
    found = []
    for (name, _), by_rank in values.items():
        counts = Counter(by_rank.values())
        if len(counts) == 1:
            continue
        (common, most), (_, next_most) = counts.most_common(2)
        odd = [rank for rank, value in by_rank.items() if most == next_most or value != common]
        found.append(Difference(name, tuple(odd), tuple(by_rank)))
    return found


def compare_replicas(
    tensors: Mapping[str, Tensor],
    splits: Mapping[str, Split],
    gather: Callable[[Shards], list[Shards]],
) -> list[Difference]:
    """Compare what the ranks hold alike of `tensors`, and return what differs; all ranks call this together.

    Args:
        gather: returns every rank's value, by rank.
    """
    return differences(gather(hash_shards(tensors, splits)))
