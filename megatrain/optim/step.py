"""Update of a parameter group by one call of the kernel `optimizer_step`, and the states that it keeps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.optim.config import StateFormat
from megatrain.optim.rule import Facts, Updater
from megatrain.parallel.shards import Shard, local_tensor, shard_like_rows
from megatrain_kernels import optimizer_step
from megatrain_kernels.dynamic_map import BLOCK, ZERO_CODE, n_blocks
from megatrain_kernels.optimizer.reference import Place, Update, whole

PLAIN = Facts()


def update(optimizer: Updater, group: dict[str, Any], how: Update, clip: Tensor | None) -> None:
    """Update the parameters of `group` that have a gradient: those whose states are stored alike in one call.

    Args:
        how: learning rate, weight decay and the rule; how states are stored is each parameter's own.
    """
    alike: dict[StateFormat, list[tuple[nn.Parameter, Facts]]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is not None:
            facts = optimizer.facts.get(parameter, PLAIN)
            alike[facts.states].append((parameter, facts))
    for states, found in alike.items():
        copied = optimizer.writes_copies and found[0][1].copy is not None
        this = how._replace(states=states, copies=copied)
        columns = [_column(optimizer, found, name) for name in this.fields]
        places = [
            facts.place or whole(column.shape, 0)
            for (_, facts), column in zip(found, columns[0], strict=True)
        ]
        tensors = [tensor for column in columns for tensor in column]
        optimizer_step(*tensors, how=this, clip=clip, places=places)


def _column(optimizer: Updater, found: list[tuple[nn.Parameter, Facts]], name: str) -> list[Tensor]:
    if name == "weight":
        return [local_tensor(parameter) for parameter, _ in found]
    if name == "gradient":
        return [local_tensor(parameter.grad) for parameter, _ in found]  # type: ignore[arg-type]
    if name == "copy":
        return [local_tensor(facts.copy) for _, facts in found]  # type: ignore[arg-type]
    return [local_tensor(optimizer.state[parameter][name]) for parameter, _ in found]


def initial_states(parameter: nn.Parameter, how: Update, states: StateFormat) -> dict[str, Tensor]:
    """Return zero states, sharded as `parameter` is, and the count of updates where there is one."""
    made: dict[str, Tensor] = {}
    if how.is_counted:
        made["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for number, name in enumerate(how.moments):
        if states == "int8":
            made[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            local_tensor(made[name]).fill_(ZERO_CODE[number == 0])
            made[f"{name}_scale"] = shard_like_rows(parameter, n_blocks)
        else:
            made[name] = torch.zeros_like(parameter, dtype=torch.bfloat16 if states == "bf16" else None)
    return made


def place_of(shard: Shard, key: int, states: StateFormat) -> Place:
    """Return where a rank's shard lies in the full tensor.

    Args:
        key: of the parameter's random bits.
        states: blocks of 8-bit states lie in rows of the tensor; else what is contiguous may be one row.
    """
    local, shape, offsets = shard.values.shape, shard.shape, shard.offsets
    steps = torch.empty(tuple(shape), device="meta").stride()
    first = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
    is_contiguous = tuple(local[1:]) == tuple(shape[1:])
    if is_contiguous and (len(shape) < 2 or (states != "int8" and shape[-1] % BLOCK)):
        columns = max(1, local.numel())
        return Place(key, columns, first, 1, columns, columns)
    # The dimensions over rows: an inner one may be cut, so that the shard is planes of neighbouring rows.
    inner = len(shape) - 2
    while inner > 0 and local[inner] == shape[inner]:
        inner -= 1
    if any(local[dim] != shape[dim] for dim in range(1, inner)):
        raise NotImplementedError(f"shard {tuple(local)} of {tuple(shape)}: is cut along too many dimensions")
    rows = max(1, local[inner:-1].numel())
    return Place(key, max(1, local[-1]), first, rows, shape[-1], steps[inner - 1] if inner else 0)
