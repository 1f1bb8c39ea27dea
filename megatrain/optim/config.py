"""Optimizer configs; learning-rate schedules are in `schedule.py`."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from megatrain.config.ranges import DecayRate, Positive, Range
from megatrain.config.schema import Problem, config, divisors
from megatrain.nn.contract import Plan, Role
from megatrain.parallel.config import ParallelConfig

Rate = Annotated[float, Range(at_least=0, at_most=1e6)]
StateFormat = Literal["full", "bf16", "int8"]
"""How the states of one parameter are stored; full: in its own type."""
STATE_BLOCK = 128
"""Elements of a row whose 8-bit states share a scale."""
LEAST_ELEMENTS = 4096
"""Elements from which on a matrix has 8-bit states (`min_8bit_size` of bitsandbytes, the published implementation)."""


@config
class OptimizerConfig:
    """Options common to all optimizers."""

    splits_hidden_matrices: ClassVar[bool] = False
    """Whether the optimizer has a separate update rule for the matrices between embedding and head."""

    kind: str = ""
    lr: Rate = 1e-3
    """Peak learning rate."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    decay_embeddings: bool = True
    """Apply weight decay to the embeddings as well."""
    clip_norm: Positive | None = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it. null: no clipping."""
    states: Literal["fp32", "bf16", "int8"] = "fp32"
    """Type of the optimizer's states. fp32: that of the master weights, so float64 under train.precision=fp64; bf16:
    half of its memory; int8: codes of 8 bits in blocks (Dettmers et al., arXiv 2110.02861), about a quarter. int8 keeps
    fp32 for vectors, embeddings, and matrices of fewer than 4096 elements or with rows of fewer than 128."""
    stochastic_rounding: bool = False
    """Round states to bf16 up or down at random, so that small changes add up; needs `states=bf16`. Every layout draws
    the same."""

    def problems(self) -> Iterator[Problem]:
        if self.stochastic_rounding and self.states != "bf16":
            yield Problem("stochastic_rounding", True, "needs optim.states=bf16", (False,))

    def n_moments(self, *, hidden_matrix: bool) -> int:
        """Return how many states of its own size a parameter has."""
        return 1

    def state_format(self, shape: Sequence[int], role: Role) -> StateFormat:
        """Return how the states of a parameter of `shape`, in the full model, are stored."""
        if self.states != "int8":
            return "full" if self.states == "fp32" else self.states
        is_large = len(shape) > 1 and math.prod(shape) >= LEAST_ELEMENTS and shape[-1] >= STATE_BLOCK
        return "int8" if is_large and not role & Role.EMBEDDING else "full"

    def state_bytes(self, shape: Sequence[int], role: Role, *, width: int) -> int:
        """Return the bytes of a parameter's states, whose master weights take `width` bytes an element.

        Not counted is a number of 4 bytes, which AdamW and stochastic rounding keep for each parameter.
        """
        size, form = math.prod(shape), self.state_format(shape, role)
        scales = size // max(1, shape[-1]) * -(-shape[-1] // STATE_BLOCK)
        each = {"full": width * size, "bf16": 2 * size, "int8": size + width * scales}[form]
        return each * self.n_moments(hidden_matrix=is_hidden_matrix(role, len(shape)))

    def lr_ratio(self, *, hidden_matrix: bool) -> float:
        """Return a parameter's learning rate as a fraction of `lr`."""
        return 1.0


@config
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    beta1: DecayRate = 0.9
    """Decay rate of the first moment."""
    beta2: DecayRate = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Epsilon added to the square root of the second moment."""

    def n_moments(self, *, hidden_matrix: bool) -> int:
        """Return 2: the averages of gradients and of their squares."""
        return 2


@config
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; momentum 0 is plain gradient descent."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.1
    """Peak learning rate."""
    weight_decay: Rate = 0.0
    """Weight decay of matrices, added to their gradients; vectors (norms, biases) are not decayed."""
    momentum: DecayRate = 0.9
    """Decay rate of the momentum buffer; 0: no momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        if self.nesterov and self.momentum == 0:
            yield Problem("nesterov", True, "Nesterov momentum needs momentum above 0")
        if self.states != "fp32" and self.momentum == 0:
            yield Problem("states", self.states, "gradient descent without momentum has no states", ("fp32",))

    def n_moments(self, *, hidden_matrix: bool) -> int:
        """Return 1 with momentum, else 0."""
        return int(self.momentum > 0)


@config
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for the other parameters."""

    splits_hidden_matrices: ClassVar[bool] = True

    kind: Literal["muon"] = "muon"
    lr: Rate = 1e-3
    """Peak learning rate of the matrices updated by Muon."""
    momentum: DecayRate = 0.95
    """Decay rate of Muon's momentum buffer."""
    nesterov: bool = True
    """Use Nesterov momentum in Muon."""
    ns_steps: Annotated[int, Range(at_least=1, at_most=100)] = 5
    """Number of Newton-Schulz iterations that orthogonalize an update."""
    scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the orthogonalized update of an (out, in) matrix. match_rms_adamw: 0.2·sqrt(max(out, in)), to match the
    RMS of AdamW's updates and use its learning rates (Moonlight, arXiv 2502.16982); original: sqrt(max(1, out/in)),
    for learning rates near 0.02."""
    adamw_lr_ratio: Rate = 1.0
    """Learning rate of the parameters updated by AdamW, as a fraction of `lr`."""
    beta1: DecayRate = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: DecayRate = 0.95
    """Decay rate of AdamW's second moment."""
    eps: Positive = 1e-8
    """Epsilon added to the square root of AdamW's second moment."""

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        if self.states != "fp32":
            rule = "is not supported by optim=muon, whose momentum, and AdamW's states beside it, have full precision"
            yield Problem("states", self.states, rule, ("fp32",))

    def n_moments(self, *, hidden_matrix: bool) -> int:
        """Return 1 for Muon's matrices, AdamW's 2 for the rest."""
        return 1 if hidden_matrix else 2

    def lr_ratio(self, *, hidden_matrix: bool) -> float:
        """Return a parameter's learning rate as a fraction of `lr`."""
        return 1.0 if hidden_matrix else self.adamw_lr_ratio


@config
class LionConfig(OptimizerConfig):
    """Lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675)."""

    kind: Literal["lion"] = "lion"
    lr: Rate = 1e-4
    """Peak learning rate; use a third to a tenth of AdamW's (section 5 of the paper)."""
    weight_decay: Rate = 1.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed. Raise it over AdamW's by the
    factor by which `lr` is lowered."""
    beta1: DecayRate = 0.9
    """Weight of the momentum in the interpolation of the update."""
    beta2: DecayRate = 0.99
    """Decay rate of the momentum."""


OptimConfig = AdamWConfig | SGDConfig | MuonConfig | LionConfig


def is_hidden_matrix(role: Role, ndim: int) -> bool:
    """Tell whether this is a matrix between embedding and head, or a stack `(experts, out, in)` of them."""
    return ndim >= 2 and not role & (Role.EMBEDDING | Role.HEAD)


def state_problems(optim: OptimizerConfig, parallel: ParallelConfig, plan: Plan) -> Iterator[Problem]:
    """Yield a problem if tensor parallelism would cut a block of 8-bit states."""
    if parallel.tp == 1:
        return
    cut: dict[str, int] = {}
    for at, weight in plan.weights.items():
        is_cut = weight.role & Role.ROW and not (weight.role & Role.EXPERT and parallel.ep > 1)
        if is_cut and optim.state_format(weight.shape, weight.role) == "int8":
            cut[at.rpartition("layers.")[2].partition(".")[2]] = weight.shape[-1]
    broken = [f"{name} ({size})" for name, size in cut.items() if size % (STATE_BLOCK * parallel.tp)]
    if broken:
        rule = (
            f"must divide the inputs of {', '.join(broken)} into multiples of {STATE_BLOCK}, the blocks of "
            "optim.states=int8"
        )
        common = math.gcd(*cut.values()) // STATE_BLOCK
        legal = tuple(n for n in divisors(common) if n <= parallel.tp)[-2:]
        yield Problem("parallel.tp", parallel.tp, rule, legal or (1,))
