"""A dozen faults, one of each kind; `python -m tests.faults --count 300` disturbs more."""

from pathlib import Path

import pytest
from faults.campaign import campaign
from faults.kinds import KINDS

SEED = 7


@pytest.mark.slow  # minutes
@pytest.mark.timeout(600)
def test_one_of_each_kind(tmp_path: Path) -> None:
    found = list(campaign(tmp_path, seed=SEED, count=len(KINDS)))
    assert len(found) == len(KINDS)
    assert [each for each in found if each.wrong] == []
