"""What tests of clusters share: hosts in network namespaces, SLURM on them, and the run that nothing disturbs."""

from pathlib import Path

import pytest
from real_hosts import hosts, slurm
from site_of_runs import TWO, Site
from workplace import Workplace

__all__ = ["hosts", "slurm", "unbroken", "workplace"]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    text = tmp_path / "my.txt"
    text.write_text("".join(f"Line {n}: the square of {n} is {n * n}.\n" for n in range(400)))
    return Workplace(tmp_path, text)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The curve of the run that nothing disturbs, on this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("unbroken")
    text = folder / "my.txt"
    text.write_text("".join(f"Line {n}: the square of {n} is {n * n}.\n" for n in range(400)))
    workplace = Workplace(folder, text)
    workplace.run(workplace.tiny("run.name=whole", *TWO))
    return Site(workplace).curve("whole")
