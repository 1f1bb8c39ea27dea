"""Optimizer configs; learning-rate schedules are in `schedule.py`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from megatrain.config.ranges import DecayRate, Positive, Range
from megatrain.config.schema import Problem, config

Rate = Annotated[float, Range(at_least=0, at_most=1e6)]


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


@config
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; momentum 0 is plain gradient descent."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.1
    """Peak learning rate."""
    weight_decay: Rate = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    momentum: DecayRate = 0.9
    """Decay rate of the momentum buffer; 0: no momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    def problems(self) -> Iterator[Problem]:
        if self.nesterov and self.momentum == 0:
            yield Problem("nesterov", True, "Nesterov momentum needs momentum above 0")


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
