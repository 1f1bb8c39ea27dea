"""Attention's kernels, compiled for GPUs that are not here: no spill where time goes, no product that waits."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")

SPILLS = dict.fromkeys((("hopper_backward", "llama3_8b"), ("hopper_backward", "heads_of_128")), 40)
"""How many spilled registers a loop may load and store; none unless said. In these the masks, which few blocks need,
take more than a thread has; without masks nothing is spilled."""
PLAIN = ("--kinds", "forward", "query", "key", "fused")


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Compile in a process of its own: in this one Triton may interpret."""
    out, paths = folder / "builds.json", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    env = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths}
    call = [sys.executable, "-m", "benchmarks.attention_builds", "--out", str(out), *options]
    done = subprocess.run(
        call, env=env, cwd=folder, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def check_hopper(rows: list[dict[str, Any]]) -> None:
    kinds = {(row["kind"], row["shape"], row["mask"]) for row in rows}
    for kind in kinds:
        same = [row for row in rows if (row["kind"], row["shape"], row["mask"]) == kind]
        most = SPILLS.get(kind[:2], 0)
        assert any(row["loop_spills"] <= most and row["synchronous_products"] == 0 for row in same), same
    for row in rows:
        assert not row["serialized"], row
        assert row["products"], row
        assert row["shared_bytes"] <= 227 << 10, row


def test_the_first_blocks_on_hopper(tmp_path: Path) -> None:
    shapes, masks = ("--shapes", "gpt2_124m"), ("--masks", "causal", "documents")
    check_hopper(compiled(tmp_path, "--first", *PLAIN, *shapes, *masks))


def test_kernels_whose_warps_specialize(tmp_path: Path) -> None:
    kinds = ("--kinds", "hopper_forward", "hopper_backward")
    check_hopper(compiled(tmp_path, *kinds, "--shapes", "llama3_8b", "--masks", "causal"))


def test_ampere_has_its_own_products(tmp_path: Path) -> None:
    chosen = ("--first", "--kinds", "forward", "key", "--shapes", "llama3_1b", "--masks", "causal")
    for row in compiled(tmp_path, "--capability", "80", *chosen):
        assert row["synchronous_products"], row
        assert row["products"] == row["loop_spills"] == 0, row
        assert row["shared_bytes"] <= 163 << 10, row


@pytest.mark.slow
def test_all_blocks_on_hopper(tmp_path: Path) -> None:
    check_hopper(compiled(tmp_path))
