"""Two numbers for each part of a model, the same in every layout up to rounding: where two runs part, they tell which.

A part's norm hears of any change of size; its projection, the sum of the elements with signs drawn by their index, also
hears of elements that have changed places.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatrain.nn.init import Shard
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.shards import shard_of

FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""Fibonacci hashing: a bit from the middle of the index times this is the sign."""
BIT = 41
Fingerprints = dict[str, tuple[float, float]]
"""Part of the model -> norm and projection."""


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to, such as `layers.3.attn` or `embed`."""
    words = name.split(".")
    return ".".join(words[:3] if words[0] == "layers" else words[:1])


@torch.no_grad()
def fingerprints(parallel: ParallelModel, tensors: Mapping[str, Tensor]) -> Fingerprints:
    """Return the fingerprints of `tensors`, by canonical name; all ranks call this together.

    One all-reduce of two numbers a part, and one wait for the device.
    """
    parts = list(dict.fromkeys(part_of(name) for name in parallel.plan.weight_of))
    places = {part: number for number, part in enumerate(parts)}
    found = torch.zeros(len(parts), 2, dtype=torch.float64, device=parallel.device)
    for name, shard in _owned_shards(parallel, tensors):
        values = shard.values.to(torch.float64)
        found[places[part_of(name)], 0] += values.square().sum()
        found[places[part_of(name)], 1] += (values * _signs(shard)).sum()
    rows: list[list[float]] = parallel.total(found).tolist()
    return {part: (squares**0.5, projection) for part, (squares, projection) in zip(parts, rows, strict=True)}


def _owned_shards(parallel: ParallelModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Shard]]:
    """Yield this rank's shards, of those that several ranks hold on the first of them only."""
    for name, tensor in tensors.items():
        if parallel.owned(name, tensor) is not None:
            yield name, shard_of(tensor, parallel.splits.get(name) if isinstance(tensor, DTensor) else None)


def _signs(shard: Shard) -> Tensor:
    """Return 1 or -1 for each element of a shard, by its index in the full tensor."""
    index = torch.zeros((), dtype=torch.int64, device=shard.values.device)
    stride = 1
    for dim in reversed(range(shard.values.ndim)):
        length, first = shard.values.shape[dim], shard.offsets[dim]
        along = torch.arange(first, first + length, dtype=torch.int64, device=shard.values.device)
        index = index + (along * stride).view(-1, *[1] * (shard.values.ndim - dim - 1))
        stride *= shard.shape[dim]
    return 1 - 2 * ((index * FACTOR) >> BIT & 1)
