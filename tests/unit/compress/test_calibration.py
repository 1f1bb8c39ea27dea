"""What calibration sums up is what hooks see, in models with and without experts."""

from typing import Any

import pytest
import torch
from numerics.test_huggingface_experts import MODELS as EXPERTS
from numerics.test_huggingface_parity import MODELS
from torch import Tensor, nn
from unit.compress.test_rounding import random_model, some_text

from megatrain.compress.calibration import walk
from megatrain.nn.layer import Linear
from megatrain.nn.moe import Experts

FAMILIES = {"qwen3": MODELS["qwen3"], "gpt2": MODELS["gpt2"], **EXPERTS}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_moments_are_those_that_hooks_see(name: str) -> None:
    cfg = FAMILIES[name]
    model, batches = random_model(cfg), some_text(cfg)
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for at, module in model.named_modules():

        def see(module: nn.Module, given: tuple[Any, ...], at: str = at) -> None:
            seen.setdefault(at, []).append(given[0].flatten(0, -2))

        if isinstance(module, Linear):
            hooks.append(module.register_forward_pre_hook(see))
        if isinstance(module, Experts):
            sizes: list[Tensor] = []

            def see_experts(
                module: nn.Module, given: tuple[Any, ...], at: str = at, sizes: Any = sizes
            ) -> None:
                sizes.append(given[1])
                for expert, rows in enumerate(given[0].split(given[1].tolist())):
                    seen.setdefault(f"{at}.{expert}", []).append(rows)

            hooks.append(module.register_forward_pre_hook(see_experts))
    for batch in batches:
        model(batch.tokens)
    for hook in hooks:
        hook.remove()
    n_checked = 0
    for _, _, moments in walk(model, batches):
        for key, found in moments.items():
            if key.endswith(".weight"):
                x = torch.cat(seen[key.removesuffix(".weight")])
                assert torch.allclose(found.gram, x.T @ x)
                assert torch.allclose(found.mean_size, x.abs().mean(0))
                assert torch.allclose(found.norm, x.norm(dim=0))
                n_checked += 1
            elif not key.endswith("down"):
                for expert in range(len(found.gram)):
                    x = torch.cat(seen[f"{key.rpartition('.')[0]}.{expert}"])
                    assert torch.allclose(found.gram[expert], x.T @ x)
                    assert int(found.count[expert]) == len(x)
                n_checked += 1
    assert n_checked >= 4 * cfg.n_layers


@torch.no_grad()
def test_later_blocks_are_given_what_changed_ones_return() -> None:
    cfg = MODELS["qwen3"]
    model, batches = random_model(cfg), some_text(cfg)
    grams = []
    for changes in (False, True):
        found = {}
        for layer, block, moments in walk(model, batches):
            found |= {key: each.gram for key, each in moments.items()}
            if changes and layer == 0:
                for parameter in block.parameters():
                    parameter.mul_(1.1)
        grams.append(found)
    assert torch.equal(*(each["layers.0.attn.wq.weight"] for each in grams))
    assert not torch.allclose(*(each["layers.1.attn.wq.weight"] for each in grams))
    again = {key: each.gram for _, _, moments in walk(model, batches) for key, each in moments.items()}
    assert torch.allclose(again["layers.1.mlp.down.weight"], grams[1]["layers.1.mlp.down.weight"])


def test_the_model_is_as_before_after_the_walk_was_broken_off() -> None:
    cfg = MODELS["qwen3"]
    model, batches = random_model(cfg), some_text(cfg)
    with torch.no_grad():
        before = model(batches[0].tokens)
        for _ in walk(model, batches):
            break
        assert torch.equal(model(batches[0].tokens), before)
