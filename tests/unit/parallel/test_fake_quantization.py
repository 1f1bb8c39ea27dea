"""Rounded weights: what a layer computes, which gradient passes, and that training with them bears compression."""

import math
from dataclasses import replace

import pytest
import torch
from numerics.test_float8_training import CFG, chain, steps
from torch.nn.functional import linear

from megatrain.compress.codes import Grid, round_to_nearest
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.fake_quantization import fake_quantized_linear
from megatrain.train.build import build_eval_batches, build_state
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.state import TrainState

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", ["int8", "int4"])
def test_the_product_is_that_of_rounded_weights_and_the_gradient_that_of_exact_ones(number: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((3, 5, 64), (7, 64), (7,))
    )
    out = fake_quantized_linear(x, weight, bias, number=number, group=32)
    largest = {"int8": 127, "int4": 7}[number]
    tiles = weight.detach().float().unflatten(1, (2, 32))
    scales = tiles.abs().amax(2, keepdim=True) / largest
    rounded = ((tiles / scales).round() * scales).flatten(1).double()
    assert torch.allclose(out, linear(x, rounded, bias), atol=1e-6)
    assert not torch.allclose(out, linear(x, weight, bias), atol=1e-4)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    out.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    assert torch.allclose(x.grad, grad @ rounded, atol=1e-6)
    assert torch.allclose(weight.grad, grad.flatten(0, 1).T @ x.detach().flatten(0, 1))
    assert torch.allclose(bias.grad, grad.sum((0, 1)))


def perplexity(state: TrainState, cfg: Config) -> float:
    return math.exp(evaluate(state.parallel, build_eval_batches(cfg, chain()), None).loss)


def test_a_layer_trained_so_is_better_when_it_is_rounded() -> None:
    """It fits inputs that depend on each other: one weight can make up for the rounding of another."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 8, generator=generator) @ torch.randn(8, 64, generator=generator) / 8
    x = torch.randn(256, 64, generator=generator) @ mixed
    exact = torch.randn(8, 64, generator=generator)
    target, weight = linear(x, exact), exact.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 300)
        optimizer.zero_grad()
        (fake_quantized_linear(x, weight, None, number="int4", group=32) - target).square().mean().backward()
        optimizer.step()
    grid = Grid("int4", 32, torch.float32)
    errors = [
        float((linear(x, round_to_nearest(each.detach(), grid).numbers()) - target).square().mean())
        for each in (weight, exact)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_run_learns_with_rounded_weights_and_is_compressed_as_it_was_validated() -> None:
    cfg = replace(CFG, train=replace(CFG.train, precision="fp32", qat="int4", eval_tokens=4096))
    state = build_state(cfg, CPU)
    steps(state, cfg, range(40))
    before = perplexity(state, cfg)
    assert before < 32
    linears = [each for each in state.parallel.models[0].modules() if isinstance(each, Linear)]
    rounded = [
        round_to_nearest(each.weight.detach(), Grid("int4", 32, torch.float32)).numbers() for each in linears
    ]
    assert not any(torch.equal(each.weight, numbers) for each, numbers in zip(linears, rounded, strict=True))
    with torch.no_grad():
        for layer, numbers in zip(linears, rounded, strict=True):
            replace_seam(layer, "product", linear)
            layer.weight.copy_(numbers)
    assert perplexity(state, cfg) == pytest.approx(before, rel=1e-6)
