"""Layers with weights, and the seams at which a technique may change what they do.

A seam is an attribute that a class names in `SEAMS`. Techniques assign to seams through `replace_seam`, or register
module hooks; nothing else of a model is ever patched. The seams:

| seam | of | does, unless replaced |
|---|---|---|
| `parameter_view` | every layer with weights | hands the layer its parameter as it is |
| `product` | `Linear`, `Experts` | multiplies with the weight |
| `adapter` | `Linear` | adds nothing to the product |
| `lookup` | `Embedding` | reads rows of the table |
| `core` | attention | mixes tokens |
| `products` | attention, gated feed-forward | multiplies with several layers' weights, together on a GPU |
| `dispatch` | `MoE` | sends tokens to experts and back |
| `sequence_sum` | `BalancePoint` | sums over a sequence |
| `run` | `Block` | calls the block's body |
| `begin` | `Block` | does nothing before the body computes |
| `own_positions` | `ImageClassifier` | returns all positions |
| `loss_head` | `Decoder` | logits or loss from hidden states |
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.nn.contract import Weight

ParameterView = Callable[[str, nn.Parameter], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def replace_seam(module: nn.Module, seam: str, replacement: Any) -> None:
    """Put `replacement` at the seam of that name.

    Raises:
        TypeError: `module` declares no such seam.
    """
    if seam not in getattr(module, "SEAMS", ()):
        raise TypeError(f"{type(module).__name__} has no seam {seam!r}")
    setattr(module, seam, replacement)


def as_it_is(name: str, parameter: nn.Parameter) -> Tensor:
    """Return `parameter`: what a layer computes with on one device."""
    return parameter


class Layer(nn.Module):
    """A module with parameters of its own.

    It computes with `self.tensor("weight")`, never with `self.weight`, which may be sharded over devices.
    """

    SEAMS: ClassVar[tuple[str, ...]] = ("parameter_view",)
    parameter_view: ParameterView = staticmethod(as_it_is)

    def tensor(self, name: str) -> Tensor:
        """Return the parameter `name` as a plain tensor to compute with."""
        return self.parameter_view(name, getattr(self, name))


class Linear(Layer, nn.Linear):
    """A linear product, `(..., in)` to `(..., out)`, whose shape is stated by the model's plan."""

    SEAMS = ("parameter_view", "product", "adapter")
    product: Product = staticmethod(F.linear)

    def __init__(self, weight: Weight) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=weight.bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """Multiply `x`, without adding the bias unless `biased`."""
        bias = self.tensor("bias") if biased and self.bias is not None else None
        out = self.product(x, self.tensor("weight"), bias)
        return out if self.adapter is None else out + self.adapter(x)
