"""A run whose token cache is damaged: it stops, on all ranks, and the next start goes on with the right tokens."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from workplace import Workplace

from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import prepare

RUN = ("run.name=damaged", "train.steps=8", "train.eval_every=0", "train.sample_tokens=0")
CASES = {
    "loader": (("data.verify=never",), r"train.tokens: token ", "has the id 32,"),
    "background": ((), "train.tokens has the right size and other content", "(SHA-256)"),
}


def flip(tokens: np.ndarray) -> None:
    tokens[::16] ^= 1


def clear(tokens: np.ndarray) -> None:
    tokens[:] = 0


def set_high_bits(tokens: np.ndarray) -> None:
    tokens[::16] |= 1 << 15


def plant(shard: Path, damage: Callable[[np.ndarray], None]) -> None:
    tokens = np.fromfile(shard, "<u2")
    damage(tokens)
    tokens.tofile(shard)


def stop(workplace: Workplace, line: list[str], step: int, says: tuple[str, ...]) -> None:
    """Start a run on damaged tokens and see it stop at `step`, with nothing saved."""
    run = workplace.folder / "runs/damaged"
    process = workplace.start(line)
    _, said = process.communicate(timeout=180)
    ended = time.time()
    assert process.returncode == 2, said
    assert "Traceback" not in said
    for words in (f"stopped at step {step}, since the token cache is damaged", *says):
        assert words in said
    status = run / "status.json"
    facts = json.loads(status.read_text())
    assert (facts["state"], facts["step"], facts["exit_code"]) == ("failed", step, 2)
    assert ended - status.stat().st_mtime < 10  # all ranks end with the one that found it
    kept = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert kept == ([f"step-{step - 1:08}"] if step > 1 else [])


def test_an_id_outside_the_vocabulary_ends_all_ranks(workplace: Workplace) -> None:
    tokenizer = TokenizerConfig(kind="bytes")
    cfg = DataConfig(path=str(workplace.text), cache_dir=str(workplace.folder / "cache"), tokenizer=tokenizer)
    directory = prepare(cfg, progress=lambda name, share: None).directory
    assert directory is not None
    plant(directory / "train.tokens", set_high_bits)
    words, *says = CASES["loader"]
    stop(workplace, workplace.tiny(*RUN, *words, "parallel.dp_shard=2"), 1, (str(directory), *says))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("parallel.dp_shard=2",)])
@pytest.mark.parametrize(
    ("damage", "case"), [(flip, "background"), (clear, "background"), (set_high_bits, "loader")]
)
def test_a_run_stops_and_goes_on(
    workplace: Workplace, damage: Callable[[np.ndarray], None], case: str, layout: tuple[str, ...]
) -> None:
    words, *says = CASES[case]
    line = workplace.tiny(*RUN, *words, *layout)
    workplace.run([*line, "train.stop_at=4"])
    (shard,) = (workplace.folder / "cache").glob("*/train.tokens")
    content = shard.read_bytes()
    plant(shard, damage)
    stop(workplace, line, 5, (str(shard.parent), *says))
    workplace.run(line)
    assert shard.read_bytes() == content
    fresh = Workplace(workplace.folder / "fresh", workplace.text)
    fresh.folder.mkdir()
    fresh.run(fresh.tiny(*RUN, *words, *layout))
    gone_on, undisturbed = (
        [(row["step"], row["train/loss"]) for row in each.rows("damaged")] for each in (workplace, fresh)
    )
    assert gone_on == undisturbed
