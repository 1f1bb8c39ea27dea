"""A compressed model as a Hugging Face directory; quantized weights are in the format of compressed-tensors.

Transformers reads it (with the package compressed-tensors), and so do the verbs of MegaTrain.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.reader import TensorSpec
from megatrain.checkpoint.safetensors_file import write_shards
from megatrain.compress.codes import BITS, Codes, Grid
from megatrain.compress.methods import Quantization
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import HuggingFaceTokenizer
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.models.spec import Rule, Stack, WeightMap
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.train.export import CONFIG, DTYPES, HF_DTYPES
from megatrain.train.hf_files import write_json
from megatrain.train.inference import TrainedModel
from megatrain.train.quantized_files import pack_words

SHARD_BYTES = 5 * 10**9


def require_expressible(model: ModelConfig, names: list[str], method: Quantization | None) -> None:
    """Refuse a model that the format cannot express, before any work is done.

    Raises:
        UserError: it has options that Hugging Face's format lacks, or stores quantized layers transposed.
    """
    spec = get_spec(model.kind)
    mapping = spec.weights(model)
    spec.hf_config(model)
    if method is None:
        return
    if any(rule.transpose for rule in mapping.rules if set(rule.ours) & set(names)):
        raise UserError(
            f"compress: Hugging Face's {spec.hf_type} stores weights transposed, which no quantized format there does. "
            "Write a GGUF file (--format gguf), or another method"
        )
    tied = next(iter(mapping.repeats.values()), None)
    if tied is not None and "embed.weight" in names:
        raise UserError(
            "compress: --head: embedding and head share their weight, and the Hugging Face format has no quantized "
            "embedding; --format gguf has"
        )


def write_hf(
    directory: Path,
    trained: TrainedModel,
    codes: Mapping[str, Codes],
    method: Quantization | None,
    dtype: str,
) -> int:
    """Write the model into `directory`, which exists; return the bytes that its tensors should have.

    Args:
        codes: of quantized parameters by canonical name; the others are taken from the model.
        dtype: of what is not quantized: a key of `DTYPES`.
    """
    cfg, model = trained.cfg.model, trained.parallel.models[0]
    spec = get_spec(cfg.kind)
    mapping = spec.weights(cfg)
    config = spec.hf_config(cfg) | {"eos_token_id": trained.tokenizer.eos_id, "dtype": HF_DTYPES[dtype]}
    if isinstance(trained.tokenizer, HuggingFaceTokenizer):
        trained.tokenizer.save_pretrained(directory)
    if method is not None:
        grid = next(iter(codes.values())).grid
        config["quantization_config"] = _quantization_config(
            grid, method, _unquantized(mapping, spec.plan(cfg), codes)
        )
    write_json(directory / CONFIG, config)
    tensors = dict(_tensors(mapping, model, codes, DTYPES[dtype], packs=_packs(method)))
    specs = {name: TensorSpec(each.dtype, each.shape) for name, each in tensors.items()}
    write_shards(directory, specs, tensors.items(), shard_bytes=SHARD_BYTES, metadata={"format": "pt"})
    return sum(each.nbytes for each in specs.values())


def _tensors(
    mapping: WeightMap, model: Decoder, codes: Mapping[str, Codes], dtype: torch.dtype, *, packs: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the files under its name there."""
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts: list[Rule | Stack] = [*mapping.rules, *mapping.stacks]
    for part in parts:
        names = part.ours if isinstance(part, Rule) else (part.ours,)
        alone = replace(
            mapping,
            rules=(part,) if isinstance(part, Rule) else (),
            stacks=(part,) if isinstance(part, Stack) else (),
        )
        if not set(names) <= codes.keys():
            found = alone.export({name: ours[name].detach() for name in names})
            yield from ((name, tensor.to(dtype).contiguous().cpu()) for name, tensor in found.items())
            continue
        # Codes and scales have the rows of the weight, and move with them.
        values = alone.export({name: codes[name].values.cpu() for name in names})
        scales = alone.export({name: codes[name].scales.cpu() for name in names})
        grid = codes[names[0]].grid
        for name in values:
            if packs:
                yield f"{name}_packed", pack_words(values[name], BITS[grid.number])
                yield f"{name}_shape", torch.tensor(values[name].shape, dtype=torch.int64)
            else:
                yield name, values[name].contiguous()
            yield f"{name}_scale", scales[name].to(grid.scale_dtype).contiguous()


def _packs(method: Quantization | None) -> bool:
    """Tell whether codes are packed into words: whole numbers whose layers' inputs are not quantized, as vLLM wants."""
    return method is not None and method.number != "e4m3" and not method.quantizes_inputs


def _unquantized(mapping: WeightMap, plan: Plan, codes: Mapping[str, Codes]) -> list[str]:
    """Return Hugging Face's names of the products that stay as they are: the head, and routers."""
    products = {f"{at}.weight" for at, weight in plan.weights.items() if weight.is_product}
    others = products - codes.keys()
    kept = [rule.theirs.removesuffix(".weight") for rule in mapping.rules if set(rule.ours) & others]
    return [*kept, "lm_head"] if "head.weight" not in codes and "lm_head" not in kept else kept


def _quantization_config(grid: Grid, method: Quantization, ignored: list[str]) -> dict[str, Any]:
    """Return `quantization_config` of config.json."""
    is_float, codes = grid.number == "e4m3", "pack-quantized" if _packs(method) else "int-quantized"
    common = {"num_bits": BITS[grid.number], "type": "float" if is_float else "int", "symmetric": True}
    weights = common | {
        "strategy": "channel" if grid.group is None else "group",
        "group_size": grid.group,
        "dynamic": False,
        "observer": "minmax",
    }
    inputs = common | {"strategy": "token", "dynamic": True} if method.quantizes_inputs else None
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if is_float else codes,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
