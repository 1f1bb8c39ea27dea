"""The kernel of a group's update: what PyTorch's path computes, with the same random bits and the same codes."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatrain_kernels import optimizer_step
from megatrain_kernels.dynamic_map import dynamic_map, encode, map_edges
from megatrain_kernels.optimizer import triton as kernels
from megatrain_kernels.optimizer.reference import Place, Update, whole

ADAMW = Update("adamw", 1e-2, 0.1, 0.9, 0.999, 1e-8)
LION = Update("lion", 1e-3, 0.5, 0.9, 0.99)
SGD = Update("sgd", 0.05, 0.01, 0.9)
SHAPES = [(17, 150), (33,), (3, 5, 256), (0, 256), (1, 1), (9, 384)]
STATES = {"full": torch.float32, "bf16": torch.bfloat16}
ROUNDING = 1e-6
"""A few roundings of float32: sums in another order."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(how: Update, shapes: list[Any], copy: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    made: dict[str, list[Tensor]] = {name: [] for name in how.fields}
    for seed, shape in enumerate(shapes):
        found = {"weight": draw(seed, *shape), "gradient": draw(seed + 50, *shape), "step": torch.tensor(9.0)}
        found["copy"] = found["weight"].to(copy)
        for number, name in enumerate(how.moments):
            state = draw(seed + 100 * number, *shape) * 0.1
            state = state.square() if number else state
            if how.states == "int8":
                codes, scales = encode(state.reshape(-1, shape[-1]), signed=number == 0)
                found[name] = codes.reshape(shape).contiguous()
                found[f"{name}_scale"] = scales.view(*shape[:-1], -(-shape[-1] // 128))
            else:
                found[name] = state.to(STATES[how.states])
        for name, tensors in made.items():
            tensors.append(found[name])
    return made


def both(how: Update, shapes: list[Any], **options: Any) -> list[dict[str, list[Tensor]]]:
    """The group after two updates by PyTorch and by Triton."""
    found = []
    for backend in ("torch", "triton"):
        made = columns(how, shapes)
        for step in range(2):
            made["gradient"] = [draw(step + 50 + n, *shape) for n, shape in enumerate(shapes)]
            tensors = (t for name in how.fields for t in made[name])
            optimizer_step(*tensors, how=how, backend=backend, **options)
        found.append(made)
    return found


RULES = [ADAMW, LION, SGD, SGD._replace(nesterov=True), SGD._replace(beta1=0.0), ADAMW._replace(copies=True)]


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("shapes", [SHAPES, [(4, 256), (128,)]], ids=["uneven", "even"])
@pytest.mark.parametrize("how", RULES, ids=str)
def test_full_states(how: Update, shapes: list[Any], clip: float | None) -> None:
    factor = None if clip is None else torch.tensor(clip, dtype=torch.float64)
    by_torch, by_triton = both(how, shapes, clip=factor)
    for name in how.fields:
        for mine, other in zip(by_triton[name], by_torch[name], strict=True):
            if name != "gradient":
                torch.testing.assert_close(mine, other, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("shapes", [SHAPES, [(4, 256), (9, 128)]], ids=["uneven", "even"])
@pytest.mark.parametrize("how", [ADAMW, LION, SGD], ids=lambda how: how.rule)
@pytest.mark.parametrize("states", ["int8", "bf16"])
def test_codes_and_random_bits_are_the_same(how: Update, states: str, shapes: list[Any]) -> None:
    """A state that rounding has moved over an edge would be off by one; these numbers have none."""
    how = how._replace(states=states, stochastic=states == "bf16")
    by_torch, by_triton = both(how, shapes)
    for moment in how.moments:
        for n in range(len(shapes)):
            assert torch.equal(by_triton[moment][n], by_torch[moment][n]), moment
    for mine, other in zip(by_triton["weight"], by_torch["weight"], strict=True):
        torch.testing.assert_close(mine, other, rtol=ROUNDING, atol=ROUNDING)


def test_a_shard_draws_the_bits_of_its_place() -> None:
    how = LION._replace(states="bf16", stochastic=True)
    place = Place(key=-77, columns=20, first=2**40 + 5, plane_rows=3, row_step=50, plane_step=900)
    by_torch, by_triton = both(how, [(2, 3, 20)], places=[place])
    elsewhere, _ = both(how, [(2, 3, 20)], places=[whole((2, 3, 20), -77)])
    assert torch.equal(by_triton["exp_avg"][0], by_torch["exp_avg"][0])
    assert not torch.equal(by_torch["exp_avg"][0], elsewhere["exp_avg"][0])


@pytest.mark.parametrize("signed", [True, False])
def test_every_edge_of_the_map(signed: bool) -> None:
    """Numbers on each edge, beside it, and in between: through the kernel's own search."""
    cpu = torch.device("cpu")
    edges = map_edges(signed, cpu)[1:-1]
    values = torch.cat(
        [edges, edges.nextafter(edges - 1), edges.nextafter(edges + 1), dynamic_map(signed, cpu)]
    )
    values = values[values.abs() <= 1]
    values = values if signed else values[values >= 0]
    state = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    state = torch.cat([torch.ones(len(state), 1), state], 1)  # so that each block's scale is 1
    # Without decay a state is the gradient, and a second one its square.
    how = (
        Update("lion", 0.0, beta2=0.0, states="int8")
        if signed
        else Update("adamw", 0.0, eps=1e-8, states="int8")
    )
    gradient = state if signed else state.sqrt()
    wanted, _ = encode(state if signed else gradient * gradient, signed=signed)
    made = columns(how, [tuple(state.shape)])
    made["gradient"] = [gradient]
    for name in how.moments:
        made[f"{name}_scale"][0].zero_()
    optimizer_step(*(t for name in how.fields for t in made[name]), how=how, backend="triton")
    assert torch.equal(made[how.moments[-1]][0], wanted)


def test_addresses_that_are_no_multiple_of_sixteen() -> None:
    how = SGD
    weight, gradient, buffer = (draw(n, 257)[1:] for n in range(3))
    copies = [t.clone() for t in (weight, gradient, buffer)]
    optimizer_step(weight, gradient, buffer, how=how, backend="triton")
    optimizer_step(*copies, how=how, backend="torch")
    torch.testing.assert_close(weight, copies[0], rtol=ROUNDING, atol=ROUNDING)


def test_a_group_is_one_launch() -> None:
    launches = []
    kernel = kernels.step_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return kernel[grid]

    with mock.patch.object(kernels, "step_kernel", Counted()):
        made = columns(ADAMW, SHAPES)
        optimizer_step(*(t for name in ADAMW.fields for t in made[name]), how=ADAMW, backend="triton")
    assert len(launches) == 1
