"""Products of one input, computed together as on a GPU: the same numbers as one by one, wherever that is possible."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.nn import joined
from megatrain.nn.config import DecoderConfig
from megatrain.nn.contract import Weight
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.joined import joined_products, separate_products
from megatrain.nn.layer import Linear, replace_seam
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.activation_checkpointing import _keep_and_replay
from megatrain.parallel.float8 import Float8, float8_linear
from megatrain.parallel.pipeline import keep_products_apart

BASE = DecoderConfig(
    n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=64, init_std=0.3
)
OPTIONS: dict[str, dict[str, Any]] = {
    "like Llama": {},
    "like Qwen": {"qk_norm": True, "attention_bias": True},
    "like GPT-2": {
        "norm": "layer",
        "activation": "gelu_tanh",
        "positions": "learned",
        "max_seq_len": 16,
        "n_kv_heads": None,
        **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True),
    },
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    monkeypatch.setattr(joined, "ROWS", 12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each joined product: whether it is a single one."""
    found: list[bool] = []
    apply = joined._Products.apply

    def counted(rows: Tensor, at_once: bool, *more: Any) -> Any:
        found.append(at_once)
        return apply(rows, at_once, *more)

    monkeypatch.setattr(joined._Products, "apply", counted)
    return found


def layers(bias: bool) -> list[Linear]:
    torch.manual_seed(1)
    return [Linear(Weight((size, 8), bias=bias)).double() for size in (6, 3, 5)]


def results(
    run: Callable[[Tensor, Sequence[Linear]], tuple[Tensor, ...]], x: Tensor, parts: list[Linear]
) -> list[Tensor]:
    outputs = run(x, parts)
    wanted = [p for p in (x, *nn.ModuleList(parts).parameters()) if p.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted)]  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("frozen", ["nothing", "input", "one weight", "all weights"])
def test_the_same_numbers(frozen: str, rows: int, bias: bool, calls: list[bool]) -> None:
    """From 12 rows on by a single product; to roundings of float64."""
    parts, x = layers(bias), torch.randn(rows, 3, 8, dtype=torch.float64, requires_grad=frozen != "input")
    for part in {"one weight": parts[1:2], "all weights": parts}.get(frozen, []):
        part.requires_grad_(False)
    true, mine = (results(run, x, parts) for run in (separate_products, joined_products))
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    assert calls == [rows == 4]


def test_a_product_that_something_changes_stays_alone(calls: list[bool]) -> None:
    x = torch.randn(4, 3, 8, dtype=torch.float64)

    def changed(change: Callable[[Linear], object]) -> list[Linear]:
        parts = layers(True)
        change(parts[1])
        return parts

    for change in (
        lambda part: replace_seam(part, "product", lambda x, w, b: x @ w.T * 2),
        lambda part: replace_seam(part, "adapter", nn.Linear(8, 3, dtype=torch.float64)),
        lambda part: part.register_forward_hook(lambda *_: None),
        lambda part: part.register_forward_pre_hook(lambda *_: None),
    ):
        parts = changed(change)
        torch.testing.assert_close(joined_products(x, parts), separate_products(x, parts))
    with torch.no_grad():
        joined_products(x, layers(True))
    with torch.autocast("cpu", torch.bfloat16):
        assert joined_products(x.float(), [part.float() for part in layers(True)])[0].dtype == torch.bfloat16
    fp8 = layers(True)
    for part in fp8:
        replace_seam(part, "product", lambda x, w, b: float8_linear(x, w, b, options=Float8("row")))
    joined_products(x.float(), [part.float() for part in fp8])
    assert calls == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_whole_models(kind: str, calls: list[bool]) -> None:
    """Loss and every gradient, with selective checkpointing too."""
    cfg = replace(BASE, **OPTIONS[kind])
    model = Decoder(cfg).double()
    init_weights(model, decoder_plan(cfg), seed=1)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2))

    def run() -> list[Tensor]:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    mine = run()
    each = 1 if kind == "like GPT-2" else 2  # attention, and the gated feed-forward block
    assert calls == [True] * each * model.cfg.n_layers
    for _, block in model.blocks():
        replace_seam(block, "run", lambda body, *args: checkpoint(
            body, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_and_replay
        ))  # fmt: skip
    torch.testing.assert_close(run(), mine, rtol=1e-12, atol=1e-12)
    for module in model.modules():
        if "products" in getattr(module, "SEAMS", ()):
            replace_seam(module, "products", separate_products)
    torch.testing.assert_close(run(), mine, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_it_compiles_whole() -> None:
    parts, x = layers(True), torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: joined_products(x, parts), fullgraph=True, backend="aot_eager")
    true, mine = (results(run, x, parts) for run in (separate_products, lambda x, _: compiled(x)))
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_a_split_backward_pass_keeps_products_apart(calls: list[bool]) -> None:
    model = Decoder(BASE)
    keep_products_apart(model)
    model(torch.zeros(1, 16, dtype=torch.int64))
    assert calls == []
