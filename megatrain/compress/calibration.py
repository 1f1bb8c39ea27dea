"""What the layers of a model are given on calibration text, block by block: sums that the methods need of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatrain.data.loader import Batch
from megatrain.nn.attention import SequenceInfo
from megatrain.nn.block import Block, Body
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.nn.moe import Experts


class State(NamedTuple):
    """Hidden states between two blocks."""

    x: Tensor
    """`(batch, seq, hidden)`."""
    sequence: SequenceInfo


@dataclass
class Moments:
    """Sums over the inputs of a product, or over those of each expert of a stack."""

    gram: Tensor
    """`(in, in)` or `(experts, in, in)` float64: the sum of x xᵀ."""
    size: Tensor
    """`(in,)` or `(experts, in)` float64: the sum of |x|."""
    count: Tensor
    """`()` or `(experts,)`: the number of inputs."""

    @property
    def mean_size(self) -> Tensor:
        """Mean of |x|, `(..., in)`; 0 where there were no inputs."""
        return self.size / self.count.clamp(min=1).unsqueeze(-1)

    @property
    def norm(self) -> Tensor:
        """2-norm of each input over the calibration tokens, `(..., in)`."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    def add(self, x: Tensor, place: tuple[int, ...] = ()) -> None:
        """Add inputs `(tokens, in)`, of the expert at `place`."""
        x = x.detach()
        self.gram[place] += (x.mT @ x).double()
        self.size[place] += x.abs().sum(0).double()
        self.count[place] += len(x)


def no_moments(weight: Tensor) -> Moments:
    """Return the sums for a weight `(out, in)` or `(experts, out, in)` before there are any inputs."""
    stack, size = weight.shape[:-2], weight.shape[-1]
    zeros = partial(weight.new_zeros, dtype=torch.float64)
    return Moments(zeros((*stack, size, size)), zeros((*stack, size)), zeros(stack))


@torch.no_grad()
def walk(model: Decoder, batches: Sequence[Batch]) -> Iterator[tuple[int, Block, dict[str, Moments]]]:
    """Yield each block in order with the sums of its products' inputs by canonical parameter name.

    The caller may change the weights of the block: the blocks after it are given what the changed one returns.
    """
    states = list(_entering(model, batches))
    for layer, block in model.blocks():
        yield layer, block, _moments(block, states, f"layers.{layer}.")
        states = [State(block(*state), state.sequence) for state in states]


def _entering(model: Decoder, batches: Sequence[Batch]) -> Iterator[State]:
    """Yield what enters the first block: the blocks' seam records it, and no block computes."""
    blocks = [block for _, block in model.blocks()]
    before = [block.run for block in blocks]
    found: list[State] = []

    def record(is_first: bool, body: Body, x: Tensor, sequence: SequenceInfo) -> Tensor:
        if is_first:
            found.append(State(x, sequence))
        return x

    try:
        for block in blocks:
            replace_seam(block, "run", partial(record, block is blocks[0]))
        for batch in batches:
            first = torch.zeros(1, dtype=torch.int64, device=batch.tokens.device)
            model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids, keep=first)
            yield found.pop()
    finally:
        for block, run in zip(blocks, before, strict=True):
            replace_seam(block, "run", run)


def _moments(block: Block, states: Sequence[State], prefix: str) -> dict[str, Moments]:
    """Return the sums of the inputs of the products in `block`, whose seams record them."""
    found: dict[str, Moments] = {}
    restore: list[Callable[[], None]] = []
    for at, module in block.named_modules():
        if isinstance(module, Linear):
            sums = found.setdefault(f"{prefix}{at}.weight", no_moments(module.weight))
            restore.append(_record(module, partial(_linear_inputs, sums)))
        elif isinstance(module, Experts):
            named = dict(module.named_parameters())
            stacks = {id(each): no_moments(each) for each in named.values()}
            found |= {f"{prefix}{at}.{name}": stacks[id(each)] for name, each in named.items()}
            restore.append(_record(module, partial(_expert_inputs, stacks)))
    try:
        for state in states:
            block(*state)
    finally:
        for undo in restore:
            undo()
    return found


def _record(module: nn.Module, observe: Callable[..., None]) -> Callable[[], None]:
    """Let `observe` see the operands of a module's product; return what ends that."""
    product = module.product

    def observed(*operands: Tensor) -> Tensor:
        observe(*operands)
        out: Tensor = product(*operands)  # type: ignore[operator]
        return out

    replace_seam(module, "product", observed)
    return partial(replace_seam, module, "product", product)


def _linear_inputs(sums: Moments, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    sums.add(x.flatten(0, -2))


def _expert_inputs(stacks: dict[int, Moments], rows: Tensor, weights: Tensor, group_sizes: Tensor) -> None:
    """Add the rows of each expert to the sums of the stack that they are multiplied with."""
    sums, start = stacks[id(weights)], 0
    for expert, size in enumerate(group_sizes.tolist()):
        sums.add(rows[start : start + size], (expert,))
        start += size
