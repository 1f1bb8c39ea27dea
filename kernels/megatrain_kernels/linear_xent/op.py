"""Linear layer and cross entropy in one: the logits of a few tokens at a time, never all of them.

The gradients are made in the forward pass, while a chunk's logits are at hand, and overwrite them (the idea of
Liger-Kernel, arXiv 2410.10989, section 3.2); the backward pass scales them. The products are PyTorch's, and the kernels
for the rows of logits are those of `xent/`, so this folder has no Triton file.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.kernel import (
    Kernel,
    attempt,
    register,
    require,
    require_floating,
    select,
    wrong_dtype,
)
from megatrain_kernels.linear_xent.cases import SUITE
from megatrain_kernels.linear_xent.reference import linear_cross_entropy_reference
from megatrain_kernels.xent.op import (
    check_targets,
    cross_entropy,
    group_arguments,
    row_losses,
    sharded_options,
)
from megatrain_kernels.xent.reference import LossOptions, reduce_loss

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # logits held at once; on a CPU a chunk stays in its cache
ALIGNED = 8  # elements: 16 bytes in bf16, what a GPU loads at a time
PADDED = 128  # rows of a tile of the product
MIN_CHUNK_ROWS = 512  # each chunk adds to the whole weight gradient, which fewer rows would not pay for
SLICE_ELEMENTS = 1 << 24  # of the weight's gradient, made in 16 bits and then added


@torch.library.custom_op("megatrain::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    vocab_size: int,
    wants_x: bool,
    wants_weight: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of the tokens of x `(tokens, hidden)`, and the gradients of their sum that are wanted."""
    options = sharded_options(LossOptions(ignore_index, z_loss, softcap), group, vocab_size)
    compute = torch.promote_types(x.dtype, torch.float32)
    columns, weight = weight.shape[0], _aligned(weight)
    # The ranks of a group must cut the same chunks, whichever of them has a row more.
    widest = -(-vocab_size // (1 if options.group is None else options.group.size()))
    rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS.get(x.device.type, 1 << 28) // widest)
    buffer = x.new_empty(min(rows, x.shape[0]), weight.shape[0])
    grad_x = x.new_empty(x.shape if wants_x else 0)
    # Chunks are added in float32: sums of many bf16 terms would lose the small ones. A single one is not added.
    sum_type = compute if x.shape[0] > rows else x.dtype
    grad_weight = x.new_zeros(weight.shape if wants_weight else 0, dtype=sum_type)
    losses = x.new_empty(x.shape[0], dtype=compute)
    for start in range(0, x.shape[0], rows):
        part, wanted = x[start : start + rows], targets[start : start + rows]
        logits = torch.mm(part, weight.T, out=buffer[: part.shape[0]])
        real = logits[:, :columns]  # those of the padding stay zero, and add nothing to the gradients
        gradient = real if wants_x or wants_weight else None
        losses[start : start + rows] = row_losses(real, wanted, options, gradient=gradient, path=path)
        if factors is not None and gradient is not None:
            gradient.mul_(factors[start : start + rows, None])
        if wants_x:
            torch.mm(logits, weight, out=grad_x[start : start + rows])
        if wants_weight:
            _add_product(grad_weight, logits, part)
    buffer.untyped_storage().resize_(0)  # free, before the weight's gradient is there twice
    if wants_x and options.group is not None:  # each rank has the part of its own columns
        dist.all_reduce(grad_x, group=options.group)
    if factors is not None:
        losses.mul_(factors)
    return losses, grad_x, (grad_weight[:columns] if wants_weight else grad_weight).to(weight.dtype)


def _add_product(total: Tensor, logits: Tensor, part: Tensor) -> None:
    """Add logitsᵀ part to `total`, which may be wider than they are."""
    if total.dtype == part.dtype:
        total.addmm_(logits.T, part)
        return
    if total.is_cuda:
        # Only CUDA has a product of 16-bit numbers that is added to float32 as it is made.
        add = partial(torch.addmm, total, logits.T, part, out_dtype=total.dtype, out=total)
        if attempt("linear_cross_entropy", "addition in float32", add, kind=(part.dtype,)) is not None:
            return
    rows = max(1, SLICE_ELEMENTS // part.shape[1])
    for block, columns in zip(total.split(rows), logits.split(rows, 1), strict=True):
        block += columns.T @ part


def _aligned(weight: Tensor) -> Tensor:
    """Return `weight` with rows of zeros below, so that each row of the logits starts at an aligned address.

    With a vocabulary such as GPT-2's 50,257, rows of bf16 logits start at odd addresses, and all three products load
    two bytes at a time.
    """
    if weight.shape[0] % ALIGNED == 0:
        return weight
    return pad(weight, (0, 0, 0, -weight.shape[0] % PADDED))


@linear_cross_entropy_op.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    vocab_size: int,
    wants_x: bool,
    wants_weight: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    grad_x, grad_weight = x.shape if wants_x else 0, weight.shape if wants_weight else 0
    return losses, x.new_empty(grad_x), weight.new_empty(grad_weight)


@register_flop_formula(torch.ops.megatrain.linear_cross_entropy)
def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **__: Any) -> int:
    """Count one product, and one for each gradient."""
    *_, wants_x, wants_weight, _ = args
    return int(2 * x[0] * x[1] * weight[0] * (1 + wants_x + wants_weight))


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses of x `(tokens, hidden)`, a scalar; those of tokens without a target are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
        """Compute the sum, and keep the gradients that are wanted."""
        *settings, path = options
        wanted = ctx.needs_input_grad[:2]
        losses: Tensor
        losses, *grads = linear_cross_entropy_op(x, weight, targets, *settings, *wanted, path)
        ctx.save_for_backward(*(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradients."""
        # The factor stays in float32: rounded to bf16 it would put all gradients of the model off by one part.
        scaled = (None if g is None else g * grad for g in ctx.saved_tensors)
        return *scaled, *(None for _ in ctx.needs_input_grad[2:])


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    factors: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross entropy of logits x weightᵀ, float32 at least.

    Args:
        x: `(..., hidden)`. weight: `(vocab, hidden)`, in x's type. targets: `(...)` int64 token ids, or `ignore_index`.
        factors: `(...)`, by which each token's loss is multiplied, without a gradient of their own; None: 1.
        z_loss: factor on the squared log-sum-exp of the logits, added to each token's loss.
        softcap: c: logits become c·tanh(logits / c).
        reduction: "mean" and "sum" are over valid tokens; "none" gives each token's loss, and holds all logits where a
            gradient is wanted.
        tp_group: its rank r holds the r-th slice of the vocabulary as `weight`; x and targets are the same on all
            of its ranks, and so are the loss and x's gradient (summed over the group here).
        vocab_size: rows of all slices, of which the first `vocab_size % ranks` have one more; None: slices are equal.
        backend: "auto" takes Triton's kernel for the rows of logits on a GPU; the products are PyTorch's.

    Raises:
        ValueError: shapes, types or devices that do not fit, no reduction or backend of that name, or a sharded
            vocabulary with the reference, or with "none" where a gradient is wanted.
    """
    _check(x, weight, targets, factors)
    path = select(LINEAR_CROSS_ENTROPY, backend, x)
    valid = targets != ignore_index
    wants_each = reduction == "none" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if tp_group is not None and (path == "reference" or wants_each):
        raise ValueError(
            "a vocabulary sharded over tp_group needs reduction mean or sum, or no gradient, and not the reference"
        )
    if path == "reference":
        losses = linear_cross_entropy_reference(
            x, weight, targets, factors=factors, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
        )
        return reduce_loss(losses, valid, reduction)
    if wants_each:
        options: dict[str, Any] = {"ignore_index": ignore_index, "z_loss": z_loss, "softcap": softcap}
        losses = cross_entropy(x @ weight.T, targets, reduction=reduction, backend=backend, **options)
        return losses if factors is None else losses * factors.to(losses.dtype)
    settings = (ignore_index, z_loss, softcap, *group_arguments(tp_group, vocab_size, weight.shape[0]))
    if factors is not None:
        factors = factors.reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
    flat = (x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), factors)
    if reduction == "none":
        return linear_cross_entropy_op(*flat, *settings, False, False, path)[0].view(targets.shape)
    return reduce_loss(_ChunkedLoss.apply(*flat, *settings, path), valid, reduction)


def _check(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None) -> None:
    sizes = x.ndim == targets.ndim + 1 and x.shape[:-1] == targets.shape and weight.ndim == 2
    require(
        sizes and weight.shape[1] == x.shape[-1] and weight.shape[0] > 0,
        "x must be (..., hidden), weight (vocab, hidden) and targets (...)",
        x=x,
        weight=weight,
        targets=targets,
    )
    require_floating(x=x, weight=weight)
    require(x.dtype == weight.dtype, "x and weight must have one type", x=x, weight=weight)
    check_targets(targets, x=x, weight=weight)
    if factors is not None:
        require(
            factors.shape == targets.shape, "factors must be as targets", factors=factors, targets=targets
        )


LINEAR_CROSS_ENTROPY = register(
    Kernel(
        function=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        suite=SUITE,
        unsupported=wrong_dtype,
    )
)
