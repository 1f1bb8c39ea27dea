"""The weights of a decoder, from its config alone: shapes and roles, block by block."""

from functools import cache

from megatrain.nn.config import GATED, DecoderConfig, ExpertsConfig, MLAConfig
from megatrain.nn.contract import Attention, Plan, Role, Weight
from megatrain.nn.image_config import ConvolutionConfig, ImageModelConfig

Weights = dict[str, Weight]


@cache
def decoder_plan(cfg: DecoderConfig) -> Plan:
    """Return the plan of the decoder that `cfg` (a legal config) describes."""
    hidden = cfg.hidden_size
    is_tied = cfg.tie_embeddings and cfg.classifier is None
    table = Role.VOCABULARY | Role.EMBEDDING | (Role.TIED if is_tied else Role.REPLICATED)
    ends = {"embed": Weight((cfg.vocab_size, hidden), table, size_key="model.vocab_size")}
    if isinstance(cfg, ImageModelConfig):
        ends = {"patch": Weight((hidden, cfg.patch_size**2 * cfg.image_channels), bias=True)}
        ends["pos_embed"] = Weight((cfg.n_positions, hidden), Role.EMBEDDING)
    elif cfg.positions == "learned":
        ends["pos_embed"] = Weight((cfg.max_seq_len, hidden), Role.EMBEDDING)
    ends["norm"] = norm_weight(cfg)
    head = Role.VOCABULARY | Role.HEAD
    if cfg.classifier is not None:
        classes = cfg.classifier.n_classes
        ends["classifier"] = Weight((classes, hidden), head, size_key="model.classifier.labels")
    elif not is_tied:
        ends["head"] = Weight((cfg.vocab_size, hidden), head, size_key="model.vocab_size")
    layers = range(cfg.n_layers)
    attends = not isinstance(cfg, ConvolutionConfig)
    pair = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) if attends else 0
    return Plan(
        tuple(block_weights(cfg, layer) for layer in layers),
        ends,
        tuple(Attention(pair, cfg.window(layer)) for layer in layers),
    )


def block_weights(cfg: DecoderConfig, layer: int) -> Weights:
    """Return the weights of block `layer` by their names in it."""
    if cfg.has_experts(layer):
        feed_forward = _inside("moe", experts_weights(cfg))
    else:
        feed_forward = _inside("mlp", mlp_weights(cfg, cfg.ffn_size, "model.ffn_size"))
    attention = _inside("attn", attention_weights(cfg))
    return {"attn_norm": norm_weight(cfg), **attention, "mlp_norm": norm_weight(cfg), **feed_forward}


def norm_weight(cfg: DecoderConfig) -> Weight:
    """Return the weight of a norm over the residual stream."""
    return Weight((cfg.hidden_size,), Role.NORM, bias=cfg.norm == "layer")


def attention_weights(cfg: DecoderConfig) -> Weights:
    """Return the weights of one attention layer, or of the convolution in its place."""
    if cfg.mla is not None:
        return _mla_weights(cfg, cfg.mla)
    if isinstance(cfg, ConvolutionConfig):
        windows = cfg.hidden_size * cfg.kernel_size**2
        return {"conv": Weight((cfg.hidden_size, windows), Role.BRANCH_OUTPUT, bias=True)}
    hidden, dim = cfg.hidden_size, cfg.qk_head_dim
    q_size, kv_size = cfg.n_heads * dim, cfg.kv_heads * dim
    bias, serves = cfg.attention_bias, cfg.n_heads // cfg.kv_heads
    found = {
        "wq": Weight((q_size, hidden), Role.COLUMN, bias, dim, "model.n_heads"),
        "wk": Weight((kv_size, hidden), Role.COLUMN, bias, dim, "model.n_kv_heads", serves=serves),
        "wv": Weight((kv_size, hidden), Role.COLUMN, bias, dim, "model.n_kv_heads", serves=serves),
        "wo": Weight((hidden, q_size), Role.ROW | Role.BRANCH_OUTPUT, cfg.output_bias, dim, "model.n_heads"),
    }
    if cfg.qk_norm:
        found |= {name: Weight((dim,), Role.NORM) for name in ("q_norm", "k_norm")}
    return found


def _mla_weights(cfg: DecoderConfig, mla: MLAConfig) -> Weights:
    hidden, heads = cfg.hidden_size, cfg.n_heads
    q_size, kv_dim = heads * cfg.qk_head_dim, mla.qk_nope_head_dim + mla.v_head_dim
    found: Weights = {}
    if mla.q_lora_rank is None:
        found["wq"] = Weight((q_size, hidden), Role.COLUMN, False, cfg.qk_head_dim, "model.n_heads")
    else:
        found["wq_down"] = Weight((mla.q_lora_rank, hidden))
        found["q_norm"] = Weight((mla.q_lora_rank,), Role.NORM)
        found["wq_up"] = Weight(
            (q_size, mla.q_lora_rank), Role.COLUMN, False, cfg.qk_head_dim, "model.n_heads"
        )
    return found | {
        "wkv_down": Weight((mla.kv_lora_rank, hidden)),
        "kv_norm": Weight((mla.kv_lora_rank,), Role.NORM),
        "wkv_up": Weight((heads * kv_dim, mla.kv_lora_rank), Role.COLUMN, False, kv_dim, "model.n_heads"),
        "wk_rope": Weight((mla.qk_rope_head_dim, hidden)),
        "wo": Weight(
            (hidden, heads * mla.v_head_dim),
            Role.ROW | Role.BRANCH_OUTPUT,
            False,
            mla.v_head_dim,
            "model.n_heads",
        ),
    }


def mlp_weights(cfg: DecoderConfig, ffn_size: int, size_key: str) -> Weights:
    """Return the weights of a feed-forward block of width `ffn_size`."""
    hidden, bias = cfg.hidden_size, cfg.mlp_bias
    inner = ("gate", "up") if cfg.activation in GATED else ("up",)
    found = {name: Weight((ffn_size, hidden), Role.COLUMN, bias, 1, size_key) for name in inner}
    return found | {"down": Weight((hidden, ffn_size), Role.ROW | Role.BRANCH_OUTPUT, bias, 1, size_key)}


def experts_weights(cfg: DecoderConfig) -> Weights:
    """Return the weights of one mixture of experts."""
    experts = cfg.experts
    assert isinstance(experts, ExpertsConfig)
    stack, hidden, size = experts.n_experts, cfg.hidden_size, cfg.expert_ffn_size
    column, row = Role.COLUMN | Role.EXPERT, Role.ROW | Role.EXPERT | Role.BRANCH_OUTPUT
    options = {"size_key": "the experts' ffn_size", "active": experts.top_k}
    found = {
        "router": Weight((stack, hidden)),
        "experts.gate": Weight((stack, size, hidden), column, **options),  # type: ignore[arg-type]
        "experts.up": Weight((stack, size, hidden), column, **options),  # type: ignore[arg-type]
        "experts.down": Weight((stack, hidden, size), row, **options),  # type: ignore[arg-type]
    }
    if experts.n_shared_experts:
        shared = mlp_weights(cfg, experts.n_shared_experts * size, "the shared experts' ffn_size")
        found |= _inside("shared", shared)
    return found


def _inside(module: str, weights: Weights) -> Weights:
    return {f"{module}.{name}": weight for name, weight in weights.items()}


def part_of(weights: Weights, module: str) -> Weights:
    """Return the weights of the submodule `module` by their names in it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
