"""Models of images: what torch's own convolutions and softmax give, and the same in every layout."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from layouts import with_layout
from test_parity import BOUND
from torch.nn import functional as F

from megatrain.config.load import rule_problems
from megatrain.data.config import DataConfig, ImagesConfig
from megatrain.data.labels import LabelSet
from megatrain.data.store import TokenStore
from megatrain.models.config import ModelConfig
from megatrain.models.convnet.config import ConvNetConfig
from megatrain.models.vit.config import ViTConfig
from megatrain.nn.config import ClassifierConfig
from megatrain.optim.config import AdamWConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.parity import Trace, merged, relative_errors, trace

CLASSES = ("a", "b", "c", "d", "e")
SIZES: dict[str, Any] = {
    "n_layers": 4, "hidden_size": 24, "n_heads": 4, "ffn_size": 40, "image_height": 6, "image_width": 8,
    "image_channels": 3, "patch_size": 2, "init_std": 0.2,
    "classifier": ClassifierConfig(labels=CLASSES, multi_label=False),
}  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    "vit": ViTConfig(**SIZES, registers=4),
    "convnet": ConvNetConfig(**SIZES, registers=2),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("vit", {"dp_shard": 2}),
    ("vit", {"tp": 2}),
    ("vit", {"pp": 2}),
    ("convnet", {"dp_shard": 2, "zero_stage": 1}),
    *[
        pytest.param(name, layout, marks=pytest.mark.slow)
        for name, layout in (
            ("vit", {"dp_replicate": 2}),
            ("vit", {"dp_shard": 2, "zero_stage": 2}),
            ("vit", {"tp": 4}),
            ("vit", {"pp": 2, "tp": 2, "pp_schedule": "zbv"}),
            ("vit", {"dp_shard": 2, "tp": 2, "activation_checkpointing": "full"}),
            ("vit", {"pp": 2, "dp_shard": 2}),
            ("convnet", {"dp_replicate": 2}),
            ("convnet", {"dp_shard": 4}),
            ("convnet", {"pp": 2}),
        )
    ],
]  # type: ignore[list-item]


def config(name: str) -> Config:
    return Config(
        model=MODELS[name],
        data=DataConfig(kind="images", images=ImagesConfig(height=6, width=8, channels=3)),
        optim=AdamWConfig(lr=1e-2, clip_norm=0.5),
        train=TrainConfig(precision="fp64", seed=3),
        seq_len=145,
        global_batch_size=8,
        micro_batch_size=1,
    )


@cache
def images() -> TokenStore:
    random = np.random.default_rng(5)
    count, size = 50, 145
    tokens = random.integers(0, 256, size=(count, size), dtype=np.uint16)
    tokens[:, -1] = 256
    starts = np.arange(count) * size
    labels = random.integers(0, len(CLASSES), size=count)
    return TokenStore(
        tokens.reshape(-1), starts, "images", text_bytes=0, vocab_size=257, labels=labels,
        label_set=LabelSet(CLASSES, False),
    )  # fmt: skip


@cache
def single(name: str) -> Trace:
    return trace(with_layout(config(name), "fp64", {}), images(), 3)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_every_layout_computes_what_one_process_does(
    workers: WorkerPool, name: str, layout: dict[str, Any]
) -> None:
    cfg = with_layout(config(name), "fp64", layout)
    found, truth = merged(workers.run(trace, world_size(cfg.parallel), cfg, images(), 3)), single(name)
    assert found.digests == truth.digests
    np.testing.assert_allclose(found.losses, truth.losses, rtol=BOUND)
    np.testing.assert_allclose(found.grad_norms, truth.grad_norms, rtol=BOUND)
    for kind in ("gradients", "final"):
        errors = relative_errors(getattr(found, kind), getattr(truth, kind))
        assert max(errors.values()) <= BOUND, (kind, errors)


def by_hand(name: str, weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Logits of images `(batch, height, width, channels)` in 0..255: convolutions, softmax and norms of torch."""
    cfg = MODELS[name]
    assert isinstance(cfg, ViTConfig | ConvNetConfig)
    hidden = cfg.hidden_size

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.layer_norm(x, (hidden,), weights[f"{at}.weight"], weights[f"{at}.bias"], cfg.norm_eps)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])

    kernel = weights["patch.weight"].view(hidden, 2, 2, 3).permute(0, 3, 1, 2)
    image = (pixels / 127.5 - 1).permute(0, 3, 1, 2)
    grid = F.conv2d(image, kernel, weights["patch.bias"], stride=2)
    rows, columns = grid.shape[2:]
    x = torch.cat(
        [grid.flatten(2).transpose(1, 2), torch.zeros(len(pixels), cfg.registers, hidden).double()], 1
    )
    x = x + weights["pos_embed.weight"]
    for layer in range(cfg.n_layers):
        at = f"layers.{layer}"
        y = norm(x, f"{at}.attn_norm")
        if name == "vit":
            q, k, v = (
                linear(y, f"{at}.attn.{n}").unflatten(-1, (cfg.n_heads, -1)).transpose(1, 2)
                for n in ("wq", "wk", "wv")
            )
            mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}.attn.wo")
        else:
            kernel = weights[f"{at}.attn.conv.weight"].view(hidden, hidden, 3, 3)
            image = y[:, : rows * columns].transpose(1, 2).unflatten(-1, (rows, columns))
            out = (
                F.conv2d(image, kernel, weights[f"{at}.attn.conv.bias"], padding=1).flatten(2).transpose(1, 2)
            )
            x = torch.cat([x[:, : rows * columns] + out, x[:, rows * columns :]], 1)
        y = norm(x, f"{at}.mlp_norm")
        x = x + linear(F.gelu(linear(y, f"{at}.mlp.up")), f"{at}.mlp.down")
    pooled = x[:, -1] if name == "vit" else x[:, : rows * columns].mean(1)
    return norm(pooled, "norm") @ weights["classifier.weight"].T


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_the_formulas(name: str) -> None:
    torch.manual_seed(0)
    state = build_state(with_layout(config(name), "fp64", {}), torch.device("cpu"))
    for parameter in state.weights.parameters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    store = images()
    tokens = torch.from_numpy(store.tokens.reshape(50, 145)[:7].astype(np.int64))
    assert store.labels is not None
    targets = torch.full_like(tokens, -100)
    targets[:, -1] = torch.from_numpy(store.labels[:7])
    pixels = tokens[:, :-1].view(7, 6, 8, 3).double()
    weights = {n: p.detach().clone().requires_grad_() for n, p in state.weights.parameters.items()}
    wanted = by_hand(name, weights, pixels)
    found = state.model(tokens)
    assert found.shape == (7, 1, 5)
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-11, atol=1e-11)
    loss = F.cross_entropy(wanted, targets[:, -1], reduction="sum")
    loss.backward()
    ours = state.model(tokens, targets=targets)
    torch.testing.assert_close(ours, loss, rtol=1e-11, atol=0)
    ours.backward()
    for key, parameter in state.weights.parameters.items():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-9, atol=1e-11, msg=key)
    each = state.model(tokens, targets=targets, per_token=True)
    assert each.shape == tokens.shape
    torch.testing.assert_close(each.sum(), loss, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("convnet", {"parallel": ParallelConfig(tp=2)}, "parallel.tp"),
        ("vit", {"parallel": ParallelConfig(cp=2)}, "parallel.cp"),
        ("vit", {"seq_len": 144}, "seq_len"),
        ("vit", {"data": DataConfig(kind="text")}, "data.kind"),
        ("vit", {"data": DataConfig(kind="images")}, "data.images.height"),
        ("vit", {"model": replace(MODELS["vit"], patch_size=4)}, "model.image_height"),
        (
            "vit",
            {"model": replace(MODELS["vit"], registers=1), "parallel": ParallelConfig(tp=2)},
            "parallel.tp",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(name: str, change: dict[str, Any], field: str) -> None:
    assert not list(rule_problems(config(name)))
    assert field in [each.field for each in rule_problems(replace(config(name), **change))]
