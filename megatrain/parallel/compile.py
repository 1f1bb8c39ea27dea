"""torch.compile of each repeated block: one compilation serves all of them."""

from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of `model.layers` in place; names of parameters stay."""
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    for block in layers.values():
        block.compile()
