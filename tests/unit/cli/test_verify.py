"""Mistakes in the flags and files of `megatrain verify`, which are refused before any process is started."""

from pathlib import Path

import pytest

from megatrain.cli.main import main

LINES = """\
# two that are right
parallel.tp=2 parallel.dp_shard=2   # and why
parallel.pp=2

parallel.tp=3
parallel.zero_stage=1
model.n_layers=3 parallel.pp=2
parallel.tq=2
tp=2
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["verify", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fault", "dropped"], "must be all or one of dropped_gradient_sum, "),
        (["--fault"], "expected one argument"),
        (
            ["--fault", "unscaled_expert", "parallel.tp=2"],
            "can reach none of the layouts, since it needs ep > 1",
        ),
        (
            ["--fault", "wrong_stage_order", "parallel.pp=2", "--layouts", "mine"],
            "at least four stages",
        ),
        (
            ["--layouts", "nope"],
            "must be one of all, axes, mine, or a file of layouts; there is no such file",
        ),
        (["--layouts", "mine"], "set a degree"),
        (["--layouts", "."], "can't be read"),
        (["--processes", "1"], "must be an integer of at least 2"),
        (["--processes", "two"], "must be an integer of at least 2"),
        (["--json", "nowhere/result.json"], "there is no directory nowhere"),
        (["--json", "."], "is a directory"),
        (["-m", "train.seed=0,1", "--fault", "all"], "--multirun"),
        (["parallel.tp=3"], "Nearest legal"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)


def test_wrong_lines_are_all_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "layouts.txt"
    file.write_text(LINES)
    said = refused(capsys, "--layouts", str(file))
    for expected in (
        "line 5: parallel.tp=3\n    parallel.tp=3: must divide",
        "line 6: parallel.zero_stage=1\n    is one process",
        "line 7: model.n_layers=3 parallel.pp=2\n    model.n_layers=3: a layout has keys of parallel only",
        "line 8: parallel.tq=2\n    parallel.tq=2: ",
        "line 9: tp=2\n    tp=2: a layout has keys of parallel only",
    ):
        assert expected in said
    assert "line 2" not in said
    assert "line 3" not in said


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "has no layouts"), (b"# none\n\n", "has no layouts"), (b"\xff", "not UTF-8")]
)
def test_a_file_without_layouts_is_refused(
    content: bytes, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "layouts.txt"
    file.write_bytes(content)
    assert said in refused(capsys, "--layouts", str(file))
