"""`megatrain train`."""

from megatrain.cli.job import run_job
from megatrain.train.config import Config


def run(argv: list[str]) -> int:
    """Compose and check the config, then train; returns the exit code."""
    return run_job("train", argv, _train)


def _train(cfg: Config) -> int:
    from megatrain.train.main import run as train  # imports torch: not before the config is known to be right

    return train(cfg)
