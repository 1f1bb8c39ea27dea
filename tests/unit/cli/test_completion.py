"""Completion: the candidates, and the bash script in a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.cli.completion import candidates
from megatrain.config.load import config_classes, hints, kind_of
from megatrain.train.config import Config

KINDS = {
    group: [kind_of(cls) for cls in config_classes(hints(Config)[group])] for group in ("optim", "schedule")
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megatrain tr", ["train"]),
        ("/usr/bin/megatrain --v", ["--version"]),
        ("X=1 megatrain doctor --", ["--cluster", "--help", "--json", "--unfit"]),
        ("megatrain train mod", ["model.", "model="]),
        ("megatrain train model.n_", ["model.n_heads=", "model.n_kv_heads=", "model.n_layers="]),
        ("megatrain train model.rope_s", ["model.rope_scaling."]),
        ("megatrain train x=1 +sched", ["+schedule.", "+schedule="]),
        ("megatrain train ~optim.mom", ["~optim.momentum="]),
        (
            "megatrain train schedule=",
            [f"schedule={each}" for each in sorted(KINDS["schedule"])],
        ),
        ("megatrain train -m optim=adamw,sg", ["optim=adamw,sgd"]),
        (
            "megatrain train train.precision=",
            [f"train.precision={each}" for each in ("auto", "bf16", "fp32", "fp64", "fp8")],
        ),
        ("megatrain train log.tensorboard=", ["log.tensorboard=false", "log.tensorboard=true"]),
        ("megatrain train optim.kind=", [f"optim.kind={each}" for each in sorted(KINDS["optim"])]),
        ("megatrain train train.stop_at=", ["train.stop_at=null"]),
        ("megatrain train seq_len=", []),
        ("megatrain train nothing=", []),
        ("megatrain train --c", ["--cfg", "--config-dir", "--config-name"]),
        ("megatrain train --cfg ", ["job", "schema"]),
        ("megatrain --shell-completion z", ["zsh"]),
        ("megatrain nope ", []),
        ("megatrain doctor x", []),
    ],
)
def test_candidates(line: str, expected: list[str]) -> None:
    assert candidates(line) == expected


def test_paths_are_completed_and_own_options_offered(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    (tmp_path / "text.txt").write_text("")
    assert candidates(f"megatrain train data.path={tmp_path}/") == [
        f"data.path={tmp_path}/model/",
        f"data.path={tmp_path}/text.txt",
    ]
    assert candidates(f"megatrain train --config-dir {tmp_path} model=min") == ["model=mine"]
    assert candidates(f"megatrain train --config-dir {tmp_path}/mo") == [f"{tmp_path}/model/"]


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("megatrain tr", "<train >"),
        ("megatrain train schedule=w", "<wsd >"),  # readline replaces what follows the =
        ("megatrain train train.prec", "<train.precision=>"),
        ("megatrain train train.precision=f", "<fp32><fp64><fp8>"),
        ("megatrain train nothing=", "<>"),
    ],
)
def test_bash_script_in_a_real_bash(line: str, replies: str, tmp_path: Path) -> None:
    """The function is called as readline does it: COMP_LINE and COMP_POINT in, COMPREPLY out."""
    program = tmp_path / "megatrain"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatrain "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$(megatrain --shell-completion bash)"
        complete -p megatrain >/dev/null || exit 3
        COMP_LINE='{line} and more' COMP_POINT={len(line)}
        _megatrain
        printf '<%s>' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    assert (done.stdout, done.stderr) == (replies, "")
