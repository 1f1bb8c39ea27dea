"""The closed form of a step's FLOPs against torch's counter, which watches the operations as they run."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatrain.models.flops import attention_pairs, flops_per_token, n_embedding_parameters, n_params
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig
from megatrain.nn.decoder import Decoder

CONFIGS = {
    "gated, grouped heads": DecoderConfig(
        n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=64
    ),
    "plain, untied, wide heads": DecoderConfig(
        n_layers=1, hidden_size=32, n_heads=2, head_dim=24, ffn_size=64, vocab_size=96, activation="gelu",
        tie_embeddings=False,
    ),
    "biases, layer norm, learned positions": DecoderConfig(
        n_layers=2, hidden_size=32, n_heads=4, ffn_size=64, vocab_size=96, activation="gelu_tanh", norm="layer",
        positions="learned", max_seq_len=16, attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
    ),
    "latent attention": DecoderConfig(
        n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, vocab_size=64,
        mla=MLAConfig(
            q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=20
        ),
    ),
    "experts": DecoderConfig(
        n_layers=3, hidden_size=32, n_heads=4, ffn_size=48, vocab_size=64,
        experts=ExpertsConfig(n_experts=4, top_k=2, ffn_size=24, n_shared_experts=1, first_k_dense=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_counter(name: str) -> None:
    cfg = CONFIGS[name]
    model = Decoder(cfg)
    tokens = torch.zeros(3, 16, dtype=torch.int64)  # so short that every query is multiplied with every key
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    assert counter.get_total_flops() == flops_per_token(cfg, 16, causal=False) * tokens.numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_by_counting(name: str) -> None:
    with torch.device("meta"):
        model = Decoder(CONFIGS[name])
    assert n_params(CONFIGS[name]) == sum(p.numel() for p in model.parameters())


def test_a_causal_model_of_one_token_is_a_full_one() -> None:
    for cfg in CONFIGS.values():
        assert flops_per_token(cfg, 1, causal=True) == flops_per_token(cfg, 1, causal=False)


def test_llama_3_8b() -> None:
    """6 FLOPs a weight that is multiplied with, and 12 a layer, dimension and visible key (PaLM, appendix B)."""
    cfg = Llama3Config(n_layers=32, hidden_size=4096, n_heads=32, n_kv_heads=8, ffn_size=14336)
    weights = n_params(cfg) - n_embedding_parameters(cfg) - 65 * 4096  # without the norms
    assert weights == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    for causal, keys in ((False, 8192), (True, 8193 / 2)):
        expected = 6 * weights + 12 * 32 * 4096 * keys
        assert flops_per_token(cfg, 8192, causal=causal) == pytest.approx(expected, rel=1e-12)


def test_layers_with_and_without_a_window_count_their_own_pairs() -> None:
    cfg = Llama3Config(n_layers=5, hidden_size=64, n_heads=4, n_kv_heads=2, ffn_size=96, vocab_size=100)
    mixed = replace(cfg, sliding_window=3, full_attention_every=2)  # layers 1 and 3 see all
    full, windowed = (flops_per_token(each, 8, causal=True) for each in (cfg, replace(cfg, sliding_window=3)))
    assert flops_per_token(mixed, 8, causal=True) == pytest.approx((2 * full + 3 * windowed) / 5, rel=1e-12)


@pytest.mark.parametrize(("seq", "window"), [(1, None), (7, None), (7, 3), (7, 9), (10, 1)])
def test_pairs_by_counting(seq: int, window: int | None) -> None:
    counted = sum(1 for i in range(seq) for j in range(i + 1) if window is None or i - j < window)
    assert attention_pairs(seq, causal=True, window=window) == counted
