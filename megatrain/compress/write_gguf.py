"""A compressed model as a GGUF file, for llama.cpp and what is built on it.

Weights become F16, Q8_0 or Q4_0: blocks of 32 inputs of an output with a scale in fp16 each
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Codes and scales are those of the compression, so that no
weight is rounded a second time: a scale of several blocks, or of a whole output, is repeated in each of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.compress.codes import Codes
from megatrain.compress.gguf_tokenizer import add_tokenizer
from megatrain.compress.methods import Method, Quantization
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.nn.decoder import Decoder
from megatrain.train.inference import TrainedModel

BLOCK = 32
LLAMA_LAYER = {
    "attn_norm": "attn_norm",
    "attn.wq": "attn_q",
    "attn.wk": "attn_k",
    "attn.wv": "attn_v",
    "attn.wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""Parts of a layer: MegaTrain's name -> GGUF's."""
LAYERS: dict[str, dict[str, str]] = {
    "llama3": LLAMA_LAYER,
    "qwen3": LLAMA_LAYER | {"attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"},
    "gpt2": {
        name: theirs
        for name, theirs in LLAMA_LAYER.items()
        if name[:7] not in ("attn.wq", "attn.wk", "attn.wv")
    },
}
"""Families that are written."""
ENDS = {"embed": "token_embd", "pos_embed": "position_embd", "norm": "output_norm", "head": "output"}
ARCHITECTURES = {"llama3": "llama", "qwen3": "qwen3", "gpt2": "gpt2"}


def require_gguf(
    model: ModelConfig, names: list[str], method: Method, *, group: int | None, dtype: str
) -> None:
    """Refuse what a GGUF file cannot express, before any work is done.

    Raises:
        UserError: the family, an option of the model, the method, or a size.
    """
    if model.kind not in LAYERS:
        raise UserError(f"compress: --format gguf knows {', '.join(LAYERS)}, not {model.kind}")
    get_spec(model.kind).hf_config(model)
    if model.kind == "gpt2" and model.activation != "gelu_tanh":
        raise UserError(f"compress: GGUF's gpt2 has model.activation=gelu_tanh, not {model.activation}")
    if model.sliding_window is not None:
        raise UserError(f"compress: GGUF's {model.kind} has no sliding window (model.sliding_window)")
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind != "linear":
        raise UserError(f"compress: --format gguf knows linear rope_scaling alone, not {scaling.kind}")
    if dtype != "fp16":
        raise UserError(f"compress: --dtype {dtype}: GGUF's matrices and scales are in fp16 here")
    if not isinstance(method, Quantization):
        return
    if method.number == "e4m3" or method.quantizes_inputs:
        raise UserError("compress: --format gguf has 8-bit weights as int8, and inputs as they are")
    shapes = get_spec(model.kind).plan(model).shapes
    odd = [f"{name} {shapes[name][-1]}" for name in names if shapes[name][-1] % BLOCK]
    if odd or (group or BLOCK) % BLOCK:
        said = f"these have others: {', '.join(odd[:4])}" if odd else f"--group is {group}"
        raise UserError(f"compress: GGUF's blocks want inputs, and groups, in multiples of {BLOCK}; {said}")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, as bytes in its own type where it is quantized."""

    name: str
    values: np.ndarray
    kind: str
    """F32, F16, Q8_0 or Q4_0."""


def write_gguf(path: Path, trained: TrainedModel, codes: Mapping[str, Codes], name: str) -> int:
    """Write the model to the new file `path`; return the bytes that its tensors should have.

    Args:
        codes: of quantized parameters by canonical name; the others are taken from the model, matrices as F16.
        name: of the model, for those who read the file.
    """
    import gguf

    cfg = trained.cfg.model
    writer = gguf.GGUFWriter(path, ARCHITECTURES[cfg.kind])
    writer.add_name(name)
    _add_options(writer, cfg)
    add_tokenizer(writer, trained.tokenizer, cfg.vocab_size)
    total = 0
    for entry in entries(trained.parallel.models[0], cfg, codes):
        kind = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor(
            entry.name, entry.values, raw_dtype=kind if entry.values.dtype == np.uint8 else None
        )
        total += entry.values.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def _add_options(writer: Any, cfg: ModelConfig) -> None:
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.ffn_size)
    writer.add_head_count(cfg.n_heads)
    writer.add_vocab_size(cfg.vocab_size)
    if cfg.kind == "gpt2":
        writer.add_layer_norm_eps(cfg.norm_eps)
        return
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.qk_head_dim)
    writer.add_value_length(cfg.qk_head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.qk_head_dim)
    if cfg.rope_scaling is not None:
        writer.add_string(f"{ARCHITECTURES[cfg.kind]}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(cfg.rope_scaling.factor)


def entries(model: Decoder, cfg: ModelConfig, codes: Mapping[str, Codes]) -> Iterator[Entry]:
    """Yield the tensors of the file."""
    ours: dict[str, Tensor] = {name: each.detach() for name, each in model.named_parameters()}

    def entry(theirs: str, names: list[str], order: Callable[[Tensor], Tensor] = lambda rows: rows) -> Entry:
        if all(name in codes for name in names):
            values = order(torch.cat([codes[name].values.cpu() for name in names]))
            scales = order(torch.cat([codes[name].scales.cpu() for name in names]))
            kind = "Q4_0" if codes[names[0]].grid.number == "int4" else "Q8_0"
            return Entry(theirs, blocks(values, scales, kind), kind)
        whole = order(torch.cat([ours[name].cpu() for name in names]))
        kind = "F16" if whole.ndim == 2 else "F32"
        return Entry(theirs, whole.to(torch.float16 if kind == "F16" else torch.float32).numpy(), kind)

    for name, theirs in ENDS.items():
        for part in ("weight", "bias"):
            if f"{name}.{part}" in ours:
                yield entry(f"{theirs}.{part}", [f"{name}.{part}"])
    for layer in range(cfg.n_layers):
        at, to = f"layers.{layer}.", f"blk.{layer}."
        for part in ("weight", "bias"):
            if cfg.kind == "gpt2":
                yield entry(
                    f"{to}attn_qkv.{part}", [f"{at}attn.{name}.{part}" for name in ("wq", "wk", "wv")]
                )
            for name, theirs in LAYERS[cfg.kind].items():
                if f"{at}{name}.{part}" in ours:
                    is_turned = cfg.kind == "llama3" and name in ("attn.wq", "attn.wk")
                    turn = adjacent_pairs(cfg.qk_head_dim) if is_turned else lambda rows: rows
                    yield entry(f"{to}{theirs}.{part}", [f"{at}{name}.{part}"], turn)


def adjacent_pairs(head_dim: int) -> Callable[[Tensor], Tensor]:
    """Return what puts the two rows of a rotary pair beside each other, as llama.cpp's llama has them."""
    return lambda rows: rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def blocks(values: Tensor, scales: Tensor, kind: str) -> np.ndarray:
    """Return codes `(rows, cols)` with scales `(rows, groups)` as the bytes of blocks, uint8 `(rows, bytes)`.

    A block is its scale in fp16, then 32 signed bytes (Q8_0), or 16 bytes with the codes plus 8 of the first half in
    their low bits, and of the second half in the high ones (Q4_0).
    """
    rows, n_blocks = values.shape[0], values.shape[1] // BLOCK
    repeated = scales.repeat_interleave(n_blocks // scales.shape[1], 1)
    heads = repeated.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)
    tiled = values.view(rows, n_blocks, BLOCK)
    if kind == "Q8_0":
        body = tiled.contiguous().view(torch.uint8)
    else:
        shifted = (tiled + 8).to(torch.uint8)
        body = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
    found: np.ndarray = torch.cat([heads, body], -1).flatten(1).numpy()
    return found
