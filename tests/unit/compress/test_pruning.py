"""Sparsity and structured pruning: what goes is what counts least, and what stays computes as well as it can."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.compress.test_rounding import drawn, random_model, some_text

from megatrain.compress.calibration import walk
from megatrain.compress.methods import METHODS, Sparsity
from megatrain.compress.prune import prune_model, pruned_config, refitted
from megatrain.compress.sparsify import kept_weights, sparsify_model
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.decoder import Decoder

TINY: dict[str, Any] = {"n_layers": 2, "hidden_size": 64, "n_heads": 8, "ffn_size": 96, "vocab_size": 50}
MODELS: dict[str, ModelConfig] = {
    "llama, grouped keys": Llama3Config(**TINY, n_kv_heads=4),
    "qwen3": Qwen3Config(**TINY, head_dim=16, n_kv_heads=8),
    "gpt2": GPT2Config(**TINY, max_seq_len=32),
    "llama, biases": Llama3Config(**TINY, n_kv_heads=4, attention_bias=True, output_bias=True, mlp_bias=True),
}


def method(name: str) -> Sparsity:
    found = METHODS[name]
    assert isinstance(found, Sparsity)
    return found


def quiet(phase: str, share: float) -> None:
    pass


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_wanda_keeps_the_largest_products_of_each_output(sparsity: float) -> None:
    weight, x = drawn(7, 40), drawn(30, 40, seed=1) * drawn(40, seed=2).exp()
    kept = kept_weights(weight, x.norm(dim=0), method("wanda"), sparsity)
    for row in range(7):
        scores = [float(weight[row, n].abs() * x[:, n].square().sum().sqrt()) for n in range(40)]
        order = sorted(range(40), key=scores.__getitem__)
        assert kept[row].nonzero().flatten().tolist() == sorted(order[int(sparsity * 40) :])


def test_magnitudes_are_compared_within_the_matrix() -> None:
    weight = drawn(7, 40) * torch.arange(1.0, 8.0)[:, None]
    kept = kept_weights(weight, None, method("magnitude"), 0.5)
    assert int(kept.sum()) == 140
    assert weight[kept].abs().min() > weight[~kept].abs().max()


@pytest.mark.parametrize("name", ["magnitude-2:4", "wanda-2:4"])
def test_two_of_four_are_kept(name: str) -> None:
    weight, norm = drawn(5, 16), drawn(16, seed=1).exp()
    kept = kept_weights(weight, norm if name == "wanda-2:4" else None, method(name), 0.5)
    score = weight.abs() * norm if name == "wanda-2:4" else weight.abs()
    for four, chosen in zip(score.view(-1, 4), kept.view(-1, 4), strict=True):
        assert int(chosen.sum()) == 2
        assert four[chosen].min() >= four[~chosen].max()
    assert int(kept_weights(torch.zeros(3, 8), None, method(name), 0.5).sum()) == 12  # of equals, too


@pytest.mark.parametrize("name", ["magnitude", "wanda", "magnitude-2:4", "wanda-2:4"])
def test_each_product_of_the_blocks_is_sparse_and_nothing_else(name: str) -> None:
    cfg = MODELS["qwen3"]
    model, batches = random_model(cfg), some_text(cfg)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    names = [key for key, each in model.named_parameters() if "layers." in key and each.ndim == 2]
    sparsify_model(model, names, method(name), 0.5, batches=batches, progress=quiet)
    for key, each in model.named_parameters():
        zeros = float((each == 0).double().mean())
        assert zeros == pytest.approx(0.5 if key in names else 0, abs=0.01)
        assert torch.equal(each[each != 0], before[key][each != 0])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_that_keeps_all_is_the_same(name: str) -> None:
    cfg = MODELS[name]
    model, batches = random_model(cfg), some_text(cfg)
    before = model(batches[0].tokens)
    kept = pruned_config(cfg, heads=cfg.n_heads, ffn=cfg.ffn_size)
    assert kept == cfg
    assert torch.allclose(
        prune_model(model, kept, batches, quiet)(batches[0].tokens), before, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads_and_channels_that_do_nothing_go_first(name: str) -> None:
    """Those whose outputs no weight reads: without them the model is the same."""
    cfg = MODELS[name]
    model, batches = random_model(cfg), some_text(cfg)
    size = cfg.qk_head_dim * cfg.n_heads // cfg.kv_heads
    for layer, block in model.blocks():
        named = dict(block.named_parameters())
        for group in ((layer + 1) % cfg.kv_heads, cfg.kv_heads - 1):
            named["attn.wo.weight"][:, group * size : (group + 1) * size] = 0
        named["mlp.down.weight"][:, layer + 3 :: 4] = 0
    before = model(batches[0].tokens)
    heads = cfg.n_heads - 2 * cfg.n_heads // cfg.kv_heads
    kept = pruned_config(cfg, heads=heads, ffn=73)
    assert (kept.n_heads, kept.kv_heads, kept.qk_head_dim, kept.ffn_size) == (
        heads,
        cfg.kv_heads - 2,
        cfg.qk_head_dim,
        73,
    )
    small = prune_model(model, kept, batches, quiet)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(batches[0].tokens), before, rtol=0, atol=1e-9)


def test_what_stays_is_fitted_by_least_squares() -> None:
    x, weight = drawn(200, 24) @ drawn(24, 24, seed=1), drawn(5, 24, seed=2)
    kept = torch.tensor([0, 3, 4, 9, 12, 20])
    found = refitted(weight, x.T @ x, kept)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(found, expected, atol=1e-2)
    wrong, cut = (((x[:, kept] @ each.T) - x @ weight.T).square().sum() for each in (found, weight[:, kept]))
    assert wrong < 0.85 * cut


@torch.no_grad()
def test_the_blocks_after_a_pruned_one_are_fitted_to_what_it_returns() -> None:
    """The changed large model computes what the small one does."""
    cfg = MODELS["qwen3"]
    model, batches = random_model(cfg), some_text(cfg)
    small = prune_model(model, pruned_config(cfg, heads=4, ffn=48), batches, quiet)
    assert torch.allclose(small(batches[0].tokens), model(batches[0].tokens), rtol=0, atol=1e-9)


def output(model: Decoder, batches: Any) -> Tensor:
    return torch.cat([model(batch.tokens) for batch in batches])


@torch.no_grad()
def test_importance_and_fit_help() -> None:
    """Against the first heads and channels, as they are."""
    cfg = replace(MODELS["llama, grouped keys"], n_layers=1)
    kept = pruned_config(cfg, heads=4, ffn=48)
    batches = some_text(cfg, rows=16)
    exact = output(random_model(cfg), batches)
    model = random_model(cfg)
    chosen = output(prune_model(model, kept, batches, quiet), batches)
    naive = random_model(cfg)
    for _, block, _ in walk(naive, batches):
        named = dict(block.named_parameters())
        named["attn.wo.weight"][:, 32:] = 0
        named["mlp.down.weight"][:, 48:] = 0
    assert (chosen - exact).square().mean() < 0.8 * (output(naive, batches) - exact).square().mean()


@pytest.mark.parametrize(
    ("heads", "ffn", "match"),
    [(3, None, "multiple of 2"), (0, None, "from 2 to 8"), (10, None, "from 2 to 8"), (None, 97, "from 1 to 96"),
     (None, 0, "from 1 to 96"), (None, None, "--heads N")],
)  # fmt: skip
def test_wrong_sizes_are_refused(heads: int | None, ffn: int | None, match: str) -> None:
    with pytest.raises(UserError, match=match):
        pruned_config(MODELS["llama, grouped keys"], heads=heads, ffn=ffn)
