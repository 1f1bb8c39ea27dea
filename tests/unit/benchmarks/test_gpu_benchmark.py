"""The GPU benchmark, without a GPU: that it runs, that it tells what is wrong, and that its figures are right."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import supervise as supervision
from benchmarks.gpu.aims import aims
from benchmarks.gpu.correctness import deviations
from benchmarks.gpu.report import speeds
from benchmarks.gpu.training import BATCHES, MODELS, layers_that_fit
from megatrain.cli.compose import compose
from megatrain.models.flops import n_params
from megatrain_kernels.kernel import KERNELS, Kernel

BARE = """
import sys

class Absent:
    names = {"hydra", "omegaconf", "pydantic", "yaml", "rich", "tokenizers", "tiktoken", "pyarrow", "wandb", "pytest",
             "safetensors", "transformers", "tensorboard"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
from benchmarks.gpu.worker import main
main()
"""


def test_all_of_it_in_small_shapes_and_with_torch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "worker_command", lambda: [sys.executable, "-c", BARE])
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--small", "--out", str(tmp_path)])
    assert command.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in found["rows"]} == set(supervision.SHARES)
    assert found["machine"]["torch"] == torch.__version__
    assert found["not_whole"] == {}
    checked = {row["operation"] for row in found["rows"] if row["part"] == "correctness"}
    timed = [row for row in found["rows"] if row["part"] == "speed" and row["error"] is None]
    assert checked == {row["operation"] for row in timed}
    assert any("ratio" in row for row in timed)
    trained = [row for row in found["rows"] if row["part"] == "training"]
    assert {row["model"] for row in trained} == set(MODELS)
    assert all(row["last_loss"] < row["first_loss"] for row in trained)
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"\n## {title}" in text for title in ("Ceilings", "Correctness", "Speed", "Training"))


TROUBLE = """
import os, time
from benchmarks.gpu import worker
from benchmarks.gpu.steps import Step

def refuse():
    raise ValueError("no such kernel\\nand a long story")

def steps(setting):
    actions = {"good": lambda: [{"what": "good", "figure": 1}], "refused": refuse, "died": os.abort,
               "hung": lambda: time.sleep(60), "last": lambda: [{"what": "last", "figure": 2}]}
    return [Step({"what": what}, action) for what, action in actions.items()]

def steps_of(part, setting):
    return {"correctness": steps, "speed": lambda setting: steps(setting)[:1]}[part](setting)

worker.steps_of = steps_of
worker.main()
"""


def test_what_dies_or_hangs_costs_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "STEP_S", 3.0)
    progress = supervision.supervise(
        ["correctness", "speed"],
        small=True,
        seconds=200,
        write=lambda progress: None,
        command=[sys.executable, "-c", TROUBLE],
    )
    told = [(row["part"], row["what"], row.get("figure"), row["error"]) for row in progress.rows]
    assert told[3][3].startswith("stopped after")
    assert told == [
        ("correctness", "good", 1, None),
        ("correctness", "refused", None, "ValueError: no such kernel"),
        ("correctness", "died", None, "the process died: SIGABRT"),
        ("correctness", "hung", None, told[3][3]),
        ("correctness", "last", 2, None),
        ("speed", "good", 1, None),
    ]
    assert progress.cuts == {}


def test_a_part_whose_time_is_up_or_that_cannot_begin_says_so() -> None:
    progress = supervision.supervise(
        ["correctness", "speed", "training"],
        small=True,
        seconds=0,
        write=lambda progress: None,
        command=[sys.executable, "-c", TROUBLE],
    )
    assert progress.rows == []
    assert progress.cuts == {
        "correctness": "time was up, 5 steps left out",
        "speed": "time was up, 1 steps left out",
        "training": "KeyError: 'training'",
    }


def test_parts_share_the_time() -> None:
    ends = supervision.deadlines(["speed", "training"], 68.0, 1000.0)
    assert ends == pytest.approx({"speed": 1040.0, "training": 1068.0})  # 0.4 to 0.28


def broken(kernel: Kernel, function: Any) -> Kernel:
    """The kernel with another function, and with what the right one computes in float64 as the truth."""

    def truth(*given: Any, **options: Any) -> Any:
        return kernel.function(*(t.double() if t.is_floating_point() else t for t in given), **options)

    return dataclasses.replace(
        kernel, function=function, suite=dataclasses.replace(kernel.suite, truth=truth)
    )


@pytest.mark.parametrize("wrong", ["output 0", "gradient 1"])
def test_a_wrong_kernel_is_told(wrong: str) -> None:
    """Off by 5 %, or a gradient that is missing; the right one passes."""
    right = KERNELS["attention"]

    def wrong_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        out = right.function(q, k.detach() + 0 * k if wrong == "gradient 1" else k, v, **options)
        return out * 1.05 if wrong == "output 0" else out

    for kernel, is_right in ((right, True), (broken(right, wrong_attention), False)):
        off = deviations(torch.device("cpu"), kernel, right.suite.small[0], torch.bfloat16, "auto")
        assert set(off) == {"output 0", "gradient 0", "gradient 1", "gradient 2"}
        assert (off[wrong] <= 1) == is_right


def test_a_loss_of_nan_is_wrong() -> None:
    right = KERNELS["cross_entropy"]
    wrong = broken(right, lambda logits, *rest, **o: right.function(logits * float("nan"), *rest, **o))
    off = deviations(torch.device("cpu"), wrong, right.suite.small[0], torch.float32, "auto")
    assert not off["output 0"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_presets(name: str) -> None:
    assert MODELS[name] == compose([f"model={name}", "seq_len=128"]).model


def test_layers_that_fit() -> None:
    """20 bytes a parameter, and what each layer keeps: in bf16, 8,192 tokens of 6 x 4,096, 2 x 6,144, 3 x 14,336."""
    model, batch = MODELS["llama3_8b"], BATCHES["llama3_8b"]
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    rest = 2 * 128256 * 4096 + 4096
    assert n_params(model) == 32 * layer + rest
    kept = 2 * 8192 * (6 * 4096 + 2 * 6144 + 3 * 14336)
    whole = 20 * rest + 17 * (20 * layer + kept)
    assert [layers_that_fit(model, batch, memory) for memory in (whole, whole - 1, 1e15, 0)] == [
        17,
        16,
        32,
        1,
    ]


def timing(implementation: str, passes: str, ms: float, **more: Any) -> dict[str, Any]:
    """A row of an operation of 4 TFLOP and 1 GB forward, and 12 TFLOP and 3 GB in both passes."""
    times = {"forward": 1, "both": 3}[passes]
    row = {
        "part": "speed",
        "error": None,
        "operation": "attention",
        "case": "llama3_8b_16k",
        "passes": passes,
    }
    work = {"flops": times * 4e12, "bytes": times * 1e9, "ceiling": "bf16"}
    return row | work | {"implementation": implementation, "ms": ms, **more}


def test_rates_floors_and_ratios() -> None:
    known = [
        {"part": "ceilings", "error": None, "ceiling": "copy", "gbps": 4000.0},
        {"part": "ceilings", "error": None, "ceiling": "bf16", "tflops": 800.0},
    ]
    rows = speeds(
        [
            *known,
            timing("megatrain auto", "forward", 8.0),
            timing("megatrain auto", "both", 24.0),
            timing("torch flash", "forward", 10.0),
            timing("torch flash", "both", 22.0),
            timing("flex_attention", "forward", 16.0),
        ]
    )
    ours = {row["passes"]: row for row in rows if row["implementation"] == "megatrain auto"}
    assert ours["forward"]["tflops"] == pytest.approx(500)
    assert ours["forward"]["gbps"] == pytest.approx(125)
    assert ours["forward"]["floor_ms"] == pytest.approx(5)  # 4 TFLOP at 800 a second; the bytes take 0.25 ms
    assert ours["forward"]["share"] == pytest.approx(5 / 8)
    assert (ours["forward"]["best_public"], ours["forward"]["ratio"]) == ("torch flash", pytest.approx(1.25))
    assert ours["backward"]["tflops"] == pytest.approx(500)  # 8 TFLOP in 16 ms
    assert ours["backward"]["ratio"] == pytest.approx(12 / 16)
    found = {
        row["aim"].split(":")[0]: row
        for row in aims(rows, [{"model": "llama3_8b", "precision": "bf16", "mfu_full": 0.6}])
    }
    assert found["attention forward, 16k tokens, head size 128, causal"]["met"] is False  # 500 of 600
    assert found["attention backward, 16k tokens, head size 128, causal"]["met"] is True  # 500 of 450
    assert found["attention"]["measured"] == pytest.approx(12 / 16)
    assert found["training llama3_8b in bf16"]["met"] is True
    assert len(found) == 4  # no figures, no aims
