"""A run whose token cache is damaged: it stops, on all ranks, and the next start goes on with the right tokens."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from workplace import Workplace

RUN = ("run.name=damaged", "train.steps=8", "train.eval_every=0", "train.sample_tokens=0")


def flip(tokens: np.ndarray) -> None:
    tokens[::16] ^= 1


def clear(tokens: np.ndarray) -> None:
    tokens[:] = 0


def set_high_bits(tokens: np.ndarray) -> None:
    tokens[::16] |= 1 << 15


def losses(workplace: Workplace) -> list[tuple[object, object]]:
    return [(row["step"], row["train/loss"]) for row in workplace.rows("damaged")]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, ()),
        pytest.param(clear, (), marks=pytest.mark.slow),
        pytest.param(set_high_bits, ("data.verify=never",), marks=pytest.mark.slow),
        pytest.param(flip, ("parallel.dp_shard=2",), marks=pytest.mark.slow),
        (set_high_bits, ("data.verify=never", "parallel.dp_shard=2")),
    ],
)
def test_a_run_stops_and_goes_on(
    workplace: Workplace, damage: Callable[[np.ndarray], None], words: tuple[str, ...]
) -> None:
    line = workplace.tiny(*RUN, *words)
    workplace.run([*line, "train.stop_at=4"])
    (shard,) = (workplace.folder / "cache").glob("*/train.tokens")
    content = shard.read_bytes()
    tokens = np.frombuffer(content, "<u2").copy()
    damage(tokens)
    tokens.tofile(shard)
    process = subprocess.Popen(
        line, cwd=workplace.folder, env=workplace.environment, stderr=subprocess.PIPE, text=True
    )
    _, said = process.communicate(timeout=180)
    ended = time.time()
    run = workplace.folder / "runs/damaged"
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert str(shard.parent) in said
    assert "stopped at step 5, since the token cache is damaged" in said
    assert ("has the id 32," if "data.verify=never" in words else "train.tokens has the right size") in said
    status = run / "status.json"
    facts = json.loads(status.read_text())
    assert (facts["state"], facts["step"], facts["exit_code"]) == ("failed", 5, 2)
    assert ended - status.stat().st_mtime < 10  # all ranks end with it
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000004"]
    workplace.run(line)
    assert shard.read_bytes() == content
    gone_on = losses(workplace)
    manifest = json.loads((run / "checkpoints/step-00000008/manifest.json").read_text())
    assert manifest["info"]["data_unverified_since"] is None
    fresh = Workplace(Path(workplace.folder, "fresh"), workplace.text)
    fresh.folder.mkdir()
    fresh.run(fresh.tiny(*RUN, *words))
    assert gone_on == losses(fresh)
