"""Profile of one training step by class of operation."""

import os
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

STEPS = 3  # steps that are averaged
OUTSIDE = "outside operators"
"""What the operators leave of the step: on a CPU the interpreter, on a GPU the time in which it waits for work."""

Names = tuple[str, ...]

OWNERS: dict[str, Names] = {
    "optimizer": ("optimizer.step", "adam", "_fused_sgd"),
    "attention": ("attention", "softmax", "bmm"),
}
"""Class -> parts of names; an operator belongs to it with everything that it calls."""
PRODUCTS: Names = ("::mm", "addmm", "linear", "matmul", "mkldnn")
LOSS: Names = ("loss", "cross_entropy", "crossentropy", "log_softmax", "logsoftmax", "logsumexp")
"""Names of the loss, which owns what it calls, except for matrix products."""
CLASSES: dict[str, Names] = {
    "lookup": ("embedding", "lookup", "index", "gather", "scatter"),
    "copy and cast": ("copy", "contiguous", "clone", "::cat", "::to"),
    "norm and elementwise": (
        "norm", "mul", "add", "sub", "div", "silu", "gelu", "relu", "tanh", "sigmoid", "pow", "sqrt", "mean", "sum",
        "exp", "log", "neg", "square", "fill", "zero", "lerp", "maximum", "clamp", "where", "swiglu", "rotate",
    ),
}  # fmt: skip
"""Class -> parts of names; the first that fits takes the operator alone."""


def classify(operator: str, callers: Names = ()) -> str:
    """Return the class of an operator such as `aten::mm`, called by `callers`."""
    name = operator.lower()
    lineage = [name, *(caller.lower() for caller in callers)]
    is_loss = any(part in each for each in lineage for part in LOSS)
    for kind, parts in OWNERS.items():
        if not is_loss and any(part in each for each in lineage for part in parts):
            return kind
    if any(part in name for part in PRODUCTS):
        return "matmul"
    if is_loss:
        return "loss"
    for kind, parts in CLASSES.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def breakdown(step: Callable[[], object]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Profile one call of `step`: its seconds by class, and those of its ten slowest operators, both largest first.

    Means over a few calls. The classes add up to the full duration: on a CPU operators are counted by their own
    time in the calling thread, on a GPU by that of the kernels they started.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own log lines: not on the user's terminal
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        duration = (time.perf_counter() - started) / STEPS
    classes: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        if event.device_type != DeviceType.CPU:  # a kernel: counted with the operator that started it
            continue
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        classes[classify(event.name, _callers(event))] += time_us / 1e6 / STEPS
        operators[event.name] += time_us / 1e6 / STEPS
    classes[OUTSIDE] = max(0.0, duration - sum(classes.values()))
    return _largest(classes), _largest(operators)[:10]


def _callers(event: FunctionEvent) -> Names:
    """Yield the names of the operators and annotations around an event, nearest first."""
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return tuple(names)


def _largest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])
