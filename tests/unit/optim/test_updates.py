"""Optimizer updates, clipping, master weights and the average against formulas in float64."""

import numpy as np
import pytest
import torch
from optim_roles import ROLES
from torch import nn

from megatrain.optim.build import build_optimizer, optimizer_tensors
from megatrain.optim.clip import clip_factor
from megatrain.optim.config import AdamWConfig, SGDConfig
from megatrain.optim.ema import WeightAverage
from megatrain.optim.groups import is_decayed
from megatrain.optim.master import MasterWeights

SHAPES = {"layers.0.attn.wq.weight": (5, 3), "layers.0.attn_norm.weight": (3,), "embed.weight": (7, 3)}


def make_parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }


def random_gradients(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}


def adamw(weight: np.ndarray, gradients: list[np.ndarray], cfg: AdamWConfig, decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1711.05101 in NumPy."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        m = cfg.beta1 * m + (1 - cfg.beta1) * gradient
        v = cfg.beta2 * v + (1 - cfg.beta2) * gradient**2
        m_hat, v_hat = m / (1 - cfg.beta1**t), v / (1 - cfg.beta2**t)
        weight = weight - cfg.lr * decay * weight - cfg.lr * m_hat / (np.sqrt(v_hat) + cfg.eps)
    return weight


def sgd(weight: np.ndarray, gradients: list[np.ndarray], cfg: SGDConfig, decay: float) -> np.ndarray:
    """Heavy-ball momentum, with Nesterov's form as torch documents it."""
    buffer = np.zeros_like(weight)
    for gradient in gradients:
        gradient = gradient + decay * weight
        buffer = cfg.momentum * buffer + gradient
        update = gradient + cfg.momentum * buffer if cfg.nesterov else buffer
        weight = weight - cfg.lr * update
    return weight


@pytest.mark.parametrize(
    "cfg",
    [
        AdamWConfig(lr=0.01, weight_decay=0.1),
        AdamWConfig(lr=0.01, weight_decay=0.1, decay_embeddings=False),
        SGDConfig(lr=0.1, momentum=0.9, weight_decay=0.01),
        SGDConfig(lr=0.1, momentum=0.9, nesterov=True),
        SGDConfig(lr=0.1, momentum=0.0),
    ],
)
def test_updates_equal_the_formula(cfg: AdamWConfig | SGDConfig) -> None:
    parameters = make_parameters(0)
    start = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    optimizer = build_optimizer(cfg, parameters, ROLES)
    steps = [random_gradients(seed) for seed in range(1, 5)]
    for gradients in steps:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        optimizer.step()
    for name, parameter in parameters.items():
        is_vector = name.endswith("norm.weight")
        keeps = is_vector or (name == "embed.weight" and not cfg.decay_embeddings)
        decay = 0.0 if keeps else cfg.weight_decay
        history = [gradients[name] for gradients in steps]
        formula = adamw if isinstance(cfg, AdamWConfig) else sgd
        expected = formula(start[name], history, cfg, decay)  # type: ignore[arg-type]
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_state_exists_before_the_first_step_under_canonical_names() -> None:
    parameters = make_parameters(0)
    optimizer = build_optimizer(AdamWConfig(), parameters, ROLES)
    before = set(optimizer_tensors(optimizer, parameters))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert before == set(optimizer_tensors(optimizer, parameters))
    assert "layers.0.attn.wq.weight.exp_avg_sq" in before


def test_biases_and_norms_are_not_decayed() -> None:
    parameters = make_parameters(0)
    decayed = {name for name, p in parameters.items() if is_decayed(ROLES[name], p, AdamWConfig())}
    assert decayed == {"layers.0.attn.wq.weight", "embed.weight"}


def test_clipping_scales_to_the_global_norm() -> None:
    gradients = random_gradients(7)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    factor = clip_factor(torch.tensor(norm), 0.5)
    assert factor is not None
    clipped = [torch.from_numpy(g.copy()) * factor for g in gradients.values()]
    total = np.sqrt(sum(float((g**2).sum()) for g in clipped))
    assert total == pytest.approx(0.5, rel=1e-5)  # the 1e-6 in the quotient keeps it finite


def test_small_gradients_are_not_scaled() -> None:
    assert clip_factor(torch.tensor(1e-3 * 11**0.5), 1.0) == 1
    assert clip_factor(torch.tensor(2.0), None) is None


def test_masters_take_steps_that_the_low_precision_copy_cannot_hold() -> None:
    model = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    weights = MasterWeights(dict(model.named_parameters()), torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    for _ in range(16):  # each step is 1e-3; bf16 near 1 moves by 2^-8 = 3.9e-3
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        weights.collect_gradients()
        with torch.no_grad():
            for master in weights.parameters.values():
                assert master.grad is not None
                master -= 1e-3 * master.grad
        weights.zero_gradients()
        weights.sync_model_weights()
    torch.testing.assert_close(weights.parameters["weight"].detach(), torch.full((4, 4), 1 - 0.016))
    assert torch.equal(model.weight.detach().float(), torch.full((4, 4), 1 - 0.016).bfloat16().float())


def test_micro_batches_add_up_in_full_precision() -> None:
    model = nn.Linear(1, 1, bias=False)
    weights = MasterWeights(dict(model.named_parameters()), torch.bfloat16)
    for _ in range(257):  # bf16 can't count beyond 256
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        weights.collect_gradients()
    gradient = weights.parameters["weight"].grad
    assert gradient is not None
    assert gradient.item() == 257


def test_equal_types_share_the_parameters() -> None:
    model = nn.Linear(2, 2)
    weights = MasterWeights(dict(model.named_parameters()), torch.float32)
    assert weights.parameters["weight"] is model.weight


def test_average_equals_the_closed_form() -> None:
    weight = torch.zeros(1, dtype=torch.float64)
    average = WeightAverage({"w": weight}, decay=0.9)
    for step in range(1, 6):
        weight.fill_(step)
        average.update({"w": weight})
    expected = sum(0.1 * 0.9 ** (5 - step) * step for step in range(1, 6))
    assert average.averages["w"].item() == pytest.approx(expected, rel=1e-12)
