"""A small corpus and a small run, started as a user starts it: as a process, from the command line."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from forked import Forked, run_forked
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

TINY = (
    "data.tokenizer.kind=bytes",
    "model.n_layers=2",
    "model.hidden_size=32",
    "model.n_heads=2",
    "model.n_kv_heads=null",
    "model.head_dim=null",
    "model.ffn_size=64",
    "model.vocab_size=260",
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "train.steps=12",
    "train.eval_every=5",
    "train.eval_tokens=256",
    "train.sample_tokens=8",
    "schedule.warmup_steps=2",
    "checkpoint.every=4",
    "checkpoint.keep=0",
    "log.wandb=off",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatrain", *arguments]


def wait_for_rows(process: subprocess.Popen[str] | Forked, metrics: Path, rows: int) -> bool:
    """Until `metrics` has that many rows (True), or the process has ended."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)  # not a busy loop: it would take a core from the process
    return False


@dataclass(frozen=True)
class Workplace:
    """An empty folder with a cache of its own, in which the command runs."""

    folder: Path
    text: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"MEGATRAIN_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def tiny(self, *overrides: str) -> list[str]:
        """The command line of a tiny run on the workplace's text."""
        return command("train", f"data.path={self.text}", *TINY, *overrides)

    def run(
        self, arguments: Sequence[str], expect: int = 0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; it is forked where it could as well have been started anew."""
        if list(arguments[:3]) == command():
            done = run_forked(
                arguments[3:], cwd=self.folder, environment={**self.environment, **(environment or {})}
            )
        else:
            done = subprocess.run(
                arguments, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
            )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Forked:
        """Start the command in the background, forked."""
        assert list(arguments[:3]) == command()
        return Forked(arguments[3:], cwd=self.folder, environment={**self.environment, **(environment or {})})

    def rows(self, name: str) -> list[dict[str, object]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def final_weights(run: Path, into: Path) -> dict[str, str]:
    """Hash of every tensor of the last checkpoint, read by plain torch."""
    last = max((run / "checkpoints").glob("step-*"))
    dcp_to_torch_save(last, into)
    found: dict[str, str] = {}
    stack = [("", torch.load(into, weights_only=True))]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, dict):
            stack += [(f"{prefix}/{key}", value) for key, value in node.items()]
        else:
            raw = node.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[prefix] = hashlib.sha256(raw).hexdigest()
    return found


STABLE = (
    "step",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "data/sample_digest",
    "eval/loss",
)


def stable(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """What of the metrics must not depend on time."""
    return [{key: row[key] for key in STABLE if key in row} for row in rows]
