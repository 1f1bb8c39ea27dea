"""Initial weights: what each parameter starts as, whole or in parts."""

from dataclasses import replace

import pytest
import torch

from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import Shard, init_weights
from megatrain.nn.plan import decoder_plan

CFG = DecoderConfig(
    n_layers=8,
    hidden_size=64,
    n_heads=4,
    ffn_size=96,
    vocab_size=128,
    max_seq_len=32,
    norm="layer",
    positions="learned",
    tie_embeddings=False,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    init_std=0.03,
)


def make(cfg: DecoderConfig = CFG, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Decoder(cfg)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # so that one left out is seen
    init_weights(model, decoder_plan(cfg), seed=seed)
    return dict(model.named_parameters())


def test_roles() -> None:
    deep = 0.03 / 4  # sqrt(2 · 8 layers)
    for name, parameter in make().items():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            std = deep if name.endswith(("attn.wo.weight", "mlp.down.weight")) else 0.03
            # The smallest matrix has 2,048 elements: five standard errors are 8 %.
            assert parameter.std().item() == pytest.approx(std, rel=0.08), name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name


def test_experts_and_latent_attention() -> None:
    """Each matrix of a stack is normal; only what adds to the residual stream is scaled by depth."""
    moe = ExpertsConfig(n_experts=3, ffn_size=48, n_shared_experts=1, bias_rate=0.1)
    latent = MLAConfig(
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32
    )
    cfg = DecoderConfig(
        n_layers=8,
        hidden_size=64,
        n_heads=4,
        ffn_size=96,
        vocab_size=128,
        init_std=0.03,
        experts=moe,
        mla=latent,
    )
    model = Decoder(cfg)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    init_weights(model, decoder_plan(cfg), seed=0)
    outputs = ("attn.wo.weight", "moe.experts.down", "moe.shared.down.weight")
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            assert (tensor == (0 if name.endswith("expert_bias") else 1)).all(), name
            continue
        std = 0.03 / 4 if name.endswith(outputs) else 0.03
        for matrix in tensor if tensor.ndim == 3 else [tensor]:
            # Five standard errors of what is smallest here, the router's 192 elements: 26 %.
            assert matrix.std().item() == pytest.approx(std, rel=5 / (2 * matrix.numel()) ** 0.5), name


def test_without_depth_scaling_all_matrices_are_alike() -> None:
    plain = make(replace(CFG, init_scaling="none"))
    assert plain["layers.3.attn.wo.weight"].std().item() == pytest.approx(0.03, rel=0.08)


def test_no_two_parameters_and_no_two_seeds_share_values() -> None:
    matrices = {name: p for name, p in make().items() if p.ndim == 2}
    other = make(seed=1)
    firsts = {round(p[0, 0].item(), 12) for p in [*matrices.values(), *(other[name] for name in matrices)]}
    assert len(firsts) == 2 * len(matrices)


def test_a_parameter_depends_on_nothing_but_seed_and_name() -> None:
    """Not on the depth of the model, nor on what else is in it."""
    torch.manual_seed(11)
    shallow = make(replace(CFG, n_layers=2, init_scaling="none", tie_embeddings=True))
    deep = make(replace(CFG, init_scaling="none"))
    for name, parameter in shallow.items():
        assert torch.equal(parameter, deep[name]), name


@pytest.mark.parametrize("dim", [0, 1])
def test_two_halves_are_the_whole(dim: int) -> None:
    halves = []
    for half in (0, 1):

        def shard_of(name: str, parameter: torch.Tensor, half: int = half) -> Shard:
            cut = min(dim, parameter.ndim - 1)
            size = parameter.shape[cut] // 2
            offsets = [0] * parameter.ndim
            offsets[cut] = half * size
            return Shard(parameter.data.narrow(cut, half * size, size), parameter.shape, offsets)

        model = Decoder(CFG)
        for parameter in model.parameters():
            parameter.data.zero_()
        init_weights(model, decoder_plan(CFG), seed=0, shard_of=shard_of)
        halves.append(dict(model.named_parameters()))
    for name, whole in make().items():
        assert torch.equal(halves[0][name] + halves[1][name], whole), name  # the other half is 0
