"""The contract between a model and everything that treats its parameters specially.

A model family states once, from its config alone and without torch, which weights it has: their shapes and their
roles (`Weight`, `Plan`). Its layers are built from that statement, and initialization, parameter groups, Muon,
tensor parallelism, layout rules, pipeline costs, fp8 and FLOPs read it. How a technique may change what a layer does
is the other half of the contract: the seams of `nn/layer.py`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cached_property

CLASSIFIER = "classifier"
"""Name of the head that classifies documents."""


class Role(Flag):
    """What a parameter is. Roles combine: an expert's down projection is `ROW | EXPERT | BRANCH_OUTPUT`."""

    REPLICATED = 0
    """Replicated over a tensor-parallel group, each rank of which uses it for its own tokens, heads or partial sums."""
    COLUMN = auto()
    """Tensor parallelism shards the outputs of this product (Megatron-LM, arXiv 1909.08053, section 3)."""
    ROW = auto()
    """Tensor parallelism shards the inputs of this product, and the partial outputs are summed."""
    VOCABULARY = auto()
    """A row for each token: tensor parallelism shards the rows."""
    EXPERT = auto()
    """A stack of matrices, one for each expert: expert parallelism shards the stack."""
    NORM = auto()
    """Scale (and shift) of a normalization; starts at 1 (0)."""
    BRANCH_OUTPUT = auto()
    """Writes into the residual stream; `init_scaling=depth` makes its initial values smaller."""
    EMBEDDING = auto()
    """A table that is looked up: never Muon's, and decayed only if `decay_embeddings` says so."""
    HEAD = auto()
    """Produces logits: never Muon's."""
    TIED = auto()
    """A tied embedding: also the weight of the output head."""
    ADAPTER_DOWN = auto()
    """The first product of a low-rank adapter, LoRA's A."""
    ADAPTER_UP = auto()
    """The second product of a low-rank adapter, LoRA's B; starts at 0."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of a model: a norm's `(n,)`, a product's `(out, in)`, or a stack of products `(experts, out, in)`."""

    shape: tuple[int, ...]
    role: Role = Role.REPLICATED
    bias: bool = False
    """A bias of `shape[0]` elements belongs to it."""
    unit: int = 1
    """Rows of a COLUMN weight, or columns of a ROW weight, that must stay on one device: those of one head."""
    size_key: str = ""
    """The config key that counts these units, for messages."""
    active: int = 1
    """Number of matrices of a stack that one token is multiplied with."""
    serves: int = 1
    """Query heads that each unit of a weight of keys or values serves."""

    @property
    def is_stacked(self) -> bool:
        return len(self.shape) == 3

    @property
    def units(self) -> int:
        """Number of units along the dimension that tensor parallelism shards."""
        return self.sharded_size // self.unit

    @property
    def sharded_size(self) -> int:
        """Length of the dimension that tensor parallelism shards; 1 if there is none."""
        if self.role & Role.VOCABULARY:
            return self.shape[0]
        if self.role & Role.COLUMN:
            return self.shape[-2]
        return self.shape[-1] if self.role & Role.ROW else 1

    @property
    def is_product(self) -> bool:
        """True for the weight of a linear product, False for tables that are looked up and for norms."""
        return len(self.shape) > 1 and not self.role & Role.EMBEDDING

    def n_params(self, *, active: bool = False) -> int:
        """Count the elements, bias included; `active` counts only the experts that one token meets."""
        size = math.prod(self.shape)
        if active and self.is_stacked:
            size = size // self.shape[0] * self.active
        return size + self.shape[0] * self.bias

    def parameters(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (parameter name, shape) of the weight that stands at `name`, and of its bias.

        A stack is a parameter itself; any other weight is a module that holds `weight` and perhaps `bias`.
        """
        yield (name if self.is_stacked else f"{name}.weight"), self.shape
        if self.bias:
            yield f"{name}.bias", self.shape[:1]


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention of one block computes beside the products with its weights."""

    products: int
    """Multiplications for each pair of a query and a key: scores and values of all heads."""
    window: int | None = None
    """Sliding window in tokens; None for full attention."""

    def products_per_token(self, seq_len: int) -> float:
        """Return the multiplications for one token, as a mean over a causal sequence of `seq_len` tokens."""
        window = min(self.window or seq_len, seq_len)
        pairs = (
            window * seq_len - window * (window - 1) / 2
        )  # the first tokens see fewer keys than the window has
        return self.products * pairs / seq_len


@dataclass(frozen=True)
class Plan:
    """All weights of a model: those of each block by their name in it, and those around the blocks."""

    blocks: tuple[Mapping[str, Weight], ...]
    ends: Mapping[str, Weight]
    attention: tuple[Attention, ...]
    """That of each block."""

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Every weight by its name in the full model (`layers.3.attn.wq`)."""
        blocks = {f"layers.{i}.{name}": w for i, block in enumerate(self.blocks) for name, w in block.items()}
        return {**self.ends, **blocks}

    @cached_property
    def weight_of(self) -> dict[str, Weight]:
        """Canonical parameter name -> the weight that it belongs to."""
        return {name: weight for at, weight in self.weights.items() for name, _ in weight.parameters(at)}

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Canonical parameter name -> role."""
        return {name: weight.role for name, weight in self.weight_of.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical parameter name -> shape in the full model."""
        return {name: shape for at, weight in self.weights.items() for name, shape in weight.parameters(at)}

    @cached_property
    def tied_embedding(self) -> str | None:
        """Name of the parameter that is both the embedding and the head; None if the head has its own."""
        return next((name for name, role in self.roles.items() if role & Role.TIED), None)

    @property
    def has_classifier(self) -> bool:
        """Whether the head classifies documents, and does not predict tokens."""
        return CLASSIFIER in self.ends

    def n_params(self, *, active: bool = False) -> int:
        """Count all parameters; `active` counts only the experts that one token meets."""
        return sum(weight.n_params(active=active) for weight in self.weights.values())

    def block_products(self, layer: int) -> int:
        """Count the weights of block `layer` that one token is multiplied with."""
        return sum(
            w.n_params(active=True) - w.shape[0] * w.bias for w in self.blocks[layer].values() if w.is_product
        )

    @cached_property
    def head_products(self) -> int:
        """Weights of the head that one token is multiplied with."""
        heads = (w for w in self.ends.values() if w.role & (Role.HEAD | Role.TIED))
        return sum(math.prod(w.shape) for w in heads)
