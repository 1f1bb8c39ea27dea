"""Every operation against its definition in float64 on the same device: each element of results and gradients.

Each candidate of a kernel's tuning is checked, over memory that held NaN before; and a kernel of ours must give the
same bits twice where PyTorch is told to be deterministic.
"""

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.attention_truth import attention_truth
from benchmarks.gpu.bounds import BOUNDS
from benchmarks.gpu.long_cases import LONG
from benchmarks.gpu.poison import deterministic, fill_free_memory
from benchmarks.gpu.rounding import excess, rounding
from benchmarks.gpu.steps import Row, Setting, Step
from benchmarks.gpu.tuning import candidate
from megatrain_kernels.backend import interpreting
from megatrain_kernels.kernel import KERNELS, Case, Kernel, UnsupportedError
from megatrain_kernels.quantization.reference import unpack

DTYPES = (torch.bfloat16, torch.float32)
WHOLE = 4
"""Roundings of the type that an element may be off, relative to the largest of its tensor, where no bound per element
is known."""
MOST_CANDIDATES = 12
"""Of which correctness is checked."""
TRIES, PAUSE_S = 4, 3.0

Tensors = dict[str, Tensor]
"""Outputs and gradients by name, in float64."""


class Check(NamedTuple):
    """What is called, and how."""

    kernel: Kernel
    case: Case
    dtype: torch.dtype
    backend: str
    lse: bool = False
    """Whether attention returns its log-sum-exp too, which then has a gradient of its own."""


def steps(setting: Setting) -> list[Step]:
    """List one step for each operation, case, type and backend: the longest first, then what training computes in."""
    found = []
    for check in _checks(setting):
        about = {
            "operation": check.kernel.name,
            "case": check.case.name,
            "dtype": str(check.dtype).removeprefix("torch."),
            "backend": check.backend,
            "lse": check.lse,
        }
        found.append(Step(about, partial(_row, about, setting.device, check)))
    return found


def _checks(setting: Setting) -> Iterator[Check]:
    on_gpu = setting.device.type == "cuda"
    on_triton = on_gpu or interpreting()
    if on_gpu and not setting.small:
        for kernel in KERNELS.values():
            dtype = kernel.suite.dtypes[0]
            for case in LONG.get(kernel.name, ()):
                yield from _backends(kernel, case, dtype, on_triton)
    for dtype in DTYPES:
        for kernel in KERNELS.values():
            for case in kernel.suite.small if dtype in kernel.suite.dtypes else ():
                yield from _backends(kernel, case, dtype, on_triton)


def _backends(kernel: Kernel, case: Case, dtype: torch.dtype, on_triton: bool) -> Iterator[Check]:
    """Yield what "auto" takes, and each implementation of ours; attention's with its log-sum-exp."""
    attention = kernel.name == "attention"
    yield Check(kernel, case, dtype, "auto")
    if on_triton:
        for backend in dict.fromkeys(("triton", *kernel.suite.timed_backends)):
            if backend != "auto":
                yield Check(kernel, case, dtype, backend, lse=attention)
    elif attention:
        yield Check(kernel, case, dtype, "auto", lse=True)


def _row(about: Row, device: torch.device, check: Check) -> list[Row]:
    try:
        errors, facts = _with_patience(partial(deviations, device, check))
    except UnsupportedError:
        return []  # there is no kernel for this input: no failure
    worst = max(errors, key=errors.__getitem__)
    right = errors[worst] <= 1 and (facts["same_bits"] or check.backend == "auto")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes need it
    return [{**about, "right": right, "off": errors[worst], "worst": worst, **facts}]


def _with_patience(run: Callable[[], tuple[dict[str, float], Row]]) -> tuple[dict[str, float], Row]:
    """Run it, anew where memory is short beside the other processes."""
    for _ in range(TRIES - 1):
        try:
            return run()
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(PAUSE_S)
    return run()


def deviations(device: torch.device, check: Check) -> tuple[dict[str, float], Row]:
    """Return how far each output and gradient is off, in what each of its elements may be; and facts of the calls.

    The facts are "candidates", the number of candidates of tuning that were run, and "same_bits", whether two calls
    gave the same.
    """
    kernel, suite = check.kernel, check.kernel.suite
    given, options = suite.make_inputs(check.case, dtype=check.dtype, device=str(device))
    places = tuple(n for n in suite.gradients if n < len(given) and given[n] is not None)
    named = {**options, **({"return_lse": True} if check.lse else {})}
    call = partial(
        _outputs_and_gradients, partial(kernel.function, backend=check.backend, **named), given, places
    )
    size = 8 * sum(value.nbytes for value in given if isinstance(value, Tensor)) + (64 << 20)
    fill_free_memory(device, size)
    got, seen = _with_candidate(call, 0)
    truth, allowed = _truth(check, given, options, places, got)
    errors = {name: _excess(got[name], truth[name], allowed.get(name), check) for name in truth}

    def compare(again: Tensors) -> None:
        for name in truth:
            off = _excess(again[name], truth[name], allowed.get(name), check)
            errors[name] = max(errors[name], off)

    for number in range(1, min(seen, MOST_CANDIDATES)):
        fill_free_memory(device, size)
        compare(_with_candidate(call, number)[0])
    with deterministic():
        one, other = (_with_candidate(call, 0)[0] for _ in range(2))
    compare(one)
    same = all(torch.equal(one[name], other[name]) for name in one)
    return errors, {"candidates": min(seen, MOST_CANDIDATES), "same_bits": same}


def _with_candidate(call: partial[Tensors], number: int) -> tuple[Tensors, int]:
    with candidate(number) as seen:
        found = call()
    return found, seen.candidates


def _truth(
    check: Check, given: tuple[Any, ...], options: Row, places: tuple[int, ...], got: Tensors
) -> tuple[Tensors, Tensors]:
    """Return the true results, and what each of their elements may be off where a bound is known."""
    kernel, suite = check.kernel, check.kernel.suite
    on_cpu = given[0].device.type == "cpu"
    # Attention for training on a CPU rounds its scores too.
    widened = kernel.name != "attention" or check.lse or check.backend != "auto" or not on_cpu
    r = rounding(check.dtype, widened=widened)
    if kernel.name == "attention":
        grads = [_cotangent(got[f"output {n}"], n) for n in range(1 + check.lse)]
        found = attention_truth(given, options, grads[0], grads[1] if check.lse else None, r)
        kept = {name: each for name, each in found.items() if name in got}
        return {name: t for name, (t, _) in kept.items()}, {name: t for name, (_, t) in kept.items()}
    exact = given if suite.truth else tuple(map(_widened, given))
    defined = suite.truth or partial(kernel.function, backend="reference")
    truth = _outputs_and_gradients(partial(defined, **options), exact, places)
    if kernel.name not in BOUNDS:
        return truth, {}
    wide = tuple(map(_widened, given))
    grads = [
        _cotangent(truth[f"output {n}"], n) for n in range(sum(name.startswith("output") for name in truth))
    ]
    sizes = {}
    if kernel.name == "scaled_matmul":
        sizes["size"] = defined(*(t.abs() for t in wide), **options)
    return truth, BOUNDS[kernel.name](wide, options, grads, {**truth, **sizes}, r)


def _excess(got: Tensor, truth: Tensor, allowed: Tensor | None, check: Check) -> float:
    """Return the largest deviation in what is allowed, by element or else by the tensor's largest one."""
    if allowed is None:
        whole = check.kernel.suite.slack * WHOLE * torch.finfo(check.dtype).eps
        allowed = whole * truth.abs().max().expand_as(truth)
    return excess(got, truth, allowed)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _outputs_and_gradients(call: partial[Any], given: tuple[Any, ...], places: tuple[int, ...]) -> Tensors:
    """Return outputs and gradients by name, in float64.

    Indices (int64) are left out, since of equal numbers any may be the first. The same cotangents are drawn each time.
    """
    # Copies: an optimizer's step writes over what it is given.
    inputs = [
        t.detach().clone().requires_grad_(n in places) if isinstance(t, Tensor) else t
        for n, t in enumerate(given)
    ]
    made = call(*inputs)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.dtype != torch.int64]
    found = {f"output {n}": t for n, t in enumerate(outputs)}
    if places:
        cotangents = [_cotangent(t, n) for n, t in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in places], cotangents)
        found |= {f"gradient {n}": t for n, t in zip(places, gradients, strict=True)}
    packed = call.keywords.get("dtype") == "int4"
    return {
        name: (unpack(t) if packed and t.dtype == torch.uint8 else t).detach().double()
        for name, t in found.items()
    }


def _cotangent(like: Tensor, number: int) -> Tensor:
    """Draw the gradient of the output of that number, exact in bfloat16, in the type and on the device of `like`."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(1 + number))
    return drawn.to(torch.bfloat16).to(like)
