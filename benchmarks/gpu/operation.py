"""What the benchmark has to know of an operation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.peers import Options, Peer, Tensors
from megatrain_kernels.kernel import Case, Cost

BOTH = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Operation:
    """One operation of `megatrain_kernels`. Its functions take the tensors of `make_inputs`, then the options."""

    name: str
    timed: Callable[..., Any]
    """`timed(*tensors, backend=..., **options)`."""
    cases: Sequence[Case]
    """Timed on a GPU."""
    small: Sequence[Case]
    """Checked everywhere, and timed where there is no GPU. No size is a multiple of a block."""
    make_inputs: Callable[..., tuple[Tensors, Options]]
    """`make_inputs(case, dtype=..., device=...)`."""
    cost: Callable[..., Cost]
    gradients: tuple[int, ...] = ()
    """Places of the tensors that have a gradient, where they are given."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    checked: Callable[..., Any] | None = None
    """What is compared with the reference, if not what is timed."""
    reference: Callable[..., Any] | None = None
    """`reference(*tensors, **options)` in float64; None: `timed` with backend="reference"."""
    dtypes: tuple[torch.dtype, ...] = BOTH
    """Types in which it is checked."""
    timed_dtype: torch.dtype = torch.bfloat16
    backends: tuple[str, ...] = ("triton",)
    """Timed on a GPU: "auto" as well where it is not always Triton there."""
    ceiling: str = "bf16"
    """Kind of products whose measured rate bounds it."""
    slack: float = 1.0
    """Factor on the tolerance, where errors grow inside by nature."""

    def places(self, given: Tensors) -> tuple[int, ...]:
        """Those of `gradients` that a case has: some tensors are optional."""
        return tuple(place for place in self.gradients if place < len(given))


def sized(name: str, names: str, sizes: str, **options: Any) -> Case:
    """A case of these sizes; both strings are divided by spaces."""
    return Case(name, dict(zip(names.split(), map(int, sizes.split()), strict=True)), options)
