"""What a run says at its end about what it reached."""

import pytest

from megatrain.observe.watch import update
from megatrain.train.words import Outcome, reached


def outcome(*losses: tuple[float, float], bits_per_nat: float | None = 0.5) -> Outcome:
    """An outcome of validations at steps 10, 20, ... with (training, validation) losses."""
    watch: dict[str, object] = {}
    for number, (train, held_out) in enumerate(losses):
        watch, _ = update(watch, step=10 * (number + 1), train_loss=train, eval_loss=held_out)
    return Outcome(
        exit_code=0,
        reason="done",
        step=10 * len(losses),
        first_step=0,
        watch=watch,
        bits_per_nat=bits_per_nat,
    )


def test_the_best_validation_is_named_with_its_step() -> None:
    assert reached(outcome((3, 3), (2.5, 2.6))) == [
        "Validation loss 2.6000 (1.3000 bits per byte), its best, at the last validation (step 20)."
    ]
    assert reached(outcome((3, 2.6), (2.7, 2.61), bits_per_nat=None)) == [
        "Validation loss 2.6100 at the last validation; the best was 2.6000, at step 10."
    ]
    assert reached(outcome()) == []


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        (((3, 3), (2.5, 3.1), (2.0, 3.2), (1.5, 3.3)), "over-fits"),  # three rises in a row
        (((3, 3), (1.8, 4.3)), "over-fits"),  # too few validations for a notice, but plain to see
        (((3, 3), (1.8, 2.9)), "by heart"),
        (((3, 3), (3.1, 3.2)), None),  # both have risen: no over-fitting
        (((3, 3), (2.9, 3.01)), None),
    ],
)
def test_over_fitting_is_said(losses: tuple[tuple[float, float], ...], word: str | None) -> None:
    said = " ".join(reached(outcome(*losses))[1:])
    assert (word in said) if word else said == ""
