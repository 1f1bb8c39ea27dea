"""Compile what is timed later, by many processes at once, so that the timing finds it in the caches on disk.

Each step runs one case's real calls once, so that their kernels have the very signatures that are timed. What is not
done in time is compiled when it is timed.
"""

import gc
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu import training
from benchmarks.gpu.peers import Peer, peers_of
from benchmarks.gpu.speed import in_turn, most_important, passes
from benchmarks.gpu.steps import Row, Setting, Step
from benchmarks.gpu.tuning import compiling
from megatrain_kernels.kernel import Case, Kernel, UnsupportedError

THIRDS = 3
"""Attention's candidates are compiled by three processes: one after the other they take half a minute and more."""


def steps(setting: Setting) -> list[Step]:
    """List the steps in the order in which their kernels are timed."""
    on_gpu = setting.device.type == "cuda"
    first = most_important(setting.small)
    pairs = sorted(in_turn(setting.small), key=lambda pair: pair[1] is not first)
    found = [step for kernel, case in pairs if case is first for step in _of_case(setting, kernel, case)]
    found += [_step(setting, {"model": name}, partial(run, setting)) for name, run in training.ahead()]
    found += [step for kernel, case in pairs if case is not first for step in _of_case(setting, kernel, case)]
    for kernel, case in pairs if on_gpu else ():
        for name, peer in peers_of(kernel).items():
            if peer.compiled or peer.package:
                about = {"operation": kernel.name, "case": case.name, "implementation": name}
                found.append(_step(setting, about, partial(_their_passes, setting, kernel, case, peer)))
    return found


def _of_case(setting: Setting, kernel: Kernel, case: Case) -> list[Step]:
    """List the steps of our own kernels; what "auto" takes beside them is compiled already, or these."""
    on_gpu = setting.device.type == "cuda"
    thirds = THIRDS if kernel.name == "attention" and on_gpu else 1
    backends = [name for name in kernel.suite.timed_backends if name != "auto"] if on_gpu else ["auto"]
    return [
        _step(
            setting,
            {
                "operation": kernel.name,
                "case": case.name,
                "backend": backend,
                "candidates": f"{third + 1} of {thirds}",
            },
            partial(_our_passes, setting, kernel, case, backend, (third, thirds)),
        )
        for backend in backends
        for third in range(thirds)
    ]


def _step(setting: Setting, about: Row, run: Callable[[], None]) -> Step:
    return Step(about, partial(_timed, setting, about, run))


def _timed(setting: Setting, about: Row, run: Callable[[], None]) -> list[Row]:
    """Run it and say how long it took; memory is short where many processes share a GPU, which is no error."""
    started, note = time.perf_counter(), None
    try:
        run()
    except torch.OutOfMemoryError:
        note = "memory was short beside the other processes"
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return [{**about, "seconds": round(time.perf_counter() - started, 2), "note": note}]


def _our_passes(setting: Setting, kernel: Kernel, case: Case, backend: str, third: tuple[int, int]) -> None:
    suite = kernel.suite
    given, options = suite.make_inputs(case, dtype=suite.timed_dtype, device=str(setting.device))
    run = partial(kernel.function, backend=backend, **options)
    try:
        with compiling(*third):
            for call in passes(suite, run, given).values():
                call()
    except UnsupportedError:
        pass  # nothing is timed either


def _their_passes(setting: Setting, kernel: Kernel, case: Case, peer: Peer) -> None:
    suite = kernel.suite
    given, options = suite.make_inputs(case, dtype=suite.timed_dtype, device=str(setting.device))
    torch._dynamo.reset()
    run = peer.make(given, options)
    if run is not None:
        for call in passes(suite, run, peer.given(given)).values():
            call()
