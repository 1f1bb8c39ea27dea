"""Every operation on the device against its definition in float64 on the CPU: results and gradients."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.operation import Operation
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.peers import Options, Tensors
from benchmarks.gpu.steps import Row, Setting, Step, refuses
from megatrain_kernels.backend import interpreting
from megatrain_kernels.kernel import Case

ROUNDINGS = {torch.bfloat16: 4, torch.float32: 64}
"""Roundings of the input's type that an element may be off, relative to the largest of its tensor: sums are float32
inside, so bf16 sees its own few roundings only, float32 those of sums over a few hundred terms."""


def steps(setting: Setting) -> list[Step]:
    """One step for each operation, case, type and backend."""
    on_triton = setting.device.type == "cuda" or interpreting()
    backends = ("auto", "triton") if on_triton else ("auto",)
    found = []
    for dtype in ROUNDINGS:  # what training computes in comes first: time may be short
        for operation in OPERATIONS:
            for case in operation.small if dtype in operation.dtypes else ():
                for backend in backends:
                    about = {
                        "operation": operation.name,
                        "case": case.name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                    }
                    run = partial(deviations, setting.device, operation, case, dtype, backend)
                    found.append(Step(about, partial(_row, about, run)))
    return found


def _row(about: Row, run: partial[dict[str, float]]) -> list[Row]:
    try:
        errors = run()
    except ValueError as error:
        if refuses(error):
            return []
        raise
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
    right = all(error <= 1 for error in errors.values())
    return [{**about, "right": right, "error": None, "off": errors[worst], "worst": worst}]


def deviations(
    device: torch.device, operation: Operation, case: Case, dtype: torch.dtype, backend: str
) -> dict[str, float]:
    """How far each output and gradient is off, in tolerances."""
    given, options = operation.make_inputs(case, dtype=dtype, device="cpu")
    call = operation.checked or operation.timed
    defined = operation.reference or partial(operation.timed, backend="reference")
    exact = tuple(t.double() if t.is_floating_point() else t for t in given)
    places = operation.places(given)
    truth = _outputs_and_gradients(partial(defined, **options), exact, places)
    here = tuple(t.to(device) for t in given)
    moved: Options = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()
    }
    got = _outputs_and_gradients(partial(call, backend=backend, **moved), here, places)
    tolerance = operation.slack * ROUNDINGS[dtype] * torch.finfo(dtype).eps
    return {name: _error(got[name], truth[name]) / tolerance for name in truth}


def _outputs_and_gradients(
    call: partial[object], given: Tensors, places: tuple[int, ...]
) -> dict[str, Tensor]:
    """By name, on the CPU in float64; cotangents are drawn anew with the same seed."""
    inputs = [t.detach().requires_grad_(n in places) for n, t in enumerate(given)]
    made = call(*inputs)
    outputs: Tensors = made if isinstance(made, tuple) else (made,)
    found = {f"output {n}": t for n, t in enumerate(outputs)}
    if places:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(torch.bfloat16).to(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in places], cotangents)
        found |= {f"gradient {n}": t for n, t in zip(places, gradients, strict=True)}
    return {name: t.detach().cpu().double() for name, t in found.items()}


def _error(got: Tensor, truth: Tensor) -> float:
    """The largest deviation, relative to the largest true value."""
    if got.shape != truth.shape:
        raise ValueError(f"shape {tuple(got.shape)}: must be {tuple(truth.shape)}")
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
