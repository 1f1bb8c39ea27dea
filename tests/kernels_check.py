"""Small calls of every operation, which path a call takes, and arguments that do not fit."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import KERNELS, Kernel

DEFINITION_IS_FASTEST = {"quantize", "dequantize", "moe_gate", "scaled_matmul"}
"""Operations whose definition is also what PyTorch's path runs on a CPU."""
TRITON_OF = {"linear_cross_entropy": "xent"}
"""Operations that run another folder's kernels."""


@dataclass(frozen=True)
class Call:
    """One call of an operation."""

    kernel: Kernel
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, backend: str = "auto") -> list[Tensor]:
        """Return the outputs."""
        made = self.kernel.function(*self.args, **self.options, backend=backend)
        return list(made) if isinstance(made, tuple) else [made]


def calls() -> dict[str, Call]:
    """Each operation once for each of its small cases, with sizes up to 8."""
    found = {}
    for name, kernel in KERNELS.items():
        for case in kernel.suite.small:
            sizes = {key: min(size, 8) for key, size in case.sizes.items()}
            small = type(case)(
                case.name, sizes, {**case.options, **({"window": 3} if "window" in case.options else {})}
            )
            if "q_offset" in small.options:
                small.options["q_offset"] = 0
            args, options = kernel.suite.make_inputs(small, dtype=torch.float32, device="cpu")
            found[f"{name} {case.name}"] = Call(kernel, args, options)
    gate = found["moe_gate softmax"]
    found["moe_gate bias"] = Call(gate.kernel, (*gate.args, torch.zeros(8)), gate.options)
    return found


CALLS = calls()


def executed(call: Callable[[], object]) -> set[CodeType]:
    """Return the code of every Python function that runs while `call` does."""
    found = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def path_taken(kernel: Kernel, call: Callable[[], object]) -> str:
    """Return "triton", "reference" or "torch", by the functions that ran."""
    code = executed(call)
    folder = TRITON_OF.get(kernel.name, kernel.function.__module__.split(".")[1])
    if any(each.co_filename.endswith(f"/{folder}/triton.py") for each in code):
        assert kernel.reference.__code__ not in code
        return "triton"
    return "reference" if kernel.reference.__code__ in code else "torch"


def longer(x: Tensor, dim: int) -> Tensor:
    """Return x with its first slice along `dim` twice."""
    if x.itemsize == 1:
        return longer(x.view(torch.uint8).int(), dim).to(torch.uint8).view(x.dtype)
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


def wrong(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield x changed in one way each."""
    yield "a dimension more", x.unsqueeze(0)
    if x.ndim:
        yield "a dimension less", x[0]
    for dim in range(x.ndim):
        yield f"longer along {dim}", longer(x, dim)
    yield (
        "a whole number" if x.is_floating_point() else "a fraction",
        x.to(torch.int32 if x.is_floating_point() else torch.float32),
    )
    yield "a wider type", x.to(torch.float64 if x.is_floating_point() else torch.int32)
    yield "another device", x.to("meta")


def changed_calls(call: Call) -> Iterator[tuple[str, Call]]:
    """Yield the call with one argument changed in one way each."""
    for n, value in enumerate(call.args):
        if isinstance(value, Tensor):
            for how, x in wrong(value):
                yield f"{n}: {how}", Call(call.kernel, (*call.args[:n], x, *call.args[n + 1 :]), call.options)
    for key, value in call.options.items():
        if isinstance(value, Tensor):
            for how, x in wrong(value):
                yield f"{key}: {how}", Call(call.kernel, call.args, {**call.options, key: x})


def refusal(call: Call, backend: str) -> str | None:
    """Return what is said of a call that does not fit; None: it is accepted."""
    try:
        call.run(backend)
    except ValueError as error:
        return str(error)
    return None


def break_module(folder: Path, source: str) -> Any:
    """Return a module of that source, imported from a file (Triton reads kernels' sources)."""
    path = folder / "broken.py"
    path.write_text(source)
    spec = spec_from_file_location("broken", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
