"""Every operation on the device against its definition in float64 on the CPU: results and gradients."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.steps import Row, Setting, Step
from megatrain_kernels.backend import interpreting
from megatrain_kernels.kernel import KERNELS, Case, Kernel, UnsupportedError

ROUNDINGS = {torch.bfloat16: 4, torch.float32: 64}
"""How many roundings of the input's type an element may be off, relative to the largest of its tensor.

Sums are float32 inside, so bf16 sees its own few roundings only, and float32 those of sums over a few hundred terms.
"""


def steps(setting: Setting) -> list[Step]:
    """List one step for each operation, case, type and backend."""
    on_triton = setting.device.type == "cuda" or interpreting()
    backends = ("auto", "triton") if on_triton else ("auto",)
    found = []
    for dtype in ROUNDINGS:  # what training computes in comes first: time may be short
        for kernel in KERNELS.values():
            for case in kernel.suite.small if dtype in kernel.suite.dtypes else ():
                for backend in backends:
                    about = {
                        "operation": kernel.name,
                        "case": case.name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                    }
                    run = partial(deviations, setting.device, kernel, case, dtype, backend)
                    found.append(Step(about, partial(_row, about, run)))
    return found


def _row(about: Row, run: partial[dict[str, float]]) -> list[Row]:
    try:
        errors = run()
    except UnsupportedError:
        return []  # there is no kernel for this input: no failure
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst
    right = all(error <= 1 for error in errors.values())
    return [{**about, "right": right, "error": None, "off": errors[worst], "worst": worst}]


def deviations(
    device: torch.device, kernel: Kernel, case: Case, dtype: torch.dtype, backend: str
) -> dict[str, float]:
    """Return how far each output and gradient is off, in tolerances."""
    suite = kernel.suite
    given, options = suite.make_inputs(case, dtype=dtype, device="cpu")
    places = tuple(n for n in suite.gradients if n < len(given) and given[n] is not None)
    exact = given if suite.truth else tuple(map(_widened, given))
    defined = suite.truth or partial(kernel.function, backend="reference")
    truth = _outputs_and_gradients(partial(defined, **options), exact, places)
    here = tuple(_moved(value, device) for value in given)
    moved = {key: _moved(value, device) for key, value in options.items()}
    got = _outputs_and_gradients(partial(kernel.function, backend=backend, **moved), here, places)
    tolerance = suite.slack * ROUNDINGS[dtype] * torch.finfo(dtype).eps
    return {name: _error(got[name], truth[name]) / tolerance for name in truth}


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _outputs_and_gradients(
    call: partial[Any], given: tuple[Any, ...], places: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return outputs and gradients by name, on the CPU in float64.

    Indices (int64) are left out, since of equal numbers any may be the first. The same cotangents are drawn each time.
    """
    inputs = [
        t.detach().requires_grad_(n in places) if isinstance(t, Tensor) else t for n, t in enumerate(given)
    ]
    made = call(*inputs)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.dtype != torch.int64]
    found = {f"output {n}": t for n, t in enumerate(outputs)}
    if places:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(torch.bfloat16).to(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in places], cotangents)
        found |= {f"gradient {n}": t for n, t in zip(places, gradients, strict=True)}
    return {name: t.detach().cpu().double() for name, t in found.items()}


def _error(got: Tensor, truth: Tensor) -> float:
    """Return the largest deviation, relative to the largest true value."""
    if got.shape != truth.shape:
        raise ValueError(f"shape {tuple(got.shape)}: must be {tuple(truth.shape)}")
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
