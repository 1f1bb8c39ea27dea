"""RMSNorm, with the residual addition before it on request."""

from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from megatrain_kernels.backend import choose
from megatrain_kernels.rms_norm.reference import rms_norm_reference


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of x `(..., size)` with weight `(size,)`.

    With `residual` (x's shape) x + residual is normalised, and (normalised, x + residual) is returned.
    """
    total = x if residual is None else x + residual
    if choose(backend) == "reference":
        out = rms_norm_reference(total, weight, eps)
    else:
        out = torch_rms_norm(total, weight.shape, weight, eps)
    return out if residual is None else (out, total)
