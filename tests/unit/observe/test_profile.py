"""The breakdown of a step: what dominates by construction is what the breakdown names, in forward and backward."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from megatrain.config.load import load
from megatrain.observe.communication import Traffic
from megatrain.observe.profile import (
    ATTENTION,
    LOSS,
    OF_PROFILER,
    OPTIMIZER,
    OTHER,
    OUTSIDE,
    PROFILER,
    STEPS,
    _summary,
    breakdown,
)
from megatrain.train.build import build_state
from megatrain.train.config import Config
from megatrain.train.state import TrainState
from megatrain.train.step import train_step

from benchmarks.synthetic import random_batch  # isort: skip


def tiny(
    seq_len: int = 64, checkpointing: str = "none", **model: int
) -> tuple[TrainState, Callable[[], object]]:
    sizes = {
        "n_layers": 2,
        "hidden_size": 64,
        "n_heads": 2,
        "ffn_size": 64,
        "vocab_size": 64,
        "max_seq_len": 4096,
    }
    cfg = load(
        Config,
        {
            "model": {"kind": "llama3", "n_kv_heads": 2, **sizes, **model},
            "data": {"kind": "synthetic", "mask_documents": False},
            "parallel": {"activation_checkpointing": checkpointing},
            "train": {"precision": "fp32"},
            "seq_len": seq_len,
            "global_batch_size": 1,
            "micro_batch_size": 1,
        },
    )
    state, data = build_state(cfg, torch.device("cpu")), random_batch(cfg, seed=0)
    return state, lambda: train_step(state, data, cfg, lr=0.0).read()


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"seq_len": 1024, "ffn_size": 16}, ATTENTION),
        ({"ffn_size": 8192, "seq_len": 256}, "linear products"),
        ({"ffn_size": 8192, "seq_len": 256, "checkpointing": "full"}, "linear products"),
        ({"vocab_size": 16384, "seq_len": 256}, LOSS),
    ],
    ids=str,
)
def test_what_dominates_a_step_is_named(sizes: dict[str, int], kind: str) -> None:
    state, step = tiny(**sizes)
    step()
    classes = dict(breakdown(step, state.parallel.models).classes)
    work = sum(seconds for name, seconds in classes.items() if name != OUTSIDE)
    assert kind == max((name for name in classes if name != OUTSIDE), key=classes.__getitem__), classes
    assert classes.get(OTHER, 0.0) < 0.05 * work, classes


def test_the_classes_add_up_to_the_whole_step_and_the_interpreter_has_its_share() -> None:
    a = torch.randn(64, 64)

    def step() -> None:
        time.sleep(0.05)  # stands for Python code between the operators
        a @ a

    started = time.perf_counter()
    found = breakdown(step)
    elapsed = (time.perf_counter() - started) / STEPS
    assert found.classes[0][0] == OUTSIDE
    assert found.classes[0][1] >= 0.05
    assert sum(seconds for _, seconds in found.classes) == pytest.approx(found.step_time_s)
    assert found.step_time_s <= elapsed
    assert found.operators[0][0] == "aten::mm"


def test_a_trace_parses_and_holds_the_parts_of_a_layer(tmp_path: Path) -> None:
    state, step = tiny()
    before = {name: len(module._forward_hooks) for name, module in state.model.named_modules()}
    breakdown(step, state.parallel.models, steps=1, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    parts = ("attn", "attn.core", "attn.wq", "mlp", "mlp.down", "attn_norm", "mlp_norm")
    wanted = {f"layers.{layer}.{part}" for layer in (0, 1) for part in parts}
    wanted |= {"step", "data", "gradients", "optimizer", "embed", "loss_head", "aten::mm"}
    assert wanted <= {event.get("name") for event in events}
    assert before == {name: len(module._forward_hooks) for name, module in state.model.named_modules()}


def recorded(
    name: str, number: int, kernels: list[tuple[str, int]], parent: FunctionEvent | None
) -> FunctionEvent:
    """An event of the host, as PyTorch makes it of a trace, with the device's work that it lists under it."""
    event = FunctionEvent(number, name, 1, 0, 1000, is_user_annotation=name == "optimizer")
    for kernel, microseconds in kernels:
        event.append_kernel(kernel, 0, microseconds)
    event.cpu_parent = parent
    return event


@pytest.mark.parametrize("wait", OF_PROFILER)
def test_what_the_profiler_waits_for_is_nobody_elses_time(wait: str) -> None:
    """352 ms in the optimizer's range, as in a trace of an H100, where its own kernels take 8 ms."""
    optimizer = recorded("optimizer", 1, [], None)
    events = [
        optimizer,
        recorded("aten::_fused_adamw_", 2, [("adamw_kernel", 8_000), (wait, 352_000)], optimizer),
        recorded(wait, 3, [(wait, 10_000)], optimizer),
        recorded("aten::mm", 4, [("gemm", 40_000)], None),
    ]
    found = _summary(events, {}, Traffic(), duration=0.5, steps=1, on_gpu=True)
    classes = dict(found.classes)
    assert classes[OPTIMIZER] == pytest.approx(0.008)
    assert classes[PROFILER] == pytest.approx(0.352)  # the event of that name repeats itself
    assert classes[OTHER] == pytest.approx(0.040)
    assert sum(classes.values()) == pytest.approx(0.5)
    assert [name for name, seconds in found.operators if seconds] == ["aten::mm", "aten::_fused_adamw_"]


def test_the_profiler_writes_nothing_of_its_own() -> None:
    program = (
        "import torch; from megatrain.observe.profile import breakdown; breakdown(lambda: torch.ones(3) + 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
