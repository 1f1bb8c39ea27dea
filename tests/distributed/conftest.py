"""Processes for checks of layouts, kept alive over all cases of a test worker."""

from collections.abc import Iterator

import pytest

from megatrain.runtime.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool("megatrain.train.parity") as pool:
        yield pool
