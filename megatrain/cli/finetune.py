"""`megatrain finetune`: training on examples, from the weights of a run or of a Hugging Face directory."""

from functools import partial

from megatrain.cli.job import run_in_layout
from megatrain.cli.train import train
from megatrain.resilience.signals import StopSignals


def run(argv: list[str]) -> int:
    """Compose and check the config, fine-tune, and show the result; return the exit code."""
    with StopSignals() as signals:
        return run_in_layout("finetune", argv, argv, partial(train, "finetune", argv, signals))
