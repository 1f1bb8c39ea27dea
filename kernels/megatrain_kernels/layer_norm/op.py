"""LayerNorm."""

from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm

from megatrain_kernels.backend import choose
from megatrain_kernels.layer_norm.reference import layer_norm_reference


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension of x `(..., size)` with weight and bias `(size,)`."""
    if choose(backend) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    return torch_layer_norm(x, weight.shape, weight, bias, eps)
