"""Verdicts on steps: what is finite and ordinary is taken, the rest as the config says, and never without an end."""

import math

import pytest

from megatrain.resilience.config import ResilienceConfig
from megatrain.resilience.policy import FEWEST, WINDOW, FailurePolicy

NAN = math.nan


def actions(policy: FailurePolicy, *steps: tuple[float, float]) -> list[str]:
    return [policy.judge(loss, norm).action for loss, norm in steps]


@pytest.mark.parametrize("bad", [(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (1.0, math.inf)])
def test_what_is_not_finite_is_skipped_at_most_so_often_in_a_row(bad: tuple[float, float]) -> None:
    policy = FailurePolicy(ResilienceConfig(max_skips=2))
    good = (1.0, 1.0)
    assert actions(policy, good, bad, bad, good, bad, bad, bad) == [
        "take",
        "skip",
        "skip",
        "take",
        "skip",
        "skip",
        "stop",
    ]
    assert actions(FailurePolicy(ResilienceConfig(non_finite="stop")), bad) == ["stop"]
    assert actions(FailurePolicy(ResilienceConfig(max_skips=0)), bad) == ["stop"]


def ordinary(count: int) -> list[float]:
    """Losses that fall from 4 to 3, one in ten of them far off."""
    return [4 - n / count + (0.4 if n % 10 == 0 else 0.02 * (n % 3)) for n in range(count)]


def test_a_spike_is_what_exceeds_the_median_by_many_deviations() -> None:
    policy = FailurePolicy(ResilienceConfig(spike="rollback"))
    assert set(actions(policy, *((loss, 1.0) for loss in ordinary(200)))) == {"take"}
    assert actions(policy, (30.0, 1.0), (3.0, 1.0)) == ["roll back", "take"]
    assert actions(FailurePolicy(ResilienceConfig(), ordinary(200)), (30.0, 1.0)) == ["take"]


def test_few_losses_judge_nothing_and_equal_ones_not_too_much() -> None:
    cfg = ResilienceConfig(spike="rollback", spike_deviations=10)
    assert actions(FailurePolicy(cfg, [1.0] * (FEWEST - 1)), (1e9, 1.0)) == ["take"]
    equal = FailurePolicy(cfg, [1.0] * WINDOW)
    assert actions(equal, (1.1, 1.0), (1.1001, 1.0)) == ["take", "roll back"]  # ten times 1 % of the median


def test_losses_of_an_earlier_attempt_count_and_a_checkpoint_is_gone_back_to_once() -> None:
    policy = FailurePolicy(ResilienceConfig(spike="rollback"), ordinary(200))
    assert not policy.has_gone_back_to(40)
    policy.went_back(40, ordinary(40))
    assert policy.has_gone_back_to(40)
    assert actions(policy, (30.0, 1.0)) == ["roll back"]
