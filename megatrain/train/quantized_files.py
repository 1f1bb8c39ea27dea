"""Quantized weights in safetensors files, in the format of compressed-tensors, and reading them as numbers.

A quantized matrix `NAME.weight` `(out, in)` is stored in one of two ways, with `NAME.weight_scale` `(out, groups)`:

| format | tensors |
|---|---|
| pack-quantized | `NAME.weight_packed` int32 `(out, words)` and `NAME.weight_shape` int64 `(2,)` |
| int-quantized, float-quantized | `NAME.weight` int8 or e4m3 |

A word holds whole numbers of 4 or 8 bits, plus 8 or 128, the first in the lowest bits. The numbers are code · scale
of the group that the column lies in. The config is `quantization_config` of
config.json (https://github.com/vllm-project/compressed-tensors).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatrain.checkpoint.reader import TensorSpec
from megatrain.config.errors import UserError

QUANTIZATION = "quantization_config"
"""Key of config.json."""
METHOD = "compressed-tensors"
FORMATS = {"pack-quantized", "int-quantized", "float-quantized"}
WORD_BITS = 32


class Source(Protocol):
    """Tensors of files, of which rows can be read."""

    specs: dict[str, TensorSpec]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop`; of a tensor without dimensions, all of it."""
        ...


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers of 4 or 8 bits, int8 `(rows, cols)`, into int32 `(rows, words)`; zeros fill the last word."""
    shifted = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    shifted = pad(shifted, (0, -codes.shape[-1] % (WORD_BITS // bits)))
    if bits == 4:
        shifted = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return shifted.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, cols: int) -> Tensor:
    """Invert `pack_words`: int8 `(rows, cols)`."""
    shifted = words.contiguous().view(torch.uint8)
    if bits == 4:
        shifted = torch.stack([shifted & 15, shifted >> 4], -1).flatten(-2)
    return (shifted[..., :cols].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


@dataclass(frozen=True)
class Storage:
    """How the quantized matrices of a directory are stored."""

    bits: int
    is_packed: bool
    quantizes_inputs: bool
    """Whether the inputs of these layers are quantized, too, as they come: to int8, with a scale for each token."""


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Tell whether the weights are quantized in the format of compressed-tensors, from the content of config.json."""
    found = config.get(QUANTIZATION)
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def read_storage(config: Mapping[str, Any]) -> Storage | None:
    """Return how the weights are stored, from the content of config.json; None if they are not quantized so.

    Raises:
        UserError: they are, with options that are not supported.
    """
    if not is_quantized(config):
        return None
    found = config[QUANTIZATION]
    groups = found.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    inputs = [group.get("input_activations") for group in groups.values()]
    wrong = [
        f"{key}={value!r}"
        for key, value, fits in (
            ("format", found.get("format"), found.get("format") in FORMATS),
            ("groups", len(groups), len(groups) == 1),
            ("bits", [w.get("num_bits") for w in weights], all(w.get("num_bits") in (4, 8) for w in weights)),
            ("symmetric", False, all(w.get("symmetric", True) for w in weights)),
            ("actorder", [w.get("actorder") for w in weights], all(not w.get("actorder") for w in weights)),
            (
                "strategy",
                [w.get("strategy") for w in weights],
                all(w.get("strategy") in ("channel", "group") for w in weights),
            ),
            ("inputs", inputs, all(_are_dynamic(each) for each in inputs)),
        )
        if not fits
    ]
    if wrong:
        raise UserError(
            f"quantization_config of config.json: {', '.join(wrong)} is not supported: quantized weights are read in "
            "the symmetric formats of compressed-tensors with a scale for each channel or group. Import it in 16 "
            "or 32 bits."
        )
    return Storage(weights[0]["num_bits"], found["format"] == "pack-quantized", inputs[0] is not None)


def _are_dynamic(inputs: Mapping[str, Any] | None) -> bool:
    if inputs is None:
        return True
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return all(inputs.get(key) == value for key, value in wanted.items())


class Dequantized:
    """The tensors of `source` with quantized matrices as float32, under the names that they would have otherwise."""

    def __init__(self, source: Source, storage: Storage) -> None:
        """Read the shapes of packed matrices.

        Raises:
            UserError: a scale is missing.
        """
        self._source, self._storage = source, storage
        self._scales: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.specs.items():
            base = name.rpartition(".")[0] + "."
            if name.endswith((".weight_scale", ".weight_shape")):
                continue
            if name.endswith(".weight_packed"):
                shape = source.rows(f"{base}weight_shape", 0, 2).tolist()
                name, spec = f"{base}weight", TensorSpec(torch.float32, torch.Size(shape))
            elif not name.endswith(".weight") or f"{base}weight_scale" not in source.specs:
                self.specs[name] = spec
                continue
            if f"{base}weight_scale" not in source.specs:
                raise UserError(f"{name} is quantized, but there is no {base}weight_scale")
            self._scales[name] = f"{base}weight_scale"
            self.specs[name] = TensorSpec(torch.float32, spec.size)

    @property
    def quantized(self) -> set[str]:
        """Names of the quantized matrices."""
        return set(self._scales)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop`, those of a quantized matrix as code · scale in float32."""
        if name not in self._scales:
            return self._source.rows(name, start, stop)
        if self._storage.is_packed:
            words = self._source.rows(f"{name}_packed", start, stop)
            codes = unpack_words(words, self._storage.bits, self.specs[name].size[1])
        else:
            codes = self._source.rows(name, start, stop)
        return dequantized(codes, self._source.rows(self._scales[name], start, stop))


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """Return code · scale in float32: codes `(..., out, in)`, scales `(..., out, groups)` of equally long groups."""
    groups = scales.shape[-1]
    tiled = codes.float().unflatten(-1, (groups, math.ceil(codes.shape[-1] / groups)))
    return (tiled * scales.float().unsqueeze(-1)).flatten(-2)
