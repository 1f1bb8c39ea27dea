"""What the arguments of a Triton function are; to Triton itself these names mean nothing."""

from triton.language import constexpr, tensor

Pointer = tensor
"""The address of a tensor's first element, or a block of such addresses."""
Tile = tensor
"""A block of values in registers."""
Number = tensor
"""One value: a size, a stride, an index or a factor."""
Pack = tensor
"""Several of these, as a tuple."""

__all__ = ["Number", "Pack", "Pointer", "Tile", "constexpr"]
