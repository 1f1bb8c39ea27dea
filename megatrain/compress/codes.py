"""Quantized matrices: codes of 8 or 4 bits with a scale for each channel or group of inputs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.compress.methods import Number
from megatrain.train.quantized_files import dequantized
from megatrain_kernels import quantize

BITS: dict[Number, int] = {"int8": 8, "int4": 4, "e4m3": 8}
LARGEST: dict[Number, float] = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}
"""The largest code; that of the largest number of a group."""
LEAST: dict[torch.dtype, float] = {
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-126,
    torch.float32: 2.0**-126,
}
"""The least scale of each type in which scales are stored."""


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix is rounded to."""

    number: Number
    group: int | None = None
    """Neighbouring inputs that share a scale; None: all inputs of an output do (per channel)."""
    scale_dtype: torch.dtype = torch.float16
    """Type in which scales are stored. Codes are chosen for the scale as it is stored."""

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scales `(..., out, groups)` float32 of `weight` `(..., out, in)`: largest size / largest code."""
        scaling = {"scaling": "row"} if self.group is None else {"scaling": "group", "group_size": self.group}
        found = quantize(weight.float(), dtype=self.number, **scaling)
        return self.stored(found[1])

    def stored(self, scales: Tensor) -> Tensor:
        """Return scales as they are after they were stored, in float32."""
        least = LEAST[self.scale_dtype]
        return scales.clamp(min=least).to(self.scale_dtype).float().clamp(min=least)

    def round(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the codes nearest to `weight` `(..., out, in)`, int8 or e4m3, under scales `(..., out, groups)`."""
        tiled = weight.unflatten(-1, (scales.shape[-1], -1))
        quotient = (tiled / scales.to(weight.dtype).unsqueeze(-1)).flatten(-2)
        quotient = quotient.clamp(-LARGEST[self.number], LARGEST[self.number])
        return quotient.to(torch.float8_e4m3fn) if self.number == "e4m3" else quotient.round().to(torch.int8)


@dataclass(frozen=True)
class Codes:
    """A quantized matrix, or a stack of them."""

    values: Tensor
    """`(..., out, in)`: int8, or e4m3."""
    scales: Tensor
    """`(..., out, groups)` float32, exact in the type that the grid stores."""
    grid: Grid

    def numbers(self) -> Tensor:
        """Return what they stand for, float32 `(..., out, in)`."""
        return dequantized(self.values, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales as they are stored."""
        bits = BITS[self.grid.number] * self.values.numel()
        return math.ceil(bits / 8) + self.grid.scale_dtype.itemsize * self.scales.numel()


def round_to_nearest(weight: Tensor, grid: Grid) -> Codes:
    """Round each number of `weight` `(..., out, in)` to the nearest code, each group scaled by its largest number."""
    scales = grid.scales(weight)
    return Codes(grid.round(weight, scales), scales, grid)


def squared_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Return each output's squared error over the calibration tokens, `(..., out)`: the diagonal of D G Dᵀ.

    Args:
        difference: `(..., out, in)`, by which a matrix is wrong. gram: `(..., in, in)`, the sum of x xᵀ.
    """
    return ((difference.to(gram.dtype) @ gram) * difference).sum(-1)
