"""The table of losses under smaller optimizer states in the docs is that of the result file."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_docs_say_what_was_measured() -> None:
    runs = json.loads((ROOT / "benchmarks/results/optimizer_states.json").read_text())["runs"]
    text = (ROOT / "docs/choosing-a-layout.md").read_text()
    for run in runs:
        assert f"| {run['state_bytes']:,} | {run['eval_loss']:.3f} |" in text
