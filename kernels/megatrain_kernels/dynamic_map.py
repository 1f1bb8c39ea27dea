"""The 8-bit numbers of optimizer states: dynamic tree quantization in blocks (Dettmers et al., arXiv 2110.02861).

The values of a code are those of that paper's published implementation (`create_dynamic_map` of bitsandbytes): in each
decade from 1e-7 to 1 twice as many as in the one below it, in the middle of equal parts; with 0 and 1. The signed map
has no -1: 256 codes leave no room for it, and the lowest value is -0.993.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 128
"""Neighbours in a row that share a scale, the largest absolute value among them."""
DECADES = 7
"""Powers of ten that the values span."""
TINY = 2.0**-126
"""Largest value below which a block is stored as zeros: its reciprocal would not be finite."""
ZERO_CODE = {True: 127, False: 0}
"""The code of 0, by whether the map is signed."""


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values in order, float32: in (-1, 1] if `signed`, else in [0, 1]."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        bins = 2 ** (decade + (not signed))
        edges = torch.linspace(0.1, 1, bins + 1, dtype=torch.float32)
        means = 10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def map_edges(signed: bool, device: torch.device) -> Tensor:
    """Return 257 numbers, float32: code i is that of the numbers above number i, up to number i + 1.

    They are the middles between values, but for one: what has no sign and is not 0 never becomes 0. Else weights would
    be updated by a quotient by nothing, the zero-point problem of second moments (Li et al., arXiv 2309.01507).
    """
    values = dynamic_map(signed, device).double()
    middles = ((values[:-1] + values[1:]) / 2).float()
    if not signed:
        middles[0] = 0.0
    ends = middles.new_full((1,), torch.inf)
    return torch.cat([-ends, middles, ends])


def n_blocks(columns: int) -> int:
    """Return how many blocks, and so scales, a row has."""
    return -(-columns // BLOCK)


def encode(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize x `(rows, columns)`, float32 or float64, in blocks of each row.

    Returns:
        codes: uint8, as x. scales: `(rows, blocks)` of x's type; a block with a NaN has the scale NaN.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % BLOCK)).view(rows, n_blocks(columns), BLOCK)
    scales = padded.abs().amax(-1)
    scales = torch.where(scales < TINY, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    inner = map_edges(signed, x.device)[1:-1]
    codes = torch.bucketize((padded * inverse[..., None]).float(), inner, out_int32=True)
    return codes.to(torch.uint8).flatten(1)[:, :columns], scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """Return what `encode` has stored, in `dtype`: value · scale."""
    values = dynamic_map(signed, codes.device)[codes.int()].to(dtype)
    return values * scales.to(dtype).repeat_interleave(BLOCK, dim=-1)[:, : codes.shape[-1]]
