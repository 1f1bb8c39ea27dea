"""The workplace that these tests share."""

from pathlib import Path

import pytest
from workplace import Workplace


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    text = tmp_path / "my.txt"
    text.write_text("".join(f"Line {n}: the square of {n} is {n * n}.\n" for n in range(400)))
    return Workplace(tmp_path, text)
