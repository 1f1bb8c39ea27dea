"""Where config files are found."""

import re
from pathlib import Path
from typing import get_args

import pytest

from megatrain.cli import conf
from megatrain.config.errors import UserError
from megatrain.config.load import kind_of
from megatrain.optim.schedule import ScheduleConfig

ROOT = Path(__file__).parents[3]


def test_a_checkout_uses_its_own_conf() -> None:
    assert conf.shipped_dir() == ROOT / "conf"


def test_an_installation_uses_its_shared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "share" / "megatrain" / "conf"
    shared.mkdir(parents=True)
    (shared / "config.yaml").write_text("")
    monkeypatch.setattr(conf, "REPOSITORY", tmp_path / "site-packages")
    monkeypatch.setattr(conf.sysconfig, "get_path", lambda name: str(tmp_path))
    assert conf.shipped_dir() == shared


def test_an_installation_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conf, "REPOSITORY", tmp_path / "site-packages")
    monkeypatch.setattr(conf.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(conf.site, "getuserbase", lambda: str(tmp_path))
    with pytest.raises(UserError, match="lacks its config files"):
        conf.shipped_dir()


def test_the_wheel_ships_the_directory_that_is_looked_up() -> None:
    assert re.search(
        r'^"conf" = "share/megatrain/conf"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )


def test_groups_are_the_directories_and_options_the_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    found = conf.group_options(str(tmp_path))
    expected = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")} | {"mine"}
    assert set(found["model"]) == expected
    assert found["schedule"] == sorted(kind_of(cls) for cls in get_args(ScheduleConfig))
