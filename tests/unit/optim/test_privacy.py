"""Noise is normal, secret and repeatable; epsilons are those of opacus and of the Gaussian mechanism."""

import math

import pytest
import torch
from opacus.accountants import RDPAccountant
from scipy import stats

from megatrain.config.load import rule_problems
from megatrain.optim.privacy import ORDERS, Accountant, Noise, exposures
from megatrain.optim.privacy_config import PrivacyConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.config import Config

NOISE = Noise(bytes(range(32)), "run", 3)
SHAPE = torch.Size([40_000])


def test_the_noise_is_normal_and_independent_of_itself_elsewhere() -> None:
    drawn = NOISE.normal(torch.Size([400, 300]), step=5, name="w").flatten()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    for other in (
        NOISE.normal(SHAPE, step=6, name="w"),
        NOISE.normal(SHAPE, step=5, name="v"),
        Noise(NOISE.secret, "other", 3).normal(SHAPE, step=5, name="w"),
        Noise(bytes(32), "run", 3).normal(SHAPE, step=5, name="w"),
        Noise(NOISE.secret, "run", 4).normal(SHAPE, step=5, name="w"),
        drawn[1 : 1 + len(drawn[: SHAPE.numel()])],
    ):
        assert abs(torch.corrcoef(torch.stack([drawn[: SHAPE.numel()], other]))[0, 1]) < 0.02
    assert torch.equal(NOISE.normal(torch.Size([400, 300]), step=5, name="w").flatten(), drawn)
    assert NOISE.secret.hex() not in repr(NOISE)
    assert str(NOISE.secret) not in repr(NOISE)


def test_long_tensors_are_drawn_in_pieces_that_go_on() -> None:
    whole = NOISE.normal(torch.Size([(1 << 18) + 10]), step=0, name="w")
    assert whole[-10:].std() > 0.1
    assert torch.equal(NOISE.normal(torch.Size([100]), step=0, name="w"), whole[:100])


@pytest.mark.parametrize(("noise", "steps"), [(0.8, 50), (1.1, 1000), (4.0, 300)])
def test_the_usual_epsilon_is_that_of_opacus(noise: float, steps: int) -> None:
    cfg = PrivacyConfig(noise_multiplier=noise, delta=1e-5)
    found = Accountant(cfg, samples=2000, batch=20).after(steps)
    opacus = RDPAccountant()
    opacus.history = [(noise, 0.01, steps)]
    assert found["privacy/epsilon_poisson"] == pytest.approx(
        opacus.get_epsilon(1e-5, alphas=ORDERS), rel=1e-12
    )
    assert found["privacy/epsilon_poisson"] < found["privacy/epsilon"]


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Exact delta of the Gaussian mechanism with sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    phi = stats.norm.cdf
    below = phi(1 / (2 * sigma) - epsilon * sigma)
    return float(below - math.exp(epsilon) * phi(-1 / (2 * sigma) - epsilon * sigma))


def test_the_proven_epsilon_holds_for_the_exact_mechanism_and_is_not_far_from_it() -> None:
    """A sample that is seen in three epochs is hidden by noise of sigma / sqrt(3)."""
    epsilon = Accountant(PrivacyConfig(noise_multiplier=5.0), samples=100, batch=10).after(30)[
        "privacy/epsilon"
    ]
    sigma = 5.0 / math.sqrt(3)
    assert gaussian_delta(epsilon, sigma) <= 1e-5
    assert gaussian_delta(0.85 * epsilon, sigma) > 1e-5


def test_exposures_count_the_worst_sample() -> None:
    assert [exposures(steps, 100, 10) for steps in (1, 10, 11, 20, 21)] == [1, 1, 2, 2, 3]
    # 7 does not divide 20: samples 14..19 of one epoch and 0 of the next share a batch.
    assert exposures(2, 20, 7) == 1
    assert exposures(3, 20, 7) == 4  # twice in one batch weighs 2 squared
    assert exposures(6, 20, 7) == 5


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"parallel": ParallelConfig(tp=2)}, "privacy.noise_multiplier"),
        ({"parallel": ParallelConfig(pp=2)}, "privacy.noise_multiplier"),
        ({"parallel": ParallelConfig(dp_shard=2)}, "parallel.zero_stage"),
        ({"engine": "accelerate"}, "engine"),
    ],
)
def test_what_has_no_gradient_of_one_sample_is_refused(change: dict[str, object], key: str) -> None:
    private = PrivacyConfig(noise_multiplier=1.0)
    problems = [each.field for each in rule_problems(Config(privacy=private, **change))]  # type: ignore[arg-type]
    assert key in problems
    legal = Config(privacy=private, parallel=ParallelConfig(dp_replicate=2, dp_shard=2, zero_stage=0))
    assert not list(rule_problems(legal))
