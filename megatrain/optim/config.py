"""What every optimizer can be told; learning-rate schedules are in `schedule.py`."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from megatrain.config.schema import Problem, at_least, between, config


@config
class OptimizerConfig:
    """What every optimizer has."""

    splits_hidden_matrices: ClassVar[bool] = False
    """True if the optimizer has a rule of its own for the matrices between embedding and head."""

    kind: str = ""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Applied to matrices; vectors (norms, biases) are not decayed."""
    decay_embeddings: bool = True
    """Also decay the embedding."""
    clip_norm: float | None = 1.0
    """The global gradient norm is clipped to this; null: not at all."""

    def lr_ratio(self, *, hidden_matrix: bool) -> float:
        """Return a parameter's learning rate as a share of `lr`."""
        return 1.0

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 0, "lr", "weight_decay", "clip_norm")


@config
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        yield from at_least(self, 0, "eps")
        yield from between(self, 0, 1, "beta1", "beta2")


@config
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; momentum 0 is plain gradient descent."""

    kind: Literal["sgd"] = "sgd"
    lr: float = 0.1
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Applied to matrices; vectors (norms, biases) are not decayed."""
    momentum: float = 0.9
    """Decay of the momentum buffer."""
    nesterov: bool = False
    """Use Nesterov's momentum."""

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        yield from between(self, 0, 1, "momentum")
        if self.nesterov and self.momentum == 0:
            yield Problem("nesterov", True, "Nesterov's step needs momentum above 0")


@config
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on matrices; AdamW on embeddings, head, vectors."""

    splits_hidden_matrices: ClassVar[bool] = True

    kind: Literal["muon"] = "muon"
    lr: float = 1e-3
    """Peak learning rate of Muon's matrices."""
    momentum: float = 0.95
    """Decay of Muon's momentum buffer."""
    nesterov: bool = True
    """Use Nesterov's momentum in Muon."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of an orthogonal update of (out, in). match_rms_adamw: 0.2·sqrt(max(out, in)), which has the size of AdamW's
    updates and suits its rates (Moonlight, arXiv 2502.16982); original: sqrt(max(1, out/in)), for rates near 0.02."""
    adamw_lr_ratio: float = 1.0
    """Learning rate of the parameters that AdamW updates, as a share of `lr`."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""

    def lr_ratio(self, *, hidden_matrix: bool) -> float:
        """Return a parameter's learning rate as a share of `lr`."""
        return 1.0 if hidden_matrix else self.adamw_lr_ratio

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        yield from at_least(self, 0, "adamw_lr_ratio", "eps")
        yield from at_least(self, 1, "ns_steps")
        yield from between(self, 0, 1, "momentum", "beta1", "beta2")


@config
class LionConfig(OptimizerConfig):
    """Lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675)."""

    kind: Literal["lion"] = "lion"
    lr: float = 1e-4
    """Peak learning rate; a third to a tenth of AdamW's (section 5 of the paper)."""
    weight_decay: float = 1.0
    """Applied to matrices; vectors (norms, biases) are not decayed. As much larger than AdamW's as `lr` is smaller."""
    beta1: float = 0.9
    """Weight of the momentum in the update."""
    beta2: float = 0.99
    """Decay of the momentum."""

    def problems(self) -> Iterator[Problem]:
        yield from OptimizerConfig.problems(self)
        yield from between(self, 0, 1, "beta1", "beta2")


OptimConfig = AdamWConfig | SGDConfig | MuonConfig | LionConfig
