"""Recomputation: the same gradients to the last bit, with less memory."""

import importlib
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.nn.config import DecoderConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.parallel.recompute import recompute_blocks
from megatrain_kernels import attention

CFG = DecoderConfig(
    n_layers=3, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=96, vocab_size=61, qk_norm=True
)
TOKENS = torch.randint(61, (4, 64), generator=torch.Generator().manual_seed(5))
Kind = Literal["none", "full", "selective"]


def make(kind: Kind, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(CFG).to(dtype)
    init_weights(model, CFG, seed=1)
    recompute_blocks(model, kind)
    return model


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    doc_ids = (torch.arange(64) // 20).expand(4, 64)
    model(TOKENS, targets=TOKENS.roll(-1, 1), doc_ids=doc_ids).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_gradients_are_bitwise_the_same(kind: Kind, dtype: torch.dtype) -> None:
    plain, recomputed = gradients(make("none", dtype)), gradients(make(kind, dtype))
    assert plain.keys() == recomputed.keys() == dict(make("none").named_parameters()).keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def kept_bytes(kind: Kind) -> int:
    """Memory that the forward pass leaves allocated."""
    model = make(kind)
    model(TOKENS, targets=TOKENS)  # what is allocated once and for all
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss = model(TOKENS, targets=TOKENS)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in measured.key_averages())


def test_less_is_kept() -> None:
    none, selective, full = (kept_bytes(kind) for kind in ("none", "selective", "full"))
    block_input = TOKENS.numel() * CFG.hidden_size * 4
    # Of each block only its input is left; what remains is of embedding, last norm and loss.
    assert full - (CFG.n_layers - 1) * block_input < 0.2 * none
    assert full < selective < 0.7 * none


def test_names_and_evaluation_stay() -> None:
    plain, recomputing = make("none"), make("full")
    assert recomputing.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(TOKENS), recomputing(TOKENS))


class Repeated(TorchDispatchMode):
    """Counts matrix products and forward passes of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.products += name == "aten::mm"
        self.attentions += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def test_what_is_dear_is_repeated_only_by_full_recomputation() -> None:
    tokens = torch.arange(2048)[None] % 61  # so long that attention is one fused operation
    counts = {}
    for kind in ("none", "selective", "full"):
        loss = make(kind)(tokens, targets=tokens)
        with Repeated() as repeated:
            loss.backward()
        counts[kind] = repeated
    assert counts["selective"].products == counts["none"].products
    # Six of a block's seven: nothing waits for the result of the last.
    assert counts["full"].products == counts["none"].products + 6 * CFG.n_layers
    assert [counts[kind].attentions for kind in counts] == [0, 0, CFG.n_layers]


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("full", 2), ("selective", 1)])
def test_the_registered_attention_is_kept(kind: Kind, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's fused attention cannot do (a soft-cap) runs as an operator of its own."""
    registered = importlib.import_module("megatrain_kernels.flash_attention.op")
    forward, calls = registered.chunked_forward, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(registered, "chunked_forward", counted)

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = attention(x, x, x, softcap=2.0)
            assert isinstance(out, torch.Tensor)
            return out.square()

    model = nn.Module()
    model.layers = nn.ModuleDict({"0": Block(), "1": Block()})
    recompute_blocks(model, kind)
    x = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.layers["1"](model.layers["0"](x)).sum().backward()
    assert len(calls) == 2 * times
