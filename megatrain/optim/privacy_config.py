"""Config of differentially private training."""

from collections.abc import Iterator
from typing import Annotated

from megatrain.config.ranges import NonNegative, Positive, Range
from megatrain.config.schema import Problem, config
from megatrain.parallel.config import ParallelConfig


@config
class PrivacyConfig:
    """DP-SGD (Abadi et al., arXiv 1607.00133): the gradient of each sample is clipped, and noise is added to their sum.
    The noise is drawn from a secret key (MEGATRAIN_KEY, MEGATRAIN_KEY_FILE), without which nobody can subtract it."""

    noise_multiplier: NonNegative = 0.0
    """Standard deviation of the noise in units of `max_grad_norm`; 0: training is not private."""
    max_grad_norm: Positive = 1.0
    """Norm, over the whole model, to which the gradient of each sample is clipped. A sample's loss is the mean over its
    own tokens."""
    delta: Annotated[float, Range(above=0, below=1)] = 1e-5
    """The delta of (epsilon, delta)-differential privacy; well below 1 / number of samples."""

    @property
    def is_on(self) -> bool:
        """Whether training is private."""
        return self.noise_multiplier > 0


def privacy_problems(
    cfg: PrivacyConfig, parallel: ParallelConfig, *, engine: str, precision: str, has_experts: bool
) -> Iterator[Problem]:
    """Yield what private training does not support: it needs the gradient of each sample whole, on one rank."""
    if not cfg.is_on:
        return
    key, value = "privacy.noise_multiplier", cfg.noise_multiplier
    split = [axis for axis in ("pp", "tp", "cp", "ep") if getattr(parallel, axis) > 1]
    if split:
        rule = "needs the gradient of each sample on one rank; data parallelism alone is supported, not "
        yield Problem(key, value, rule + ", ".join(f"parallel.{axis}" for axis in split), (0.0,))
    if parallel.dp_shard != 1 and parallel.zero_stage > 0:
        rule = "must be 0 with privacy.noise_multiplier: each rank needs the gradient of each of its samples whole"
        yield Problem("parallel.zero_stage", parallel.zero_stage, rule, (0,))
    if engine != "native":
        yield Problem("engine", engine, "does not train privately (privacy.noise_multiplier)", ("native",))
    if precision == "fp8":
        yield Problem(
            "train.precision", precision, "does not train privately (privacy.noise_multiplier)", ("bf16",)
        )
    if has_experts:
        yield Problem(
            key, value, "is not supported with experts, whose load depends on all samples together", (0.0,)
        )
