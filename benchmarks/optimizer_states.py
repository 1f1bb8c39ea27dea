"""What smaller optimizer states do to the loss, and the memory that they take.

    python -m benchmarks.optimizer_states --out benchmarks/results/optimizer_states.json

Each kind of states trains the default recipe with AdamW from the same seed, on the same samples. Width 128 in place of
96: so narrow a matrix would keep its states in full under int8. One run with another seed shows how far two runs are
apart that differ by chance alone. The losses do not depend on how busy the machine is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from megatrain.cli.compose import compose
from megatrain.optim.build import optimizer_tensors
from megatrain.train.build import build_state

COMMON = (
    "optim=adamw",
    "optim.lr=6e-3",
    "model.hidden_size=128",
    "train.precision=fp32",
    "train.eval_every=0",
)
KINDS = {
    "fp32": ("optim.states=fp32",),
    "bf16": ("optim.states=bf16",),
    "bf16, stochastic rounding": ("optim.states=bf16", "optim.stochastic_rounding=true"),
    "int8": ("optim.states=int8",),
}
LAST = 100
"""Steps at the end over which the training loss is averaged."""


@dataclass(frozen=True)
class Outcome:
    """What one run reached with what states."""

    states: str
    seed: int
    steps: int
    train_loss: float
    """Nats a token, mean of the last `LAST` steps."""
    eval_loss: float
    """Nats a token, after the last step."""
    weights: int
    """Number of weights."""
    state_bytes: int
    """Bytes of the optimizer's state."""


def bytes_of_states(overrides: list[str]) -> tuple[int, int]:
    """Return the number of weights, and the bytes of the optimizer's tensors, of a run before its first step."""
    state = build_state(compose(overrides), torch.device("cpu"))
    tensors = optimizer_tensors(state.optimizer, state.weights.trained)
    weights = sum(p.numel() for p in state.weights.trained.values())
    return weights, sum(t.numel() * t.itemsize for t in tensors.values())


def train(kind: str, seed: int, steps: int) -> Outcome:
    """Train the first `steps` steps of the recipe in a process of its own."""
    chosen = [*COMMON, *KINDS[kind], f"train.seed={seed}", f"train.steps={steps}", "train.sample_tokens=0"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "megatrain",
            "train",
            f"run.dir={folder}",
            "run.name=states",
            *chosen,
        ]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "states" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    validated = [row["eval/loss"] for row in rows if "eval/loss" in row]
    weights, taken = bytes_of_states(chosen)
    return Outcome(kind, seed, steps, statistics.mean(losses[-LAST:]), validated[-1], weights, taken)


def main() -> None:
    """Run all kinds and write the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = [(kind, given.seed) for kind in KINDS] + [("fp32", given.seed + 1)]
    found = [asdict(train(kind, seed, given.steps)) for kind, seed in runs]
    command = f"python -m benchmarks.optimizer_states --steps {given.steps} --out {given.out}"
    result = {"command": command, "machine": describe_machine(), "runs": found}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
