"""Inputs of the optimizer's update for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.dynamic_map import encode, n_blocks
from megatrain_kernels.kernel import Case, Cost, Suite, sized
from megatrain_kernels.optimizer.reference import Update, optimizer_step_reference, whole

_case = partial(sized, "parameters rows columns")
RULES = {
    "adamw": Update("adamw", 1e-3, 0.1, 0.9, 0.95, 1e-8),
    "lion": Update("lion", 1e-4, 1.0, 0.9, 0.99),
    "sgd": Update("sgd", 0.1, 0.01, 0.9, nesterov=True),
}
CASES = [
    _case("llama3_1b", "16 8192 2048", rule="adamw"),
    _case("llama3_1b_masters", "16 8192 2048", rule="adamw", copies=True),
    _case("llama3_1b_bf16", "16 8192 2048", rule="adamw", states="bf16", stochastic=True),
    _case("llama3_1b_int8", "16 8192 2048", rule="adamw", states="int8"),
    _case("many_small", "512 128 256", rule="adamw", copies=True),
    _case("llama3_1b_lion", "16 8192 2048", rule="lion"),
    _case("llama3_1b_lion_int8", "16 8192 2048", rule="lion", states="int8"),
    _case("llama3_1b_sgd", "16 8192 2048", rule="sgd"),
]
"""Weights, gradients and full states are float32; copies have the type that is asked for."""
SMALL = [
    _case("adamw", "3 17 150", rule="adamw", clipped=False),
    _case("adamw_masters", "3 17 150", rule="adamw", copies=True),
    _case("adamw_bf16", "2 17 150", rule="adamw", states="bf16"),
    _case("adamw_stochastic", "2 17 256", rule="adamw", states="bf16", stochastic=True),
    _case("adamw_int8", "2 17 150", rule="adamw", states="int8", copies=True),
    _case("lion", "2 17 150", rule="lion"),
    _case("lion_int8", "2 17 256", rule="lion", states="int8"),
    _case("sgd", "2 17 150", rule="sgd"),
    _case("sgd_bf16", "2 17 150", rule="sgd", states="bf16", stochastic=True),
]


def _how(case: Case) -> Update:
    options = {name: value for name, value in case.options.items() if name not in ("rule", "clipped")}
    return RULES[case.options["rule"]]._replace(**options)


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Draw parameters whose states are those of the middle of a run, at update 10."""
    n, how = case.sizes, _how(case)
    generator = torch.Generator(device).manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(n["rows"], n["columns"], generator=generator, device=device)

    columns: dict[str, list[Tensor]] = {name: [] for name in how.fields}
    for _ in range(n["parameters"]):
        made = {"weight": drawn(), "gradient": drawn(), "step": torch.tensor(9.0, device=device)}
        made["copy"] = made["weight"].to(dtype)
        for moment, name in enumerate(how.moments):
            state = 0.1 * drawn()
            state = state.square() if moment else state
            made[name] = state.bfloat16() if how.states == "bf16" else state
            if how.states == "int8":
                made[name], made[f"{name}_scale"] = encode(state, signed=moment == 0)
                made[name] = made[name].contiguous()
        for name, tensors in columns.items():
            tensors.append(made[name])
    clip = torch.tensor(0.5, device=device) if case.options.get("clipped", True) else None
    return tuple(t for tensors in columns.values() for t in tensors), {"how": how, "clip": clip}


def truth(*tensors: Tensor, how: Update, clip: Tensor | None) -> tuple[Tensor, ...]:
    """Return what the weights and their copies become, in float64."""
    count = len(tensors) // len(how.fields)
    made: list[dict[str, Tensor]] = []
    for number in range(count):
        parameter = dict(zip(how.fields, (t.clone() for t in tensors[number::count]), strict=True))
        for name in ("weight", "gradient", "copy"):
            if name in parameter:
                parameter[name] = parameter[name].double()
        if "step" in parameter:
            parameter["step"] += 1
        optimizer_step_reference(parameter, how, whole(parameter["weight"].shape, number), clip)
        made.append(parameter)
    return tuple(each[name] for name in ("weight", "copy") if name in how.fields for each in made)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes that are read and written: there are no matrix products, and there is no backward pass.

    A weight and its states are read and written, its gradient is read, its copy written. A count of updates is read
    twice and written once.
    """
    if backward:
        return Cost(0.0, 0.0)
    n, how = case.sizes, _how(case)
    elements = n["parameters"] * n["rows"] * n["columns"]
    scales = n["parameters"] * n["rows"] * n_blocks(n["columns"])
    state = {"full": 4, "bf16": 2, "int8": 1}[how.states] * elements + 4 * scales * (how.states == "int8")
    moved = 12 * elements + 2 * len(how.moments) * state + itemsize * how.copies * elements
    return Cost(0.0, float(moved + 12 * n["parameters"] * how.is_counted))


SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, truth=truth)
