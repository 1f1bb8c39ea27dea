"""Muon against a formula of singular values in NumPy and against torch's own; one object with AdamW; resumed."""

import numpy as np
import pytest
import torch
from optim_roles import ROLES
from torch import Tensor, nn

from megatrain.optim.build import build_optimizer, optimizer_tensors
from megatrain.optim.config import MuonConfig
from megatrain.optim.muon import Muon

SHAPES = {
    "embed.weight": (11, 6),
    "layers.0.attn.wq.weight": (8, 6),
    "layers.0.attn_norm.weight": (6,),
    "layers.0.mlp.experts.up": (3, 5, 6),
    "layers.0.mlp.down.weight": (6, 20),
    "head.weight": (11, 6),
}
BY_ADAMW = ("embed.weight", "head.weight", "layers.0.attn_norm.weight")


def make_parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients_of(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step + 1)
    return {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}


def run(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients_of(step).items():
            if name in parameters:
                parameters[name].grad = torch.from_numpy(gradient).to(parameters[name].dtype)
        optimizer.step()


def orthogonal(matrix: np.ndarray, ns_steps: int) -> np.ndarray:
    """The polynomial on the singular values, each matrix of a stack by itself."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum(-1, keepdims=True))
    for _ in range(ns_steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values[..., None, :]) @ right


def muon(weight: np.ndarray, gradients: list[np.ndarray], cfg: MuonConfig) -> np.ndarray:
    out_size, in_size = weight.shape[-2:]
    size = 0.2 * np.sqrt(max(out_size, in_size))
    if cfg.scaling == "original":
        size = np.sqrt(max(1, out_size / in_size))
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = cfg.momentum * average + (1 - cfg.momentum) * gradient
        wanted = (1 - cfg.momentum) * gradient + cfg.momentum * average if cfg.nesterov else average
        weight = weight * (1 - cfg.lr * cfg.weight_decay) - cfg.lr * size * orthogonal(wanted, cfg.ns_steps)
    return weight


def adamw(weight: np.ndarray, gradients: list[np.ndarray], cfg: MuonConfig, decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1711.05101."""
    lr, m, v = cfg.lr * cfg.adamw_lr_ratio, np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        m = cfg.beta1 * m + (1 - cfg.beta1) * gradient
        v = cfg.beta2 * v + (1 - cfg.beta2) * gradient**2
        root = np.sqrt(v / (1 - cfg.beta2**t)) + cfg.eps
        weight = weight * (1 - lr * decay) - lr * m / (1 - cfg.beta1**t) / root
    return weight


@pytest.mark.parametrize(
    "cfg",
    [
        MuonConfig(lr=0.02),
        MuonConfig(lr=0.02, scaling="original", adamw_lr_ratio=0.1),
        MuonConfig(lr=0.02, nesterov=False, momentum=0.9, ns_steps=3, decay_embeddings=False),
        MuonConfig(lr=0.02, momentum=0.0, weight_decay=0.0),
    ],
)
def test_updates_equal_the_formula(cfg: MuonConfig) -> None:
    parameters = make_parameters()
    start = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    optimizer = build_optimizer(cfg, parameters, ROLES)
    for group in optimizer.param_groups:  # as the training step does
        group["lr"] = cfg.lr * group["lr_ratio"]
    run(optimizer, parameters, range(3))
    for name, parameter in parameters.items():
        history = [gradients_of(step)[name] for step in range(3)]
        if name in BY_ADAMW:
            keeps = name.endswith("norm.weight") or (name == "embed.weight" and not cfg.decay_embeddings)
            truth = adamw(start[name], history, cfg, 0.0 if keeps else cfg.weight_decay)
        else:
            truth = muon(start[name], history, cfg)
        np.testing.assert_allclose(parameter.detach().numpy(), truth, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original"])
def test_agrees_with_torch(scaling: str) -> None:
    """torch iterates in bfloat16 (2^-9 a rounding, some ten roundings a step): the moves agree to a few percent."""
    mine, theirs, names = make_parameters(torch.float32), make_parameters(torch.float32), []
    cfg = MuonConfig(lr=0.02, scaling=scaling)  # type: ignore[arg-type]
    names = [name for name, p in mine.items() if p.ndim == 2 and name not in BY_ADAMW]
    start = {name: mine[name].detach().clone() for name in names}
    run(build_optimizer(cfg, mine, ROLES), mine, range(3))
    others = {name: theirs[name] for name in names}
    torch_muon = torch.optim.Muon(
        others.values(), lr=0.02, weight_decay=cfg.weight_decay, adjust_lr_fn=scaling
    )
    run(torch_muon, others, range(3))
    for name in names:
        move = theirs[name].detach() - start[name]
        error = (mine[name].detach() - theirs[name].detach()).norm() / move.norm()
        assert error < 0.05, f"{name}: {error:.3f}"


def test_state_is_there_from_the_start_under_canonical_names() -> None:
    parameters = make_parameters()
    optimizer = build_optimizer(MuonConfig(), parameters, ROLES)
    before = set(optimizer_tensors(optimizer, parameters))
    run(optimizer, parameters, range(1))
    assert before == set(optimizer_tensors(optimizer, parameters))
    matrices = {f"{name}.momentum_buffer" for name in SHAPES if name not in BY_ADAMW}
    rest = {f"{name}.{key}" for name in BY_ADAMW for key in ("step", "exp_avg", "exp_avg_sq")}
    assert before == matrices | rest


def test_resume_is_bitwise() -> None:
    cfg = MuonConfig()
    whole_run, stopped, resumed = (make_parameters(torch.float32) for _ in range(3))
    run(build_optimizer(cfg, whole_run, ROLES), whole_run, range(4))
    first = build_optimizer(cfg, stopped, ROLES)
    run(first, stopped, range(2))
    second = build_optimizer(cfg, resumed, ROLES)
    assert isinstance(second, Muon)
    copy_into(optimizer_tensors(second, resumed), optimizer_tensors(first, stopped))
    copy_into({n: p.data for n, p in resumed.items()}, {n: p.data for n, p in stopped.items()})
    run(second, resumed, range(2, 4))
    for name, parameter in whole_run.items():
        assert torch.equal(parameter, resumed[name]), name


def copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
