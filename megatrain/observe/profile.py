"""Where the time of one training step goes, by class of operation."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

CLASSES = {
    "attention": ("attention", "bmm", "softmax"),
    "matmul": ("::mm", "addmm", "linear", "matmul"),
    "optimizer": ("adam", "sgd", "foreach", "lerp"),
    "copy and cast": ("copy", "contiguous", "clone", "cat", "_to_"),
    "norm and elementwise": (
        "norm", "mul", "add", "sub", "div", "silu", "gelu", "relu", "tanh", "pow", "sqrt", "mean", "sum", "exp", "log",
        "neg", "square", "fill", "zero",
    ),
    "lookup": ("embedding", "index", "gather", "scatter"),
}  # fmt: skip
"""Class -> parts of operators' names; the first class that fits takes it. The softmax of the loss is a log_softmax."""


def classify(operator: str) -> str:
    """The class of an operator such as `aten::mm`."""
    name = operator.lower()
    if "log_softmax" in name or "logsumexp" in name:
        return "loss"
    for kind, parts in CLASSES.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def breakdown(step: Callable[[], object]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Seconds of one call of `step` by class, and of its ten dearest operators; both largest first."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
    classes: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = {}
    for event in recorded.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        classes[classify(event.key)] += seconds
        operators[event.key] = seconds
    largest = sorted(operators.items(), key=lambda item: -item[1])[:10]
    return sorted(classes.items(), key=lambda item: -item[1]), largest
