"""The methods of compression, as data without torch."""

from dataclasses import dataclass
from typing import Literal

Number = Literal["int8", "int4", "e4m3"]


@dataclass(frozen=True)
class Quantization:
    """Weights become codes with scales."""

    number: Number
    is_grouped: bool = False
    """Whether groups of inputs have a scale each, or all inputs of an output one."""
    fit: Literal["nearest", "gptq", "awq"] = "nearest"
    """How codes are chosen."""
    quantizes_inputs: bool = False
    """Whether the inputs of the layers are quantized as well, when they come."""

    @property
    def needs_text(self) -> bool:
        return self.fit != "nearest"


@dataclass(frozen=True)
class Sparsity:
    """Weights become zero."""

    weighs_inputs: bool
    """Whether a weight counts by its size times the norm of its input (Wanda), or by its size alone."""
    is_two_of_four: bool = False
    """Whether two of every four neighbouring inputs are kept, or as many of each output's as `--sparsity` says."""

    @property
    def needs_text(self) -> bool:
        return self.weighs_inputs


@dataclass(frozen=True)
class Pruning:
    """Heads and channels go, and a smaller model stays."""

    needs_text: bool = True


@dataclass(frozen=True)
class Nothing:
    """Weights stay as they are: another file format alone."""

    needs_text: bool = False


Method = Quantization | Sparsity | Pruning | Nothing
METHODS: dict[str, Method] = {
    "int8": Quantization("int8"),
    "int8-dynamic": Quantization("int8", quantizes_inputs=True),
    "fp8": Quantization("e4m3"),
    "int4": Quantization("int4", is_grouped=True),
    "int4-gptq": Quantization("int4", is_grouped=True, fit="gptq"),
    "int4-awq": Quantization("int4", is_grouped=True, fit="awq"),
    "magnitude": Sparsity(weighs_inputs=False),
    "magnitude-2:4": Sparsity(weighs_inputs=False, is_two_of_four=True),
    "wanda": Sparsity(weighs_inputs=True),
    "wanda-2:4": Sparsity(weighs_inputs=True, is_two_of_four=True),
    "prune": Pruning(),
    "none": Nothing(),
}
