"""Runs that the tests of compression share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from numerics.test_export import make_run

from megatrain.models.config import ModelConfig


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Path]:
    """A function that returns a run of a model with random weights, the same run for the same model."""

    @cache
    def made(model: ModelConfig) -> Path:
        return make_run(tmp_path_factory.mktemp("made") / "run", model)

    return made
