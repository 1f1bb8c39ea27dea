"""Speed of every operation beside public implementations, forward alone and forward with backward.

Rows hold what was measured and what the work is; shares of the floor and ratios are computed in `report.py`. The
backward pass is what both take beyond the forward pass: some operations make their gradients in the forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.operation import Operation
from benchmarks.gpu.operations import OPERATIONS
from benchmarks.gpu.peers import Options, Peer, Tensors
from benchmarks.gpu.steps import Row, Setting, Step, refuses
from megatrain_kernels.kernel import Case, Cost


class Inputs:
    """Inputs of the latest case, which several steps share: the largest take gigabytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: tuple[str, str] | None = None
        self._made: tuple[Tensors, Options] = ((), {})

    def of(self, operation: Operation, case: Case) -> tuple[Tensors, Options]:
        """Tensors and options."""
        if self._key != (operation.name, case.name):
            self._key, self._made = None, ((), {})  # frees the last one's memory first
            self._made = operation.make_inputs(case, dtype=operation.timed_dtype, device=str(self._device))
            self._key = (operation.name, case.name)
        return self._made


def steps(setting: Setting) -> list[Step]:
    """One step for each operation, case and implementation; those that torch.compile makes come last."""
    inputs = Inputs(setting.device)
    found: list[Step] = []
    on_gpu = setting.device.type == "cuda"
    for compiled in (False, True) if on_gpu else (False,):
        for operation in OPERATIONS:
            for case in operation.small if setting.small else operation.cases:
                about = {
                    "operation": operation.name,
                    "case": case.name,
                    "dtype": str(operation.timed_dtype).removeprefix("torch."),
                }
                if not compiled:
                    for backend in operation.backends if on_gpu else ("auto",):
                        who = {**about, "implementation": f"megatrain {backend}"}
                        found.append(
                            Step(who, partial(_ours, setting, inputs, operation, case, backend, who))
                        )
                for name, peer in operation.peers.items():
                    if peer.compiled == compiled:
                        who = {**about, "implementation": name}
                        found.append(Step(who, partial(_theirs, setting, inputs, operation, case, peer, who)))
    return found


def _ours(
    setting: Setting, inputs: Inputs, operation: Operation, case: Case, backend: str, about: Row
) -> list[Row]:
    tensors, options = inputs.of(operation, case)
    run = partial(operation.timed, backend=backend, **options)
    try:
        return _rows(setting, operation, case, run, tensors, about)
    except ValueError as error:
        if refuses(error):
            return []
        raise


def _theirs(
    setting: Setting, inputs: Inputs, operation: Operation, case: Case, peer: Peer, about: Row
) -> list[Row]:
    tensors, options = inputs.of(operation, case)
    torch._dynamo.reset()  # else the number of shapes that it has compiled counts against the next
    run = peer.make(tensors, options)
    return [] if run is None else _rows(setting, operation, case, run, tensors, about)


def _rows(
    setting: Setting, operation: Operation, case: Case, run: Callable[..., Any], given: Tensors, about: Row
) -> list[Row]:
    """A row for the forward pass without gradients, and one for both passes."""
    cost = partial(operation.cost, case, itemsize=operation.timed_dtype.itemsize)
    with torch.no_grad():
        ms = setting.clock.median_ms(lambda: run(*given))
    rows = [_row(about, "forward", ms, cost(), operation)]
    if not operation.gradients:
        return rows
    places = operation.places(given)
    inputs = [t.detach().requires_grad_(n in places) for n, t in enumerate(given)]
    wanted = [inputs[n] for n in places]
    cotangents: list[torch.Tensor] = []

    def both() -> None:
        made = run(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        if not cotangents:
            cotangents.extend(torch.randn_like(t) for t in outputs)
        torch.autograd.grad(outputs, wanted, cotangents)

    ms = setting.clock.median_ms(both)
    whole = cost() + cost(backward=True)
    return [*rows, {**_row(about, "both", ms, whole, operation), "peak_bytes": _peak(setting.device, both)}]


def _row(about: Row, passes: str, ms: float, cost: Cost, operation: Operation) -> Row:
    figures = {"ms": ms, "flops": cost.flops, "bytes": cost.bytes, "ceiling": operation.ceiling}
    return {**about, "passes": passes, **figures}


def _peak(device: torch.device, run: Callable[[], None]) -> int | None:
    """Bytes that `run` holds at most beyond what is there before it; None: no GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return int(torch.cuda.max_memory_allocated(device) - before)
