"""One update of a group of parameters by AdamW, Lion or SGD, written out, with states in full, 16 or 8 bits.

AdamW: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2. Lion: Chen et al., arXiv 2302.06675, algorithm 2. SGD: with
momentum as torch.optim.SGD defines it, without dampening; its weight decay is added to the gradient.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain_kernels.dynamic_map import BLOCK, decode, encode, n_blocks
from megatrain_kernels.stochastic import element_bits, round_to_bfloat16

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}
"""Names of the states; a second one has no negative values."""
WEIGHT_DRAW = 2
"""Which 16 bits of an element's 64 round its weight; the first two round its states."""


class Update(NamedTuple):
    """What is done to every parameter of a group."""

    rule: str
    """"adamw", "lion" or "sgd"."""
    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    """Of SGD: the momentum; 0: it has no state."""
    beta2: float = 0.0
    eps: float = 0.0
    nesterov: bool = False
    states: str = "full"
    """How states are stored. "full": in the weights' type, float32 at least; "bf16"; "int8": codes (uint8) and scales
    as in `dynamic_map`."""
    stochastic: bool = False
    """Round states, and weights, in bfloat16 stochastically."""
    copies: bool = False
    """Each weight has a copy in another type, which is written from it."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the states."""
        return () if self.rule == "sgd" and not self.beta1 else MOMENTS[self.rule]

    @property
    def is_counted(self) -> bool:
        """Whether each parameter has a number of updates, `step`: for AdamW's corrections, and for random bits."""
        return self.rule == "adamw" or self.stochastic

    @property
    def fields(self) -> tuple[str, ...]:
        """What each parameter has, in the order of `optimizer_step`'s arguments."""
        suffixes = ("", "_scale") if self.states == "int8" else ("",)
        states = tuple(name + suffix for name in self.moments for suffix in suffixes)
        return ("weight", "gradient", *states, *("step",) * self.is_counted, *("copy",) * self.copies)


class Place(NamedTuple):
    """Where a tensor, seen as rows, lies in the full tensor that it is a shard of, and the key of its random bits.

    Element (row, column) is number `first + row // plane_rows · plane_step + row % plane_rows · row_step + column`.
    """

    key: int
    columns: int
    """Elements of a row: neighbours in the full tensor as well."""
    first: int = 0
    plane_rows: int = 1
    row_step: int = 0
    plane_step: int = 0


def whole(shape: Sequence[int], key: int) -> Place:
    """Return the place of a full tensor."""
    columns = shape[-1] if len(shape) > 1 else max(1, torch.Size(shape).numel())
    return Place(key, columns, plane_rows=1, plane_step=columns)


def elements(place: Place, rows: range, columns: range, device: torch.device) -> Tensor:
    """Return the numbers, in the full tensor, of a tile's elements, int64 `(rows, columns)`."""
    row = torch.arange(rows.start, rows.stop, device=device)
    planes = torch.div(row, place.plane_rows, rounding_mode="floor")
    starts = place.first + planes * place.plane_step + row % place.plane_rows * place.row_step
    return starts[:, None] + torch.arange(columns.start, columns.stop, device=device)


def optimizer_step_reference(
    parameter: Mapping[str, Tensor], how: Update, place: Place, clip: Tensor | None
) -> None:
    """Update one parameter in place, its `step` excepted, which counts this update already.

    Args:
        parameter: the tensors by their names in `how.fields`, each contiguous.
        clip: factor on the gradient, 0-d; None: 1.
    """
    views = as_rows(parameter, place)
    rows = range(len(views["weight"]))
    update_tile(views, parameter.get("step"), how, place, rows, range(place.columns), clip)


def as_rows(parameter: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """Return a parameter's tensors, its `step` excepted, as rows: `(rows, columns)`, of scales `(rows, blocks)`."""
    rows = parameter["weight"].numel() // max(1, place.columns)
    widths = {
        name: n_blocks(place.columns) if name.endswith("_scale") else place.columns for name in parameter
    }
    return {name: t.view(rows, widths[name]) for name, t in parameter.items() if name != "step"}


def update_tile(
    views: Mapping[str, Tensor],
    step: Tensor | None,
    how: Update,
    place: Place,
    rows: range,
    columns: range,
    clip: Tensor | None,
) -> None:
    """Update the rows and columns of a parameter that these ranges say; blocks of 8-bit states are whole in them."""
    # Of scales, a column is a block.
    blocks = range(columns.start // BLOCK, -(-columns.stop // BLOCK))
    part = {
        name: view[rows.start : rows.stop, (blocks if name.endswith("_scale") else columns).start :][
            :, : len(blocks if name.endswith("_scale") else columns)
        ]
        for name, view in views.items()
    }
    wide = torch.promote_types(part["weight"].dtype, torch.float32)
    weight, gradient = part["weight"].to(wide), part["gradient"].to(wide)
    if clip is not None:
        gradient = gradient * clip.to(wide)
    states = [_read(part, name, how, wide, signed=n == 0) for n, name in enumerate(how.moments)]
    weight, states = RULES[how.rule](weight, gradient, states, step, how)
    bits = None
    if how.stochastic:
        assert step is not None
        bits = element_bits(elements(place, rows, columns, weight.device), place.key, step)
    for n, (name, state) in enumerate(zip(how.moments, states, strict=True)):
        if how.states == "int8":
            codes, scales = encode(state, signed=n == 0)
            part[name].copy_(codes)
            part[f"{name}_scale"].copy_(scales)
        else:
            _write(part[name], state, bits, n)
    _write(part["weight"], weight, bits, WEIGHT_DRAW)
    if how.copies:
        part["copy"].copy_(weight)


def _read(part: Mapping[str, Tensor], name: str, how: Update, wide: torch.dtype, *, signed: bool) -> Tensor:
    if how.states == "int8":
        return decode(part[name], part[f"{name}_scale"], wide, signed=signed)
    return part[name].to(wide)


def _write(target: Tensor, value: Tensor, bits: Tensor | None, draw: int) -> None:
    if bits is not None and target.dtype == torch.bfloat16:
        value = round_to_bfloat16(value, bits, draw)
    target.copy_(value)


def adamw(
    weight: Tensor, gradient: Tensor, states: list[Tensor], step: Tensor | None, how: Update
) -> tuple[Tensor, list[Tensor]]:
    """Return weight and states after AdamW's update number `step`."""
    assert step is not None
    first, second = states
    count = step.double()
    first = first + (1 - how.beta1) * (gradient - first)
    second = how.beta2 * second + (1 - how.beta2) * gradient * gradient
    root = (1 - how.beta2**count).sqrt().to(weight.dtype)
    size = (how.lr / (1 - how.beta1**count)).to(weight.dtype)
    weight = weight * (1 - how.lr * how.weight_decay)
    return weight - size * (first / (second.sqrt() / root + how.eps)), [first, second]


def lion(
    weight: Tensor, gradient: Tensor, states: list[Tensor], step: Tensor | None, how: Update
) -> tuple[Tensor, list[Tensor]]:
    """Return weight and state after Lion's update."""
    (first,) = states
    direction = (first + (1 - how.beta1) * (gradient - first)).sign()
    weight = weight * (1 - how.lr * how.weight_decay) - how.lr * direction
    return weight, [first + (1 - how.beta2) * (gradient - first)]


def sgd(
    weight: Tensor, gradient: Tensor, states: list[Tensor], step: Tensor | None, how: Update
) -> tuple[Tensor, list[Tensor]]:
    """Return weight and state, if there is one, after a step of SGD."""
    gradient = gradient + how.weight_decay * weight
    if not states:
        return weight - how.lr * gradient, []
    buffer = how.beta1 * states[0] + gradient
    direction = gradient + how.beta1 * buffer if how.nesterov else buffer
    return weight - how.lr * direction, [buffer]


RULES = {"adamw": adamw, "lion": lion, "sgd": sgd}
