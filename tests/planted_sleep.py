"""A loader that falls asleep before the fourth batch, planted by being imported (TEST_PLANT of forked.py)."""

import time
from collections.abc import Iterator

from megatrain.data.loader import Loader, StepBatch

whole = Loader.batches


def sleeper(self: Loader, start_step: int) -> Iterator[StepBatch]:
    for number, batch in enumerate(whole(self, start_step), 1):
        if number == 4:
            time.sleep(1000)
        yield batch


Loader.batches = sleeper  # type: ignore[method-assign]
