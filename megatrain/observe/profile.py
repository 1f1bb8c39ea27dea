"""Profile of training steps: time by class of work, slowest operators, communication by mesh axis, and traces.

While a step is profiled each module is a range (`layers.3.attn`), and work belongs to the class of the innermost
module around it. A backward operator belongs where its forward operator was: autograd gives both one sequence number.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megatrain.nn.attention import Attention
from megatrain.nn.block import Block
from megatrain.nn.decoder import Decoder
from megatrain.nn.embed import Embedding
from megatrain.nn.layer import Linear
from megatrain.nn.mla import MultiHeadLatentAttention
from megatrain.nn.mlp import GatedMLP, PlainMLP
from megatrain.nn.moe import Experts, MoE
from megatrain.nn.norm import LayerNorm, RMSNorm
from megatrain.observe.communication import (
    PREFIX,
    WAITING,
    Traffic,
    axes_of_groups,
    listening,
    range_names,
)
from megatrain.parallel.mesh import Mesh

STEPS = 3
"""Number of steps that a breakdown averages over."""
OUTSIDE = "Python, outside operators"
OUTSIDE_ON_GPU = "GPU idle: waiting for the host"
OPTIMIZER = "optimizer (norm, clipping, update)"
PROFILER = "the profiler itself"
OTHER = "other"
STEP = "step"
ATTENTION, LOSS = "attention (scores, softmax, values)", "loss head (last product, cross entropy)"
CLASS_OF_MODULE: tuple[tuple[type[nn.Module], str], ...] = (
    (Linear, "linear products"),
    (RMSNorm, "norms"),
    (LayerNorm, "norms"),
    (Embedding, "embedding"),
    (Experts, "expert products"),
    (MoE, "expert routing"),
    (GatedMLP, "activation functions"),
    (PlainMLP, "activation functions"),
    (Attention, "rotary positions and head layout"),
    (MultiHeadLatentAttention, "rotary positions and head layout"),
    (Block, "residual additions"),
    (Decoder, "rotary positions and head layout"),
)
"""Class of the work that a module does itself, not in a module inside it; the first type that fits."""
CLASS_OF_RANGE: tuple[tuple[str, str], ...] = (
    ("data", "data"),
    ("optimizer", OPTIMIZER),
    ("Optimizer.step", OPTIMIZER),
    ("gradients", "gradient accumulation"),
    ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", "gradient accumulation"),
    ("FSDP::", "FSDP (copies into and out of shards)"),
    ("Torch-Compiled", "compiled blocks"),
    ("## Call CompiledFxGraph", "compiled blocks"),
    ("CompiledFunction", "compiled blocks"),
)
"""Class of the ranges that the step (train/step.py), torch and FSDP mark, by how their names begin."""
BACKWARD = "autograd::engine::evaluate_function: "
OF_PROFILER = (
    "Command Buffer Full",
    "Activity Buffer Request",
    "Buffer Flush",
    "Lazy Function Loading",
    "Runtime Triggered Module Loading",
    "Instrumentation",
    "Resource",
    "Driver Compiler",
)
"""Names of what CUPTI records as overhead of profiling (CUpti_ActivityOverheadKind): the profiler waits for room in its
own buffers, or code is loaded. PyTorch lists them among the kernels of whichever operator ran then."""


@dataclass(frozen=True)
class Communication:
    """One kind of communication of a step on this process."""

    axis: str
    collective: str
    calls: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one step of this process goes; lists are sorted, the largest first."""

    step_time_s: float
    """Duration of a step under the profiler, which makes it slower."""
    classes: list[tuple[str, float]]
    """Class of work -> seconds. On a CPU they add up to `step_time_s`; on a GPU kernels may overlap."""
    operators: list[tuple[str, float]]
    """The ten slowest operators and their own seconds."""
    communication: list[Communication]


def breakdown(
    step: Callable[[], object],
    models: Iterable[nn.Module] = (),
    *,
    mesh: Mesh | None = None,
    steps: int = STEPS,
    trace: Path | None = None,
) -> Breakdown:
    """Profile `steps` calls of `step` and return means per call.

    On a CPU operators count with their own time in the calling thread, on a GPU with that of the kernels they started.

    Args:
        models: the models that `step` trains; their modules name the classes.
        mesh: the mesh whose communication is told apart by axis.
        trace: file that gets the profile as a Chrome trace (JSON), with allocations on a CPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own log lines: not on the user's terminal
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ExitStack() as stack:
        classes = stack.enter_context(_module_ranges(models))
        traffic = stack.enter_context(listening(axes_of_groups(mesh))) if mesh is not None else Traffic()
        options = {"record_shapes": True, "profile_memory": not on_gpu} if trace is not None else {}
        recorded = stack.enter_context(profile(activities=activities, **options))  # type: ignore[arg-type]
        started = time.perf_counter()
        for _ in range(steps):
            with record_function(STEP):
                step()
        if on_gpu:
            torch.cuda.synchronize()
        duration = (time.perf_counter() - started) / steps
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    events = [event for event in recorded.events() or () if event.device_type == DeviceType.CPU]
    return _summary(events, classes, traffic, duration=duration, steps=steps, on_gpu=on_gpu)


@contextmanager
def _module_ranges(models: Iterable[nn.Module]) -> Iterator[dict[str, str]]:
    """Mark each module's forward pass as a range named as the module; yields range -> class.

    Compiled blocks are left as they are: a hook inside would have them compiled anew.
    """
    classes: dict[str, str] = {}
    with ExitStack() as stack:
        for model in models:
            compiled = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
            hidden = {id(inner) for module in compiled for inner in module.modules()}
            for name, module in model.named_modules():
                if id(module) not in hidden and not isinstance(module, nn.ModuleDict):
                    path = name or "model"
                    classes[path] = _class_of(name, module)
                    stack.enter_context(_range(module, path))
        yield classes


@contextmanager
def _range(module: nn.Module, name: str) -> Iterator[None]:
    opened: list[Any] = []  # a stack: a recomputed block runs inside another's backward pass

    def begin(*_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def end(*_: object) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    first = module.register_forward_pre_hook(begin, prepend=True)
    last = module.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


def _class_of(name: str, module: nn.Module) -> str:
    leaf = name.rpartition(".")[2]
    if leaf == "core":
        return ATTENTION
    if leaf == "loss_head":
        return LOSS
    return next((kind for cls, kind in CLASS_OF_MODULE if isinstance(module, cls)), OTHER)


def _summary(
    events: list[FunctionEvent],
    modules: dict[str, str],
    traffic: Traffic,
    *,
    duration: float,
    steps: int,
    on_gpu: bool,
) -> Breakdown:
    """Add up the events' own times by class, operator and kind of communication."""
    # Of several events with one number the last is the operator that autograd recorded.
    forward = {
        (event.thread, event.sequence_nr): event
        for event in events
        if event.sequence_nr >= 0 and not event.fwd_thread  # set in the backward pass
    }
    caller = next((event.thread for event in events if event.name == STEP), None)
    classes: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = defaultdict(float)
    talk: dict[str, float] = defaultdict(float)
    for event in events:
        if event.is_async or not (on_gpu or event.thread == caller) or _is_plain_range(event, modules):
            continue
        seconds, overhead = (each / steps for each in _own_seconds(event, on_gpu=on_gpu))
        if overhead:
            classes[PROFILER] += overhead
        kind, around = classify(event, modules, forward)
        classes[kind] += seconds
        talk[around] += seconds
        if not event.is_user_annotation and event.name not in OF_PROFILER:
            operators[event.name] += seconds
    classes[OUTSIDE_ON_GPU if on_gpu else OUTSIDE] = max(0.0, duration - sum(classes.values()))
    kinds = [
        Communication(axis, collective, calls / steps, traffic.bytes[axis, collective] / steps, seconds)
        for (axis, collective), calls in traffic.calls.items()
        for seconds in [sum(talk[name] for name in range_names(axis, collective))]
    ]
    return Breakdown(
        step_time_s=duration,
        classes=[(name, seconds) for name, seconds in _largest(classes) if seconds > 0],
        operators=_largest(operators)[:10],
        communication=sorted(kinds, key=lambda kind: -kind.seconds),
    )


def _is_plain_range(event: FunctionEvent, modules: dict[str, str]) -> bool:
    """Tell whether an event only marks what is inside it, so that its own time is that of Python."""
    return event.name == STEP or event.name in modules or event.name in ("data", "optimizer", "gradients")


def _own_seconds(event: FunctionEvent, *, on_gpu: bool) -> tuple[float, float]:
    """Return an event's own seconds, and those that are the profiler's."""
    if not on_gpu:
        return _split([(event.name, float(event.self_cpu_time_total))])
    # A range on the host has a copy of itself among its kernels, as long as all that it encloses.
    return _split([(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name != event.name])


def _split(parts: list[tuple[str, float]]) -> tuple[float, float]:
    """Add up the microseconds of what is not the profiler's and of what is, in seconds."""
    overhead = sum(time for name, time in parts if name in OF_PROFILER)
    return (sum(time for _, time in parts) - overhead) / 1e6, overhead / 1e6


def classify(
    event: FunctionEvent, modules: dict[str, str], forward: dict[tuple[int, int], FunctionEvent]
) -> tuple[str, str]:
    """Return the class of an event, and the name of the range that gave it.

    Args:
        modules: range -> class. forward: (thread, sequence number) -> the forward operator.
    """
    node: FunctionEvent | None = event
    while node is not None:
        if node.name in modules:
            return modules[node.name], node.name
        kind = next((kind for start, kind in CLASS_OF_RANGE if node.name.startswith(start)), None)
        if kind is None and node.name.startswith((PREFIX, WAITING)):
            kind = WAITING if node.name.startswith(WAITING) else node.name.rpartition(" ")[0]
        if kind is not None:
            return kind, node.name
        if node.name.startswith(BACKWARD):
            made_by = forward.get((node.fwd_thread or 0, node.sequence_nr))
            if made_by is not None:
                return classify(made_by, modules, {})
        node = node.cpu_parent
    return OTHER, ""


def _largest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])
