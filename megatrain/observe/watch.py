"""Detection of over-fitting: counters that are stored in the checkpoint, and a notice."""

from typing import Any

RISES = 3  # validations in a row with rising validation and falling training loss before it is said


RISEN = 1.01  # times the best: the last validation loss has left it, for validations read the same tokens every time


def over_fits(counters: dict[str, Any]) -> bool:
    """Return whether the validation loss has left its best behind while the training loss is well below it."""
    last, best, train = counters["eval_loss"], counters["best"], counters["train_loss"]
    return counters["rises"] >= RISES or (last > RISEN * best and train < best)


def update(
    counters: dict[str, Any], *, step: int, train_loss: float, eval_loss: float
) -> tuple[dict[str, Any], str | None]:
    """Return the counters after one more validation, and a notice when over-fitting shows.

    Counters: best, best_step; without_best: validations since the best; rises: validations in a row in which the
    validation loss rose while the training loss fell; eval_loss, train_loss: the last ones.
    """
    best = counters.get("best", float("inf"))
    is_best = eval_loss < best
    diverges = bool(counters) and eval_loss > counters["eval_loss"] and train_loss < counters["train_loss"]
    rises = counters.get("rises", 0) + 1 if diverges else 0
    new = {
        "best": eval_loss if is_best else best,
        "best_step": step if is_best else counters.get("best_step", step),
        "without_best": 0 if is_best else counters.get("without_best", 0) + 1,
        "rises": rises,
        "eval_loss": eval_loss,
        "train_loss": train_loss,
    }
    if rises != RISES:
        return new, None
    notice = (
        f"step {step}: over-fitting: the validation loss rose {RISES} times in a row while the training loss fell "
        f"(best {new['best']:.4f} at step {new['best_step']}). More data, a smaller model or an earlier stop helps "
        "(train.early_stop_patience)."
    )
    return new, notice
