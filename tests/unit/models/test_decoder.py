"""Options of the decoder against their formulas, and its loss against its logits."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig, RopeScaling
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.plan import decoder_plan
from megatrain.nn.rope import rope_frequencies

BASE = DecoderConfig(
    n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61, init_std=0.3
)
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
OPTIONS: dict[str, dict[str, object]] = {
    "base": {},
    "qk norm": {"qk_norm": True},
    "untied": {"tie_embeddings": False},
    "layer norm": {"norm": "layer"},
    "gelu": {"activation": "gelu", "mlp_bias": True},
    "gelu tanh": {"activation": "gelu_tanh"},
    "gated with biases": {"mlp_bias": True},
    "wide heads": {"head_dim": 10, "qk_norm": True, "norm_eps": 0.1},
    "relu2": {"activation": "relu2"},
    "learned positions": {"positions": "learned", "max_seq_len": 24},
    "window": {"sliding_window": 3},
    "window in some layers": {"n_layers": 4, "sliding_window": 3, "full_attention_every": 2},
    "softcap": {"logit_softcap": 2.0},
    "scales": {"residual_scale": 0.5, "embedding_scale": 3.0},
    "scales, layer norm": {"residual_scale": 0.5, "norm": "layer"},
    "biases": {"attention_bias": True, "output_bias": True},
    "latent attention": {"mla": MLAConfig(**LATENT), "n_kv_heads": None, "norm_eps": 0.1},
    "latent attention, queries too, yarn": {
        "mla": MLAConfig(**LATENT | {"q_lora_rank": 14}),
        "n_kv_heads": None,
        "sliding_window": 9,
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16, mscale=0.7),
    },
    "experts": {"experts": ExpertsConfig(n_experts=5, top_k=2)},
    "all kinds of layers": {
        "n_layers": 4,
        "experts": ExpertsConfig(
            n_experts=3, top_k=1, ffn_size=20, n_shared_experts=2, first_k_dense=1, layer_frequency=2
        ),
    },
    "sigmoid experts in groups": {
        "experts": ExpertsConfig(
            n_experts=6,
            top_k=3,
            routing="sigmoid",
            n_groups=3,
            top_groups=2,
            routed_scale=2.5,
            bias_rate=0.1,
        )
    },
    "experts with their own scores": {"experts": ExpertsConfig(n_experts=4, top_k=3, normalize_top_k=False)},
}


def make(**options: object) -> tuple[Decoder, DecoderConfig]:
    cfg = replace(BASE, **options)  # type: ignore[arg-type]
    model = Decoder(cfg).double()
    init_weights(model, decoder_plan(cfg), seed=1)
    return model, cfg


def draw_tokens() -> torch.Tensor:
    return torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_is_the_cross_entropy_of_the_logits(name: str) -> None:
    model, _ = make(**OPTIONS[name])
    tokens = draw_tokens()
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100
    logits = model(tokens)
    truth = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets=targets), truth)


def written_out(cfg: DecoderConfig, w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Logits `(seq, vocab)` of one sequence, head by head and token by token, straight from the papers."""
    x = torch.stack([w["embed.weight"][token] for token in tokens]) * cfg.embedding_scale
    if cfg.positions == "learned":
        x = x + w["pos_embed.weight"][: len(tokens)]
    for layer in range(cfg.n_layers):
        own = {key.removeprefix(f"layers.{layer}."): value for key, value in w.items()}
        mix = attention if cfg.mla is None else latent_attention
        every = cfg.full_attention_every
        is_full = every is not None and layer in range(every - 1, cfg.n_layers, every)
        kind = replace(cfg, sliding_window=None, full_attention_every=None) if is_full else cfg
        x = x + cfg.residual_scale * mix(kind, own, norm(cfg, own, "attn_norm", x))
        y = norm(cfg, own, "mlp_norm", x)
        moe = cfg.experts
        if moe is None or layer < moe.first_k_dense or layer % moe.layer_frequency:
            x = x + cfg.residual_scale * feed_forward(cfg, own, y)
        else:
            x = x + cfg.residual_scale * torch.stack([mixture(cfg, moe, own, token) for token in y])
    logits = norm(cfg, w, "norm", x) @ w["embed.weight" if cfg.tie_embeddings else "head.weight"].T
    return logits if cfg.logit_softcap is None else cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)


def norm(cfg: DecoderConfig, w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    if cfg.norm == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + cfg.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * w[f"{name}.weight"]


def project(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def attention(cfg: DecoderConfig, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    size, rotate = cfg.qk_head_dim, cfg.positions == "rope"
    q, k, v = (project(w, f"attn.{name}", x).view(len(x), -1, size) for name in ("wq", "wk", "wv"))
    out = torch.zeros_like(q)
    for head in range(cfg.n_heads):
        group = head // (cfg.n_heads // cfg.kv_heads)
        queries, keys = q[:, head], k[:, group]
        if cfg.qk_norm:
            both = (("attn.q_norm.weight", queries), ("attn.k_norm.weight", keys))
            queries, keys = (
                y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * w[n] for n, y in both
            )
        for i in range(len(x)):
            first = 0 if cfg.sliding_window is None else max(0, i - cfg.sliding_window + 1)
            turned = [turn(cfg, keys[j], j) if rotate else keys[j] for j in range(first, i + 1)]
            query = turn(cfg, queries[i], i) if rotate else queries[i]
            weights = torch.softmax(torch.stack(turned) @ query / math.sqrt(size), 0)
            out[i, head] = weights @ v[first : i + 1, group]
    return project(w, "attn.wo", out.flatten(1))


def latent_attention(cfg: DecoderConfig, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Equations 37 to 47 of DeepSeek-V2, one head and one pair of tokens at a time."""
    mla = cfg.mla
    assert mla is not None
    nope, v_size, size = mla.qk_nope_head_dim, mla.v_head_dim, cfg.qk_head_dim
    queries = x
    if mla.q_lora_rank is not None:
        queries = norm(replace(cfg, norm="rms"), w, "attn.q_norm", project(w, "attn.wq_down", x))
    q = project(w, "attn.wq" if mla.q_lora_rank is None else "attn.wq_up", queries).view(len(x), -1, size)
    compressed = norm(cfg, w, "attn.kv_norm", project(w, "attn.wkv_down", x))
    kv = project(w, "attn.wkv_up", compressed).view(len(x), -1, nope + v_size)
    shared = project(w, "attn.wk_rope", x)
    temperature = 1.0
    if cfg.rope_scaling is not None:
        assert cfg.rope_scaling.mscale is not None
        temperature = (0.1 * cfg.rope_scaling.mscale * math.log(cfg.rope_scaling.factor) + 1) ** 2
    out = torch.zeros(len(x), cfg.n_heads, v_size, dtype=x.dtype)
    for head in range(cfg.n_heads):
        for i in range(len(x)):
            first = 0 if cfg.sliding_window is None else max(0, i - cfg.sliding_window + 1)
            scores = [
                kv[j, head, :nope] @ q[i, head, :nope]
                + turn(cfg, shared[j], j) @ turn(cfg, q[i, head, nope:], i)
                for j in range(first, i + 1)
            ]
            weights = torch.softmax(torch.stack(scores) * temperature / math.sqrt(size), 0)
            out[i, head] = weights @ kv[first : i + 1, head, nope:]
    return project(w, "attn.wo", out.flatten(1))


def turn(cfg: DecoderConfig, x: torch.Tensor, position: int) -> torch.Tensor:
    """Each pair (i, i + half) of a head is a complex number, turned by position · theta^(-2i/size)."""
    half = cfg.rope_size // 2
    angles = position * cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if cfg.rope_scaling is not None:  # tested against transformers'
        angles = position * rope_frequencies(2 * half, cfg.rope_theta, cfg.rope_scaling)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def feed_forward(cfg: DecoderConfig, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    up = project(w, "mlp.up", x)
    if cfg.activation == "swiglu":
        gate = project(w, "mlp.gate", x)
        return project(w, "mlp.down", gate / (1 + torch.exp(-gate)) * up)
    formulas = {
        "gelu": 0.5 * up * (1 + torch.erf(up / math.sqrt(2))),
        "gelu_tanh": 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
        "relu2": up.clamp_min(0) ** 2,
    }
    return project(w, "mlp.down", formulas[cfg.activation])


def mixture(
    cfg: DecoderConfig, moe: ExpertsConfig, w: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """One token through its experts, chosen by sorting."""
    logits = w["moe.router.weight"] @ x
    scores = 1 / (1 + torch.exp(-logits)) if moe.routing == "sigmoid" else torch.softmax(logits, 0)
    biased = (scores + w.get("moe.expert_bias", torch.zeros(()))).tolist()
    size = moe.n_experts // moe.n_groups
    groups = [range(first, first + size) for first in range(0, moe.n_experts, size)]
    groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
    allowed = [e for group in groups[: moe.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: moe.top_k]
    factor = moe.routed_scale / (scores[chosen].sum() if moe.normalize_top_k else 1)
    out = torch.zeros_like(x)
    for e in chosen:
        gate, up = w["moe.experts.gate"][e] @ x, w["moe.experts.up"][e] @ x
        out = out + factor * scores[e] * (w["moe.experts.down"][e] @ (gate / (1 + torch.exp(-gate)) * up))
    if moe.n_shared_experts:
        gate, up = w["moe.shared.gate.weight"] @ x, w["moe.shared.up.weight"] @ x
        out = out + w["moe.shared.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_the_formulas(name: str) -> None:
    model, cfg = make(**OPTIONS[name])
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for key, parameter in model.state_dict().items():  # also norms and biases, which start at 1 and 0
        noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        weights[key] = parameter.add_(noise)
    tokens = draw_tokens()[:1]
    # cos and sin are made in float32.
    torch.testing.assert_close(
        model(tokens)[0], written_out(cfg, weights, tokens[0].tolist()), rtol=1e-5, atol=1e-5
    )


def test_z_loss_is_added_to_each_token() -> None:
    model, _ = make(logit_softcap=5.0)
    tokens = draw_tokens()
    targets = tokens.roll(-1, 1)
    targets[1, 7:] = -100
    lse = torch.logsumexp(model(tokens)[targets != -100], -1)
    expected = model(tokens, targets=targets) + 0.01 * lse.square().sum()
    torch.testing.assert_close(model(tokens, targets=targets, z_loss=0.01), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_sees_the_future(name: str) -> None:
    model, _ = make(**OPTIONS[name])
    tokens = draw_tokens()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_a_packed_document_equals_the_document_alone() -> None:
    model, _ = make(qk_norm=True)
    tokens = draw_tokens()[:1]
    doc_ids = torch.tensor([[0] * 9 + [1] * 15])
    positions = torch.tensor([[*range(9), *range(15)]])
    packed = model(tokens, positions=positions, doc_ids=doc_ids)
    torch.testing.assert_close(packed[:, :9], model(tokens[:, :9]))
    torch.testing.assert_close(packed[:, 9:], model(tokens[:, 9:]))


def test_a_window_forgets() -> None:
    model, _ = make(sliding_window=3, n_layers=1)
    tokens = draw_tokens()[:1]
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    torch.testing.assert_close(model(tokens)[:, 3:], model(changed)[:, 3:])
