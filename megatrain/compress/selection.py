"""Which weights of a model are compressed: the products that its plan declares."""

from torch import nn

from megatrain.config.errors import UserError
from megatrain.nn.contract import Plan, Role

GROUPS = (128, 64, 32)
"""Sizes of groups that share a scale, the largest first."""


def compressed_names(plan: Plan, *, head: bool = False) -> list[str]:
    """Return the canonical names of the parameters to compress: the products inside the blocks, experts too.

    Routers are left out: they are small, and a wrong choice of experts costs much.

    Args:
        head: also the table that logits are computed with, which is the embedding's where they are tied.
    """
    names = [
        next(weight.parameters(f"layers.{layer}.{name}"))[0]
        for layer, block in enumerate(plan.blocks)
        for name, weight in block.items()
        if weight.is_product and not name.endswith("router")
    ]
    if head:
        names += [
            f"{name}.weight" for name, weight in plan.ends.items() if weight.role & (Role.HEAD | Role.TIED)
        ]
    return names


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter of that canonical name."""
    return model.get_parameter(name)


def pick_group(plan: Plan, names: list[str], asked: int | None) -> int:
    """Return the size of groups: the one `asked` for, or the largest of `GROUPS` that divides each layer's inputs.

    Raises:
        UserError: it does not divide the inputs of a layer, or none does.
    """
    inputs = {name: plan.shapes[name][-1] for name in names}
    for group in GROUPS if asked is None else (asked,):
        if group > 0 and group % 8 == 0 and all(size % group == 0 for size in inputs.values()):
            return group
    legal = [each for each in GROUPS if all(size % each == 0 for size in inputs.values())]
    said = ", ".join(map(str, legal)) if legal else f"none of {', '.join(map(str, GROUPS))} does"
    layers = {name.rpartition(".")[0].split(".", 2)[-1]: size for name, size in inputs.items()}
    listed = ", ".join(f"{layer} {size}" for layer, size in layers.items())
    raise UserError(
        f"--group {'' if asked is None else f'{asked}: '}must be a multiple of 8 that divides the inputs of every "
        f"layer ({listed}); of the usual sizes these do: {said}"
    )
