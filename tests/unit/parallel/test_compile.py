"""Compilation of the blocks: the same gradients under the same names, and one graph for all blocks."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from megatrain.nn.config import DecoderConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.apply import parallelize
from megatrain.parallel.config import ParallelConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn

CFG = DecoderConfig(
    n_layers=3, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61, qk_norm=True
)
TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(5))
DOC_IDS = (torch.arange(16) // 7).expand(2, 16)


def make() -> Decoder:
    model = Decoder(CFG)
    init_weights(model, decoder_plan(CFG), seed=1)
    return model


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    model(TOKENS, targets=TOKENS.roll(-1, 1), doc_ids=DOC_IDS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(recompute: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = make()
    cfg = ParallelConfig(activation_checkpointing=recompute, compile=True)  # type: ignore[arg-type]
    parallelize(lambda: model, decoder_plan(CFG), None, cfg, seq_len=16, compute_dtype=torch.float32)
    got, expected = gradients(model), gradients(make())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # Float32 sums in another order.
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_without_code_generation(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing and differentiation as in earnest; the graph is then run as it is, which needs no compiler."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    check(recompute)


@pytest.mark.slow  # about a minute of C++ compilation
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_in_earnest(recompute: str) -> None:
    check(recompute)
