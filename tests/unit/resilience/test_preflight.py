"""Machines that differ are named, and what that means; a slow network is found among others."""

from dataclasses import replace

import pytest

from megatrain.config.errors import UserError
from megatrain.resilience.bandwidth import Speed, judge
from megatrain.resilience.config import ResilienceConfig
from megatrain.resilience.machine_facts import MachineFacts, hash_of_code
from megatrain.resilience.preflight import check_machines, heed

ALIKE = [
    MachineFacts(
        rank=rank,
        host=f"h{rank // 2}",
        code="c0de",
        versions={"torch": "2.13.0"},
        settings={},
        routes={"GLOO_SOCKET_IFNAME": "eth0"},
        device="H100",
        free_gib={"memory": 60.0, "the data cache": 90.0},
        time=1e9 + rank / 100,
    )
    for rank in range(8)
]


def with_odd(**change: object) -> list[MachineFacts]:
    """The eight processes, of which the two of h2 have something else."""
    return [replace(facts, **change) if facts.host == "h2" else facts for facts in ALIKE]  # type: ignore[arg-type]


def test_machines_that_are_alike_have_no_problem() -> None:
    assert check_machines(ALIKE) == []


@pytest.mark.parametrize(
    ("change", "words", "is_fatal"),
    [
        (
            {"code": "bad"},
            "the code of megatrain (hash): bad on h2 (ranks 4, 5), where h0 (rank 0) has c0de",
            True,
        ),
        ({"versions": {"torch": "2.12.0"}}, "the version of torch: 2.12.0 on h2", True),
        ({"versions": {}}, "the version of torch: none on h2", True),
        ({"settings": {"NVIDIA_TF32_OVERRIDE": "0"}}, "variable NVIDIA_TF32_OVERRIDE: 0 on h2", True),
        ({"routes": {"GLOO_SOCKET_IFNAME": "eth1"}}, "variable GLOO_SOCKET_IFNAME: eth1 on h2", False),
        ({"device": "A100"}, "the device (name): A100 on h2", False),
        ({"unhealthy": ("throttled by heat (Active)",)}, "H100 of rank 4 on h2: throttled by heat", True),
        ({"free_gib": {"memory": 0.1}}, "Only 0.10 GiB of memory are available on h2", False),
        ({"time": 1e9 - 60}, "The clock of h2 is 60 s behind", False),
    ],
)
def test_the_machine_that_differs_is_named(change: dict[str, object], words: str, is_fatal: bool) -> None:
    problems = check_machines(with_odd(**change))
    assert any(words in problem.text for problem in problems), problems
    assert all(problem.is_fatal == is_fatal for problem in problems)
    if is_fatal:
        with pytest.raises(UserError, match="Make the machines alike"):
            heed(problems, ResilienceConfig())
    told = heed(problems, ResilienceConfig(preflight="warn"))
    assert any(words in text for text in told)


def links(hosts: int, slow: set[tuple[int, int]]) -> list[Speed]:
    pairs = [(a, (a + shift) % hosts) for shift in (1, 2) for a in range(hosts)]
    return [
        Speed("link", (a, b), (f"h{a}", f"h{b}"), 1.0 if (a, b) in slow else 10.0 + a / 10) for a, b in pairs
    ]


def test_a_machine_all_of_whose_links_are_slow_is_named() -> None:
    slow = {(a, b) for a in range(5) for b in range(5) if 3 in (a, b)}
    (problem,) = judge(links(5, slow), 0.3)
    assert problem.text.startswith("The network of h3 is slow: 1 GB/s, where links have 10 GB/s")
    assert problem.is_fatal


def test_a_slow_link_is_not_laid_to_a_machine() -> None:
    (problem,) = judge(links(5, {(1, 2)}), 0.3)
    assert problem.text.startswith("The link from h1 to h2 is slow: 1 GB/s")
    assert judge(links(5, set()), 0.3) == []


def test_a_slow_group_of_an_axis_is_named() -> None:
    groups = [Speed("tp", (n, n + 1), (f"h{n}",), 2.0 if n == 4 else 50.0) for n in (0, 2, 4, 6)]
    (problem,) = judge(groups, 0.3)
    assert problem.text == "The tp group of ranks 4, 5 (h4) is slow: 2 GB/s, median 50 GB/s."
    assert judge(groups[:2] + groups[2:3], 0.0) == []


def test_the_hash_of_the_code_is_that_of_its_files() -> None:
    assert hash_of_code() == hash_of_code()
    assert len(hash_of_code()) == 16
