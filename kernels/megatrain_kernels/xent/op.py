"""Cross entropy that keeps one tensor of the logits' size for its backward pass: their gradient.

The public function, its PyTorch operator, and `row_losses`, which `linear_cross_entropy` uses too.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import distributed_c10d

from megatrain_kernels.kernel import (
    Kernel,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.xent import torch as plain
from megatrain_kernels.xent.cases import SUITE
from megatrain_kernels.xent.reference import LossOptions, cross_entropy_reference, reduce_loss


def _over_group(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return log-sum-exp and target logit over all shards, `(2, rows)`: one maximum and one sum are exchanged."""
    own_max, own_sum, picked = parts
    largest = own_max.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    both = torch.stack([own_sum * (own_max - largest).exp(), picked])
    dist.all_reduce(both, group=group)
    both[0].log_().add_(largest)
    return both


def row_losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, gradient: Tensor | None, path: str
) -> Tensor:
    """Return `torch.losses`, by Triton where `path` says so, of a vocabulary that `options.group` may share."""
    kind, whole = (logits.dtype,), None
    if options.group is not None:
        parts = run_triton(CROSS_ENTROPY, path, "partials", logits, targets, options, kind=kind)
        parts = plain.partials(logits, targets, options) if parts is None else parts
        whole = _over_group(parts, options.group)
    both = {"whole": whole, "gradient": gradient}
    made: Tensor | None = run_triton(
        CROSS_ENTROPY, path, "losses", logits, targets, options, kind=kind, **both
    )
    return plain.losses(logits, targets, options, **both) if made is None else made


def slice_of(vocab_size: int, ranks: int, rank: int) -> range:
    """Return the tokens that `rank` holds: slices are in order and as even as they can be, the first ones longer."""
    start = rank * (vocab_size // ranks) + min(rank, vocab_size % ranks)
    return range(start, start + vocab_size // ranks + (rank < vocab_size % ranks))


def group_arguments(
    group: dist.ProcessGroup | None, vocab_size: int | None, columns: int
) -> tuple[str | None, int]:
    """Return an operator's arguments for a vocabulary that may be sharded: the group's name and all tokens' number.

    Raises:
        ValueError: this rank's slice of `vocab_size` has another number of columns, or there is no group.
    """
    if group is None:
        if vocab_size not in (None, columns):
            raise ValueError(
                f"vocab_size={vocab_size}: there are {columns} columns, and no tp_group that shards them"
            )
        return None, columns
    if vocab_size is None:
        return group.group_name, columns * group.size()
    own = slice_of(vocab_size, group.size(), group.rank())
    if len(own) != columns:
        raise ValueError(
            f"rank {group.rank()} of {group.size()} must hold {len(own)} of {vocab_size} tokens, and holds {columns}"
        )
    return group.group_name, vocab_size


def sharded_options(options: LossOptions, group: str | None, vocab_size: int) -> LossOptions:
    """Return `options` with the group of that name, and the first token of this rank's slice."""
    if group is None:
        return options
    resolve: Any = distributed_c10d._resolve_process_group  # an operator takes no group as its argument
    found: dist.ProcessGroup = resolve(group)
    first = slice_of(vocab_size, found.size(), found.rank()).start
    return options._replace(group=found, first_token=first)


@torch.library.custom_op("megatrain::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    vocab_size: int,
    wants_gradient: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    """Return losses `(rows,)` of logits `(rows, columns)`, and the gradient of their sum if it is wanted."""
    options = sharded_options(LossOptions(ignore_index, z_loss, softcap), group, vocab_size)
    gradient = logits.new_empty(logits.shape if wants_gradient else 0)
    losses = row_losses(logits, targets, options, gradient=gradient if wants_gradient else None, path=path)
    return losses, gradient


@cross_entropy_op.register_fake
def _fake(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    group: str | None,
    vocab_size: int,
    wants_gradient: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    return losses, logits.new_empty(logits.shape if wants_gradient else 0)


class _CrossEntropy(torch.autograd.Function):
    """Losses `(tokens,)` of logits `(tokens, vocab)`; the gradient is made while the softmax is at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, options: tuple[Any, ...], path: str) -> Tensor:
        """Compute the losses, and keep the gradient where one is wanted."""
        wanted = ctx.needs_input_grad[0]
        losses: Tensor
        losses, gradient = cross_entropy_op(logits, targets, *options, wanted, path)
        if wanted:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale each row of the kept gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype).unsqueeze(-1), None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross entropy of logits with targets, float32 at least.

    Args:
        logits: `(..., vocab)`; with `tp_group` this rank's columns of it.
        targets: `(...)` int64.
        ignore_index, z_loss, softcap, reduction, tp_group, vocab_size: as for `linear_cross_entropy`.

    Raises:
        ValueError: shapes, types or devices that do not fit, no reduction or backend of that name, or the reference of
            a sharded vocabulary.
    """
    require(
        logits.ndim == targets.ndim + 1 and logits.shape[:-1] == targets.shape and logits.shape[-1] > 0,
        "logits must be (..., vocab) and targets (...)",
        logits=logits,
        targets=targets,
    )
    require_floating(logits=logits)
    check_targets(targets, logits=logits)
    path = select(CROSS_ENTROPY, backend, logits)
    valid = targets != ignore_index
    if path == "reference":
        if tp_group is not None:
            raise ValueError("the reference takes the whole vocabulary, not one sharded over tp_group")
        losses = cross_entropy_reference(
            logits, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
        )
    else:
        options = (ignore_index, z_loss, softcap, *group_arguments(tp_group, vocab_size, logits.shape[-1]))
        flat = logits.reshape(-1, logits.shape[-1])
        losses = _CrossEntropy.apply(flat, targets.reshape(-1), options, path).view(targets.shape)
    return reduce_loss(losses, valid, reduction)


def check_targets(targets: Tensor, **others: Tensor) -> None:
    """Check the type of targets, and that they are where the other tensors are.

    Raises:
        ValueError: they are not int64, or not there.
    """
    require(targets.dtype == torch.int64, "targets must be int64", targets=targets)
    require_one_device(targets=targets, **others)


CROSS_ENTROPY = register(
    Kernel(function=cross_entropy, reference=cross_entropy_reference, suite=SUITE, unsupported=wrong_dtype)
)
