"""Learning rates against closed formulas written out here."""

import math

import pytest

from megatrain.optim.schedule import ConstantConfig, CosineConfig, LinearConfig, WSDConfig


def test_warmup_is_linear_and_starts_above_zero() -> None:
    factors = [ConstantConfig(warmup_steps=4).factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_cosine_is_half_a_cosine_between_warmup_and_the_last_step() -> None:
    cfg = CosineConfig(warmup_steps=3, final_ratio=0.1)
    for step in range(3, 11):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 7)) / 2
        assert cfg.factor(step, 11) == pytest.approx(expected)
    assert cfg.factor(10, 11) == pytest.approx(0.1)


def test_linear_reaches_its_final_ratio_at_the_last_step() -> None:
    cfg = LinearConfig(warmup_steps=0, final_ratio=0.0)
    factors = [cfg.factor(step, 5) for step in range(5)]
    assert factors == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_wsd_is_flat_and_then_falls_over_its_last_share() -> None:
    cfg = WSDConfig(warmup_steps=2, decay_fraction=0.25, final_ratio=0.0)
    factors = [cfg.factor(step, 20) for step in range(20)]
    assert factors[2:15] == pytest.approx([1.0] * 13)
    assert factors[14:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize(("steps", "fraction"), [(2, 0.2), (30, 0.01), (1, 1.0), (7, 1e-9), (5, 1.0)])
def test_wsd_decays_over_one_step_at_least(steps: int, fraction: float) -> None:
    """Where the fraction of the steps rounds to none, too."""
    cfg = WSDConfig(warmup_steps=0, decay_fraction=fraction, final_ratio=0.25)
    factors = [cfg.factor(step, steps) for step in range(steps)]
    assert factors[0] == 1
    assert factors[-1] == (0.25 if steps > 1 else 1)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    "cfg", [CosineConfig(warmup_steps=0), LinearConfig(warmup_steps=1), WSDConfig(warmup_steps=1)]
)
def test_a_run_of_one_step_uses_a_positive_rate(
    cfg: CosineConfig | LinearConfig | WSDConfig,
) -> None:
    assert cfg.factor(0, 1) > 0


@pytest.mark.parametrize(("steps", "warmup"), [(50, 5), (400, 40), (5000, 100)])
def test_warmup_is_a_tenth_by_default_and_a_hundred_at_most(steps: int, warmup: int) -> None:
    factors = [CosineConfig().factor(step, steps) for step in range(warmup + 1)]
    assert factors == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)] + [1.0])
