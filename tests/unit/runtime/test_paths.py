"""Homes and names of users who have none."""

import getpass
import os
import pwd
from pathlib import Path

import pytest

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.runtime.paths import cache_dir, name_user


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know, without any variable that names it."""

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "MEGATRAIN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "")  # so that it is removed afterwards


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_name_gets_one() -> None:
    name_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"


@pytest.mark.usefixtures("nobody")
def test_without_a_home_the_variable_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="MEGATRAIN_CACHE"):
        cache_dir()
    with pytest.raises(UserError, match="HOME is not set"):
        expanded("~/x")
    monkeypatch.setenv("MEGATRAIN_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


def test_home_and_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert (expanded("~"), expanded("~/x"), expanded("a/~"), expanded("./~x")) == (
        *("/home/me", "/home/me/x", "a/~", "./~x"),
    )
    with pytest.raises(UserError, match="no such user"):
        expanded("~nobody-of-this-name/x")
