"""Every value of `moe.backend` on the command line trains, or is refused with the reason before anything is written."""

from contextlib import chdir
from pathlib import Path
from typing import get_args

import pytest
import torch
from workplace import TINY

from megatrain.cli.main import main
from megatrain.config.load import hints
from megatrain.nn.config import MoEBackendConfig

BACKENDS = get_args(hints(MoEBackendConfig)["backend"])
RUN = [
    *(
        "train",
        "model=mixtral_debug",
        "data=synthetic",
        "log.display=off",
        "train.steps=3",
        "train.precision=fp32",
    ),
    *(word for word in TINY if not word.startswith(("data.", "train.steps"))),
]
NEEDS = {
    "triton": "needs a GPU with tensor cores",
    "megablocks": "needs a GPU (the model is on cpu); train.precision=bf16",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they may run")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_or_says_what_it_needs(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chdir(tmp_path):
        code = main([*RUN, f"moe.backend={backend}"])
    said = capsys.readouterr().err
    run = tmp_path / "runs" / "default"
    if backend in NEEDS:
        assert code == 2
        assert f"moe.backend={backend} {NEEDS[backend]}" in said
        assert not run.exists()
    else:
        assert code == 0, said
        assert f"moe:\n  backend: {backend}\n" in (run / "config.yaml").read_text()


def test_a_config_file_without_the_group_says_how_to_set_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("defaults: [base_run, {model: small}, {data: synthetic}, _self_]\n")
    line = ["train", "--config-dir", str(tmp_path), "--config-name", "own", "--cfg", "job"]
    assert main([*line, "moe.backend=loop"]) == 2
    assert "write +moe.backend=VALUE" in capsys.readouterr().err
    assert main([*line, "+moe.backend=loop"]) == 0
    assert "  backend: loop" in capsys.readouterr().out
