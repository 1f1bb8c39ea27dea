"""Config of low-rank adapters."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from megatrain.config.nearest import nearest
from megatrain.config.ranges import Count, Positive, Range
from megatrain.config.schema import Problem, config
from megatrain.nn.contract import Plan, Weight


@config
class LoRAConfig:
    """LoRA (Hu et al., arXiv 2106.09685): the weights are frozen, and the product of two small matrices beside each of
    them is trained."""

    rank: Count = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Share of an adapter's inputs that is zeroed in training; the others are scaled up. Drawn by seed, layer, token of
    the run and element, and so the same in every layout."""
    base: Literal["full", "int4"] = "full"
    """How the weights beside adapters are kept while training. int4: in four bits (QLoRA, arXiv 2305.14314), on one
    process, or whole on each data-parallel rank; adapters then fit the rounded weights."""
    base_group: Annotated[int, Range(at_least=2, at_most=1 << 20)] = 64
    """Inputs of a layer that share a scale with base=int4."""
    targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by their names in a block: wq, wk, wv, wo, gate, up, down; empty: all."""


def adapted_names(block: Mapping[str, Weight], targets: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers of a block that get an adapter."""
    return [
        name
        for name, weight in block.items()
        if weight.is_product
        and not weight.is_stacked
        and not name.endswith("router")
        and (not targets or name.rpartition(".")[2] in targets)
    ]


def lora_problems(cfg: LoRAConfig, plan: Plan) -> Iterator[Problem]:
    """Yield the problems of adapters for the model of `plan`."""
    if not cfg.rank:
        return
    if cfg.base == "int4":
        odd = [
            name
            for block in plan.blocks
            for name in adapted_names(block, cfg.targets)
            if block[name].shape[1] % 2
        ]
        if odd:
            yield Problem("lora.base", cfg.base, f"{odd[0]} has an odd number of inputs", ("full",))
    names = {name.rpartition(".")[2] for block in plan.blocks for name in adapted_names(block, ())}
    for target in cfg.targets:
        if target not in names:
            rule = f"{target} is no linear layer of this model's blocks ({', '.join(sorted(names))})"
            yield Problem("lora.targets", cfg.targets, rule, (nearest(target, names, 1),))
    if any(weight.is_stacked for weight in plan.weights.values()):
        yield Problem("lora.rank", cfg.rank, "adapters are not supported for a model with experts", (0,))
