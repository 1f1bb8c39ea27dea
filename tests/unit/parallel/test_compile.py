"""Compilation of the blocks: the same gradients under the same names, and one graph for all blocks."""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from megatrain.models.gpt2.config import GPT2Config
from megatrain.nn.config import DecoderConfig, ExpertsConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.apply import parallelize
from megatrain.parallel.config import ParallelConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn

CFG = DecoderConfig(
    n_layers=3, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61, qk_norm=True
)
GPT2 = GPT2Config(n_layers=3, hidden_size=32, n_heads=4, ffn_size=48, vocab_size=61, max_seq_len=16)
EXPERTS = replace(CFG, experts=ExpertsConfig(n_experts=4, top_k=2, ffn_size=24, aux_loss=0.01))
TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(5))
DOC_IDS = (torch.arange(16) // 7).expand(2, 16)


def make(cfg: DecoderConfig = CFG) -> Decoder:
    model = Decoder(cfg)
    init_weights(model, decoder_plan(cfg), seed=1)
    return model


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    model(TOKENS, targets=TOKENS.roll(-1, 1), doc_ids=DOC_IDS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(model_cfg: DecoderConfig, recompute: str = "none") -> None:
    torch._dynamo.reset()
    counters.clear()
    model = make(model_cfg)
    cfg = ParallelConfig(activation_checkpointing=recompute, compile=True)  # type: ignore[arg-type]
    parallelize(lambda: model, decoder_plan(model_cfg), None, cfg, seq_len=16, compute_dtype=torch.float32)
    got, expected = gradients(model), gradients(make(model_cfg))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # Float32 sums in another order.
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


def check(model_cfg: DecoderConfig, recompute: str) -> None:
    check_gradients(model_cfg, recompute)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing and differentiation as in earnest; the graph is then run as it is, which needs no compiler."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("model_cfg", [CFG, GPT2], ids=["llama", "gpt2"])
@pytest.mark.usefixtures("no_code")
def test_without_code_generation(model_cfg: DecoderConfig, recompute: str) -> None:
    check(model_cfg, recompute)


@pytest.mark.usefixtures("no_code")
def test_experts_break_the_graph_at_the_count_of_their_load_alone() -> None:
    check_gradients(EXPERTS)
    (reason,) = counters["graph_break"]
    assert "BalancePoint.forward" in reason


@pytest.mark.slow  # about a minute of C++ compilation
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_in_earnest(recompute: str) -> None:
    check(CFG, recompute)
