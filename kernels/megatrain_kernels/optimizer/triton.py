"""Triton kernel of a group's update: every parameter of it in one launch (the multi-tensor apply of NVIDIA's apex).

A table on the device has the addresses of each parameter's tensors. A program updates `BLOCKS` blocks of 128 neighbours
in a row, the blocks that share a scale where states are codes; a list says whose blocks they are.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.dynamic_map import BLOCK, TINY, ZERO_CODE, dynamic_map, map_edges
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr
from megatrain_kernels.optimizer.reference import Place, Update
from megatrain_kernels.stochastic import GOLDEN, MIX_1, MIX_2

BLOCKS = 8
"""Blocks that a program updates."""
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@triton.jit
def _power(count: Tile, BASE: constexpr) -> Tile:
    """Return BASE^count in float64, for a whole number below 2^24: float32 has not digits enough for 1 - BASE^count."""
    result = tl.full((1,), 1.0, tl.float64)
    for bit in tl.static_range(24):
        factor = tl.full((1,), BASE ** (2**bit), tl.float64)
        result = tl.where((count >> bit) & 1 == 1, result * factor, result)
    return result


@triton.jit
def _mix(z: Tile, SHIFT: constexpr, FACTOR: constexpr) -> Tile:
    mask: tl.constexpr = (1 << (64 - SHIFT)) - 1
    return (z ^ ((z >> SHIFT) & mask)) * FACTOR


@triton.jit
def _splitmix(counter: Tile, key: Tile, FIRST: constexpr, SECOND: constexpr, STEP: constexpr) -> Tile:
    """Return what `stochastic.splitmix` returns."""
    z = _mix(_mix((counter + 1) * STEP + key, 30, FIRST), 27, SECOND)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _rounded(x: Tile, bits: Tile, DRAW: constexpr) -> Tile:
    """Return what `stochastic.round_to_bfloat16` returns."""
    drawn = ((bits >> (16 * DRAW)) & 0xFFFF).to(tl.int32)
    up = ((x.to(tl.int32, bitcast=True) + drawn) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), up, x).to(tl.bfloat16)


@triton.jit
def _code(x: Tile, edges: Pointer, ZERO: constexpr, LOWEST: constexpr) -> Tile:
    """Return the code of x in [-1, 1]: that of its decade and part, moved by one where an edge says so.

    ZERO is the code of 0, LOWEST the number of values in the lowest decade.
    """
    y = tl.abs(x)
    decade = tl.full(x.shape, 6, tl.int32)
    for _ in tl.static_range(6):
        is_small = y < 0.1
        y = tl.where(is_small, y * 10.0, y)
        decade -= is_small.to(tl.int32)
    bins = LOWEST << decade
    part = ((y - 0.1) * (bins.to(tl.float32) * 1.1111111)).to(tl.int32)
    code = ZERO + 1 + bins - LOWEST + tl.minimum(tl.maximum(part, 0), bins - 1)
    code = tl.where(x < 0, tl.maximum(2 * ZERO - code, 0), code)
    below, above = tl.load(edges + code), tl.load(edges + code + 1)
    return code + (x > above).to(tl.int32) - (x <= below).to(tl.int32)


@triton.jit
def _read(
    base: Pointer, scales: Pointer, place: Tile, block: Tile, known: Tile, there: Tile, values: Pointer,
    TYPE: constexpr, ALIGNED: constexpr,
) -> Tile:  # fmt: skip
    """Load a state as float32."""
    pointer = _pointer(base, TYPE, ALIGNED)
    if tl.uint8 == TYPE:
        code = tl.load(pointer + place, mask=known, other=0).to(tl.int32)
        scale = tl.load(_pointer(scales, tl.float32, ALIGNED) + block, mask=there, other=0.0)
        return tl.load(values + code) * scale[:, None]
    return tl.load(pointer + place, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _pointer(address: Tile, TYPE: constexpr, ALIGNED: constexpr) -> Pointer:
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _write(
    x: Tile, base: Pointer, scales: Pointer, place: Tile, block: Tile, known: Tile, there: Tile, edges: Pointer,
    bits: Tile, TYPE: constexpr, ALIGNED: constexpr, STOCHASTIC: constexpr, DRAW: constexpr, ZERO: constexpr,
    LOWEST: constexpr, LEAST: constexpr,
) -> None:  # fmt: skip
    """Store a state or a weight."""
    pointer = _pointer(base, TYPE, ALIGNED)
    if tl.uint8 == TYPE:
        scale = tl.max(tl.where(known, tl.abs(x), 0.0), axis=1)
        scale = tl.where(scale < LEAST, 0.0, scale)
        inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))
        tl.store(_pointer(scales, tl.float32, ALIGNED) + block, scale, mask=there)
        code = _code(x * inverse[:, None], edges, ZERO, LOWEST)
        tl.store(pointer + place, code.to(tl.uint8), mask=known)
    elif STOCHASTIC and tl.bfloat16 == TYPE:
        tl.store(pointer + place, _rounded(x, bits, DRAW), mask=known)
    else:
        tl.store(pointer + place, x.to(TYPE), mask=known)


@triton.jit
def _updated(
    weight: Tile, gradient: Tile, first: Tile, second: Tile, count: Tile, lr: Number, kept: Number, decay: Number,
    RULE: constexpr, BETA1: constexpr, BETA2: constexpr, EPS: constexpr, NESTEROV: constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Return weight and states after the update, as `reference.RULES` do."""
    if RULE == "sgd":
        gradient += decay * weight
        direction = gradient
        if BETA1 != 0.0:
            first = BETA1 * first + gradient
            direction = gradient + BETA1 * first if NESTEROV else first
        weight -= lr * direction
    elif RULE == "lion":
        update = first + (1 - BETA1) * (gradient - first)
        weight = weight * kept - lr * ((update > 0).to(tl.float32) - (update < 0).to(tl.float32))
        first += (1 - BETA2) * (gradient - first)
    else:
        first += (1 - BETA1) * (gradient - first)
        second = BETA2 * second + (1 - BETA2) * gradient * gradient
        root = tl.sqrt(1 - _power(count, BETA2)).to(tl.float32)[:, None]
        rate = tl.full((1,), 0.0, tl.float64) + lr
        size = (rate / (1 - _power(count, BETA1))).to(tl.float32)[:, None]
        below = tl.div_rn(tl.sqrt_rn(second), tl.broadcast_to(root, second.shape)) + EPS
        weight = weight * kept - size * tl.div_rn(first, below)
    return weight, first, second


@triton.jit
def _element_bits(
    size: Pointer, row: Tile, column: Tile, count: Tile, MIX_1: constexpr, MIX_2: constexpr, STEP: constexpr
) -> Tile:
    """Return what `stochastic.element_bits` returns for the elements that `reference.elements` numbers."""
    plane = tl.load(size + 6)
    start = tl.load(size + 5) + row // plane * tl.load(size + 8) + row % plane * tl.load(size + 7)
    key = _splitmix(count, tl.load(size + 4), MIX_1, MIX_2, STEP)
    return _splitmix(start + column, key[:, None], MIX_1, MIX_2, STEP)


@triton.jit
def step_kernel(
    owners: Pointer,  # int32: whose blocks a program has
    addresses: Pointer,  # int64 (parameters, 8)
    sizes: Pointer,  # int64 (parameters, 9)
    clip: Pointer,  # the factor on gradients
    first_map: Pointer, first_edges: Pointer, second_map: Pointer, second_edges: Pointer,
    lr: Number, kept: Number, decay: Number,  # kept: 1 - lr · weight_decay
    RULE: constexpr, BETA1: constexpr, BETA2: constexpr, EPS: constexpr, NESTEROV: constexpr, CLIPPED: constexpr,
    STOCHASTIC: constexpr, COUNTED: constexpr, COPIED: constexpr, MOMENTS: constexpr, EVEN: constexpr,
    WEIGHT: constexpr, GRADIENT: constexpr, STATE: constexpr, COPY: constexpr,
    BLOCKS: constexpr, BLOCK: constexpr, ZERO: constexpr, LEAST: constexpr,
    STEP: constexpr, MIX_1: constexpr, MIX_2: constexpr,
) -> None:  # fmt: skip
    """Update `BLOCKS` blocks of one parameter. EVEN: rows are whole blocks, and addresses multiples of 16."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    own, size = addresses + owner * 8, sizes + owner * 9
    columns, per_row = tl.load(size + 1), tl.load(size + 2)
    block = (tl.program_id(0) - tl.load(size)) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < tl.load(size + 3)
    lane = tl.arange(0, BLOCK)[None, :]
    row, column = (block // per_row)[:, None], ((block % per_row) * BLOCK)[:, None] + lane
    place = block[:, None] * BLOCK + lane if EVEN else row * columns + column
    known = there[:, None] & ((lane if EVEN else column) < (BLOCK if EVEN else columns))
    weight_at, first_at, first_scales = tl.load(own), tl.load(own + 2), tl.load(own + 3)
    second_at, second_scales = tl.load(own + 4), tl.load(own + 5)
    weight = tl.load(_pointer(weight_at, WEIGHT, EVEN) + place, mask=known, other=0.0).to(tl.float32)
    gradient = tl.load(_pointer(tl.load(own + 1), GRADIENT, EVEN) + place, mask=known, other=0.0)
    gradient = gradient.to(tl.float32)
    if CLIPPED:
        gradient *= tl.load(clip).to(tl.float32)
    count = tl.full((1,), 1, tl.int64)  # this update included, which is added to `step` afterwards
    if COUNTED:
        count += tl.load(tl.load(own + 6).to(tl.pointer_type(tl.float32))).to(tl.int64)
    bits = _element_bits(size, row, column, count, MIX_1, MIX_2, STEP) if STOCHASTIC else place
    first, second = gradient, gradient
    if MOMENTS > 0:
        first = _read(first_at, first_scales, place, block, known, there, first_map, STATE, EVEN)
    if MOMENTS > 1:
        second = _read(second_at, second_scales, place, block, known, there, second_map, STATE, EVEN)
    weight, first, second = _updated(
        weight, gradient, first, second, count, lr, kept, decay, RULE, BETA1, BETA2, EPS, NESTEROV)  # fmt: skip
    if MOMENTS > 0:
        _write(first, first_at, first_scales, place, block, known, there, first_edges, bits,
               STATE, EVEN, STOCHASTIC, 0, ZERO, 1, LEAST)  # fmt: skip
    if MOMENTS > 1:
        _write(second, second_at, second_scales, place, block, known, there, second_edges, bits,
               STATE, EVEN, STOCHASTIC, 1, 0, 2, LEAST)  # fmt: skip
    _write(weight, weight_at, first_scales, place, block, known, there, first_edges, bits,
           WEIGHT, EVEN, STOCHASTIC, 2, ZERO, 1, LEAST)  # fmt: skip
    if COPIED:
        _write(weight, tl.load(own + 7), first_scales, place, block, known, there, first_edges, bits,
               COPY, EVEN, False, 2, ZERO, 1, LEAST)  # fmt: skip


@lru_cache(maxsize=64)
def _layout(
    sizes: tuple[int, ...], places: tuple[Place, ...], device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """Return what stays from step to step: whose blocks each program has, and the numbers of each parameter.

    The last says whether every row is made of whole blocks.
    """
    table, owners, start = [], [], 0
    for size, place in zip(sizes, places, strict=True):
        per_row = -(-place.columns // BLOCK)
        blocks = size // max(1, place.columns) * per_row
        numbers = (place.key, place.first, place.plane_rows, place.row_step, place.plane_step)
        table.append((start, place.columns, max(1, per_row), blocks, *numbers))
        owners.append(-(-blocks // BLOCKS))
        start += owners[-1]
    number = torch.arange(len(sizes), dtype=torch.int32)
    repeated = torch.repeat_interleave(number, torch.tensor(owners))
    is_even = all(place.columns % BLOCK == 0 for place in places)
    return repeated.to(device), torch.tensor(table, dtype=torch.int64).to(device), is_even


def _addresses(group: Mapping[str, list[Tensor]], how: Update, device: torch.device) -> tuple[Tensor, bool]:
    """Return the addresses `(parameters, 8)`, 0 where there is nothing, and whether all are multiples of 16.

    They are those of weight, gradient, first state, its scales, second state, its scales, step and copy.
    """
    names = ["weight", "gradient", "", "", "", "", "step", "copy"]
    for n, name in enumerate(how.moments):
        names[2 + 2 * n : 4 + 2 * n] = [name, f"{name}_scale"]
    columns = [[t.data_ptr() for t in group.get(name, ())] or [0] * len(group["weight"]) for name in names]
    is_aligned = not any(address % 16 for n, column in enumerate(columns) if n != 6 for address in column)
    table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    if device.type == "cuda":  # from pinned memory the host need not wait
        table = table.pin_memory()
    return table.to(device, non_blocking=True), is_aligned


def launch(
    group: Mapping[str, list[Tensor]], how: Update, places: Sequence[Place], clip: Tensor | None
) -> bool:
    """Do what PyTorch's path does, in one launch beside that which counts the updates, and return True."""
    weight = group["weight"][0]
    device = weight.device
    owners, sizes, is_even = _layout(tuple(t.numel() for t in group["weight"]), tuple(places), device)
    if not len(owners):  # a rank without elements
        _count(group, how)
        return True
    addresses, is_aligned = _addresses(group, how, device)
    types = [TYPES[group[name][0].dtype] for name in ("weight", "gradient")]
    state = TYPES[group[how.moments[0]][0].dtype] if how.moments else tl.float32
    copy = TYPES[group["copy"][0].dtype] if how.copies else tl.float32
    maps = [table(signed, device) for signed in (True, False) for table in (dynamic_map, map_edges)]
    step_kernel[(len(owners),)](
        owners, addresses, sizes, weight if clip is None else clip, *maps,
        how.lr, 1 - how.lr * how.weight_decay, how.weight_decay,
        RULE=how.rule, BETA1=how.beta1, BETA2=how.beta2, EPS=how.eps, NESTEROV=how.nesterov,
        CLIPPED=clip is not None, STOCHASTIC=how.stochastic, COUNTED=how.is_counted, COPIED=how.copies,
        MOMENTS=len(how.moments),
        EVEN=is_even and is_aligned, WEIGHT=types[0], GRADIENT=types[1], STATE=state, COPY=copy,
        BLOCKS=BLOCKS, BLOCK=BLOCK, ZERO=ZERO_CODE[True], LEAST=TINY, STEP=GOLDEN, MIX_1=MIX_1, MIX_2=MIX_2,
        num_warps=4,
    )  # fmt: skip
    _count(group, how)
    return True


def _count(group: Mapping[str, list[Tensor]], how: Update) -> None:
    if how.is_counted:
        torch._foreach_add_(group["step"], 1)
