"""One update of a group of parameters against formulas in float64, torch's optimizers, and itself cut into shards."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatrain.runtime.rng import random_bits, stream_key
from megatrain_kernels import optimizer_step
from megatrain_kernels.dynamic_map import decode, encode, n_blocks
from megatrain_kernels.kernel import KERNELS
from megatrain_kernels.optimizer.reference import Place, Update, whole
from megatrain_kernels.stochastic import element_bits, round_to_bfloat16, splitmix

ADAMW = Update("adamw", 1e-2, 0.1, 0.9, 0.95, 1e-8)
LION = Update("lion", 1e-3, 0.5, 0.9, 0.99)
SGD = Update("sgd", 0.05, 0.01, 0.9)
SHAPES = [(17, 150), (33,), (3, 5, 256)]
DTYPES = {"full": None, "bf16": torch.bfloat16}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def group(how: Update, shapes: list[Any], dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Weights, and their states before the first update."""
    made: dict[str, list[Tensor]] = {name: [] for name in how.fields}
    for seed, shape in enumerate(shapes):
        weight = draw(seed, *shape, dtype=dtype)
        found = {"weight": weight, "gradient": weight, "step": torch.tensor(0.0), "copy": weight.bfloat16()}
        for number, name in enumerate(how.moments):
            found[name] = torch.zeros_like(weight, dtype=DTYPES.get(how.states))
            if how.states == "int8":
                rows = weight.view(-1, shape[-1])
                codes, scales = encode(torch.zeros_like(rows), signed=number == 0)
                found[name] = codes.contiguous().view(shape)
                found[f"{name}_scale"] = scales.view(*shape[:-1], n_blocks(shape[-1]))
        for name, tensors in made.items():
            tensors.append(found[name])
    return made


def run(
    how: Update, tensors: dict[str, list[Tensor]], seed: int, backend: str = "auto", **options: Any
) -> None:
    """Take one update with gradients that `seed` draws."""
    weights = tensors["weight"]
    tensors["gradient"] = [draw(seed + n, *w.shape, dtype=w.dtype) for n, w in enumerate(weights)]
    optimizer_step(*(t for name in how.fields for t in tensors[name]), how=how, backend=backend, **options)


def formula(how: Update, weight: Tensor, gradients: list[Tensor], rounded: Any) -> Tensor:
    """The published rules in float64, states passed through `rounded(state, number)` after each update."""
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        if how.rule == "adamw":
            first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
            hat = (second / (1 - 0.95**count)).sqrt() + how.eps
            weight = weight - how.lr * how.weight_decay * weight - how.lr * (first / (1 - 0.9**count)) / hat
        elif how.rule == "lion":
            direction = torch.sign(0.9 * first + 0.1 * g)
            weight = weight - how.lr * (direction + how.weight_decay * weight)
            first = 0.99 * first + 0.01 * g
        else:
            g = g + how.weight_decay * weight
            first = how.beta1 * first + g
            weight = weight - how.lr * (g + how.beta1 * first if how.nesterov else first)
        first, second = rounded(first, 0), rounded(second, 1)
    return weight


def through_int8(state: Tensor, number: int) -> Tensor:
    rows = state.reshape(-1, state.shape[-1])
    back = decode(*encode(rows, signed=number == 0), torch.float64, signed=number == 0)
    return back.view(state.shape)


ROUNDED = {
    "full": lambda state, _: state,
    "bf16": lambda state, _: state.bfloat16().double(),
    "int8": through_int8,
}
RULES = [ADAMW, LION, SGD, SGD._replace(nesterov=True)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("states", ["full", "bf16", "int8"])
@pytest.mark.parametrize("how", RULES, ids=lambda how: how.rule)
def test_updates_equal_the_formula(how: Update, states: str, backend: str) -> None:
    how = how._replace(states=states)
    tensors = group(how, SHAPES, torch.float64)
    start = [weight.clone() for weight in tensors["weight"]]
    for step in range(4):
        run(how, tensors, 10 * (step + 1), backend)
    for n, weight in enumerate(tensors["weight"]):
        gradients = [draw(10 * (step + 1) + n, *weight.shape, dtype=torch.float64) for step in range(4)]
        expected = formula(how, start[n], gradients, ROUNDED[states])
        # Products in another order; a number that is nearly between two codes would show as more than 1e-5.
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    if how.is_counted:
        assert {t.item() for t in tensors["step"]} == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov", "plain"])
def test_torch_does_the_same(name: str, dtype: torch.dtype) -> None:
    if name == "adamw":
        how: Update = ADAMW
        make: Any = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        momentum = 0.0 if name == "plain" else 0.9
        how = SGD._replace(beta1=momentum, nesterov=name == "nesterov")
        make = partial(torch.optim.SGD, lr=0.05, momentum=momentum, weight_decay=0.01, nesterov=how.nesterov)
    tensors = group(how, SHAPES, dtype)
    theirs = [weight.clone().requires_grad_() for weight in tensors["weight"]]
    optimizer = make(theirs)
    for step in range(5):
        run(how, tensors, 10 * (step + 1), "reference")
        for parameter, gradient in zip(theirs, tensors["gradient"], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for mine, other in zip(tensors["weight"], theirs, strict=True):
        bound = 4 * torch.finfo(dtype).eps * 5
        torch.testing.assert_close(mine, other.detach(), rtol=bound, atol=bound)


@pytest.mark.parametrize("states", ["full", "bf16", "int8"])
def test_the_clip_factor_scales_gradients(states: str) -> None:
    how = SGD._replace(states=states)
    clipped, scaled = (group(how, SHAPES) for _ in range(2))
    run(how, clipped, 5, clip=torch.tensor(0.25, dtype=torch.float64))
    scaled["gradient"] = [0.25 * draw(5 + n, *w.shape) for n, w in enumerate(scaled["weight"])]
    optimizer_step(*(t for name in how.fields for t in scaled[name]), how=how)
    for mine, other in zip(clipped["weight"], scaled["weight"], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("states", ["full", "int8"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_copies_follow_their_masters(backend: str, states: str) -> None:
    how = ADAMW._replace(states=states, copies=True)
    tensors = group(how, SHAPES)
    run(how, tensors, 3, backend)
    for copy, weight in zip(tensors["copy"], tensors["weight"], strict=True):
        assert torch.equal(copy, weight.bfloat16())


def shards(tensors: dict[str, list[Tensor]], how: Update, key: int) -> list[tuple[dict[str, Tensor], Place]]:
    """A full `(4, 6, 256)` stack cut along its first two dimensions, and along rows of whole blocks."""
    found = []
    for plane in (0, 2):
        for row in (0, 3):
            for column in (0, 128):
                part = {
                    name: t[0]
                    if name == "step"
                    else t[0][plane : plane + 2, row : row + 3, column // 128 : column // 128 + 1].clone()
                    if name.endswith("_scale")
                    else t[0][plane : plane + 2, row : row + 3, column : column + 128].clone()
                    for name, t in tensors.items()
                }
                part["step"] = torch.tensor(0.0)
                first = (plane * 6 + row) * 256 + column
                found.append((part, Place(key, 128, first, 3, 256, 6 * 256)))
    return found


def assemble(parts: list[Tensor]) -> Tensor:
    rows = [torch.cat(parts[n : n + 2], -1) for n in range(0, 8, 2)]
    return torch.cat([torch.cat(rows[n : n + 2], 1) for n in (0, 2)])


@pytest.mark.parametrize(
    "how",
    [
        ADAMW._replace(states="bf16", stochastic=True),
        LION._replace(states="bf16", stochastic=True),
        ADAMW._replace(states="int8"),
    ],
    ids=["adamw", "lion", "int8"],
)
def test_shards_are_updated_as_the_whole_is_bit_by_bit(how: Update) -> None:
    full = group(how, [(4, 6, 256)])
    parts = shards(full, how, key=77)
    for step in range(3):
        gradient = draw(100 + step, 4, 6, 256)
        full["gradient"] = [gradient]
        optimizer_step(
            *(t for name in how.fields for t in full[name]), how=how, places=[whole((4, 6, 256), 77)]
        )
        for part, place in parts:
            plane, row = divmod(place.first // 256, 6)
            column = place.first % 256
            part["gradient"] = gradient[plane : plane + 2, row : row + 3, column : column + 128]
            optimizer_step(*(part[name] for name in how.fields), how=how, places=[place])
    for name in ("weight", *how.moments):
        assert torch.equal(assemble([part[name] for part, _ in parts]), full[name][0]), name


def test_bits_are_those_of_the_project_wherever_they_are_drawn() -> None:
    counters, key = torch.arange(0, 10**9, 10**7), stream_key(3, "w")
    assert torch.equal(splitmix(counters, key), random_bits(counters, key))
    bits = element_bits(counters, key, torch.tensor(1.0))
    assert not torch.equal(bits, element_bits(counters, key, torch.tensor(2.0)))
    assert not torch.equal(bits, element_bits(counters, key + 1, torch.tensor(1.0)))


def test_rounding_keeps_the_mean_and_stays_beside_the_number() -> None:
    """The share of ups is that of the way, to 5 standard deviations of 2^16 draws."""
    count = 1 << 16
    bits = element_bits(torch.arange(count), stream_key(0, "x"), torch.tensor(1.0))
    for value in (1.001, -3.003, 1e-30, 123456.0):
        x = torch.full((count,), value)
        down = torch.tensor(value).view(torch.int32) & -65536
        low, high = down.view(torch.float32).item(), (down + 65536).view(torch.float32).item()
        share = (x[0].item() - low) / (high - low)
        for draw_ in (0, 1, 2):
            made = round_to_bfloat16(x, bits, draw_).float()
            assert ((made == low) | (made == high)).all()
            ups = (made == high).float().mean().item()
            assert abs(ups - share) <= 5 * (share * (1 - share) / count) ** 0.5 + 2**-16
    exact = torch.tensor([1.5, -0.25, 0.0, torch.inf, -torch.inf, torch.nan])
    made = round_to_bfloat16(exact, bits[:6], 0).float()
    torch.testing.assert_close(made, exact, rtol=0, atol=0, equal_nan=True)


def test_small_changes_add_up_only_with_random_rounding() -> None:
    """A second moment that grows by less than half a bf16 step at a time."""
    final = {}
    for stochastic in (False, True):
        how = ADAMW._replace(states="bf16", stochastic=stochastic, beta2=0.999)
        tensors = group(how, [(64, 256)])
        tensors["exp_avg_sq"][0].fill_(1.0)
        for _ in range(200):
            tensors["gradient"] = [torch.full((64, 256), 1.5)]
            optimizer_step(*(t for name in how.fields for t in tensors[name]), how=how)
        final[stochastic] = tensors["exp_avg_sq"][0].float().mean().item()
    expected = 2.25 - 1.25 * 0.999**200
    assert final[False] == 1.0
    assert final[True] == pytest.approx(expected, rel=1e-3)


def test_bf16_weights_without_masters_are_rounded_at_random() -> None:
    how = SGD._replace(lr=2.0**-12, weight_decay=0.0, beta1=0.0, stochastic=True)
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    step = torch.tensor(0.0)
    for _ in range(64):  # 2^-6 in all, of steps of which 16 make one of bf16's below 1
        optimizer_step(weight, torch.ones_like(weight), step, how=how)
    assert weight.float().mean().item() == pytest.approx(1 - 2.0**-6, abs=2e-4)


@pytest.mark.parametrize("case", KERNELS["optimizer_step"].suite.small, ids=lambda case: case.name)
def test_the_cost_is_every_byte_that_is_read_and_written(case: Any) -> None:
    suite = KERNELS["optimizer_step"].suite
    tensors, options = suite.make_inputs(case, dtype=torch.bfloat16, device="cpu")
    how = options["how"]
    count = len(tensors) // len(how.fields)
    passes = {"gradient": 1, "copy": 1, "step": 3}
    moved = sum(
        passes.get(name, 2) * t.numel() * t.itemsize
        for n, name in enumerate(how.fields)
        for t in tensors[n * count : (n + 1) * count]
    )
    assert suite.cost(case, itemsize=2).bytes == moved


def test_tensors_without_elements_are_passed_over() -> None:
    """A rank may hold none of a small parameter."""
    how = ADAMW._replace(states="int8")
    tensors = group(how, [(2, 256), (0, 256)])
    run(how, tensors, 1)
    assert tensors["step"][1] == 1


def test_a_wrong_number_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tensors: must be as many of each of weight, gradient, exp_avg"):
        optimizer_step(*(torch.ones(2) for _ in range(4)), how=LION)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"how": ADAMW._replace(rule="adam")}, "must be one of adamw, lion, sgd"),
        ({"how": ADAMW._replace(states="fp32")}, "states full, bf16, int8"),
        ({"clip": 0.5}, "must be a floating scalar tensor"),
        ({"places": [whole(torch.Size([4, 8]), 0)] * 2}, "2 places for 1 weights"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], says: str) -> None:
    tensors = [torch.zeros(4, 8) for _ in range(4)]
    with pytest.raises(ValueError, match=says):
        optimizer_step(*tensors, torch.zeros(()), **{"how": ADAMW, **change})
