"""Faults of hosts and links, on network namespaces: what remains, what is said, and that the next start works.

They take a minute each; benchmarks/results/faults_network.json has the figures of a run of all of them.
"""

import pytest

from benchmarks import faults_network as faults
from benchmarks.hosts import can_make_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="takes root and network namespaces"),
    pytest.mark.timeout(400),
]
LATE_S = 15.0
"""How long after the limit everything has ended: beats, what ranks tell, five seconds for who is killed."""


@pytest.mark.parametrize("launcher", ["variables", "torchrun"])
def test_a_cut_link_ends_every_process(launcher: str) -> None:
    found = faults.link_cut(launcher)
    assert found.outcome == "ends"
    assert found.seconds_until_all_ended is not None
    assert found.seconds_until_all_ended < faults.LIMIT_S + LATE_S + (30 if launcher == "torchrun" else 0)
    assert found.status == "failed"
    assert found.reason.startswith("StalledError: Rank 1 (host h2) has given no sign since")
    assert found.seconds_until_trains_again is not None


def test_a_killed_host_is_named_in_one_sentence() -> None:
    found = faults.host_killed("variables")
    assert found.status == "failed"
    assert "Rank 1 (host h2)" in found.reason
    assert found.lines < 20


def test_a_short_cut_is_survived() -> None:
    assert faults.link_blinks("variables").outcome == "trains on"


def test_a_host_with_a_slow_link_is_refused() -> None:
    found = faults.link_slow("variables")
    assert found.outcome == "refused before the first step"
    assert "The network of h3 is slow" in found.said


def test_who_is_missing_is_said() -> None:
    late = faults.late_host("variables")
    assert late.outcome == "trains"
    assert "1 of 2 processes have not come (ranks 1; here: h1)" in late.said
    never = faults.missing_host("variables")
    assert never.seconds_until_all_ended is not None
    assert never.seconds_until_all_ended < 60 + 2 * LATE_S


def test_a_clock_that_is_off_is_told() -> None:
    assert "The clock of h2 is 60 s behind" in faults.clock_off("variables").said
