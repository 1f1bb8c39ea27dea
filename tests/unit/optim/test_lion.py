"""Lion against algorithm 2 of arXiv 2302.06675 in NumPy; resumed bitwise."""

import numpy as np
import torch
from optim_roles import ROLES
from torch import nn

from megatrain.optim.build import build_optimizer, optimizer_tensors
from megatrain.optim.config import LionConfig

SHAPES = {"layers.0.attn.wq.weight": (5, 3), "layers.0.attn_norm.weight": (3,), "embed.weight": (7, 3)}


def make_parameters() -> dict[str, nn.Parameter]:
    draw = np.random.default_rng(0)
    return {
        name: nn.Parameter(torch.from_numpy(draw.standard_normal(shape))) for name, shape in SHAPES.items()
    }


def gradients_of(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step + 1)
    return {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}


def run(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = torch.from_numpy(gradient)
        optimizer.step()


def test_updates_equal_the_formula() -> None:
    cfg = LionConfig(lr=0.01, decay_embeddings=False)
    parameters = make_parameters()
    start = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    run(build_optimizer(cfg, parameters, ROLES), parameters, range(5))
    for name, parameter in parameters.items():
        theta, m = start[name], np.zeros(SHAPES[name])
        decay = cfg.weight_decay if name == "layers.0.attn.wq.weight" else 0.0
        for gradient in (gradients_of(step)[name] for step in range(5)):
            c = cfg.beta1 * m + (1 - cfg.beta1) * gradient
            theta = theta - cfg.lr * (np.sign(c) + decay * theta)
            m = cfg.beta2 * m + (1 - cfg.beta2) * gradient
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12, err_msg=name)


def test_resume_is_bitwise() -> None:
    cfg = LionConfig(lr=0.01)
    whole_run, stopped, resumed = (make_parameters() for _ in range(3))
    run(build_optimizer(cfg, whole_run, ROLES), whole_run, range(4))
    first, second = build_optimizer(cfg, stopped, ROLES), build_optimizer(cfg, resumed, ROLES)
    run(first, stopped, range(2))
    saved = optimizer_tensors(first, stopped)
    assert set(saved) == {f"{name}.exp_avg" for name in SHAPES}
    for name, state in optimizer_tensors(second, resumed).items():
        state.copy_(saved[name])
    for name, parameter in resumed.items():
        parameter.data.copy_(stopped[name].data)
    run(second, resumed, range(2, 4))
    assert all(torch.equal(p, resumed[name]) for name, p in whole_run.items())
