"""A pipeline stage whose gradients are reduced, and whose weights are freed, as its ZeRO stage says.

The stages of `torch.distributed.pipelining` reduce nothing before the last backward pass of a step and free nothing
after any (torch 2.13, `backward_maybe_with_nosync`): in them ZeRO-2 holds what ZeRO-1 does, and so does ZeRO-3.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, _backward
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor

from megatrain.parallel.fsdp import before_micro_batch, finish_backward, reshard, unshard
from megatrain.parallel.sharding import local_view

Gradients = tuple[Tensor | None, ...]


class Stage(PipelineStage):
    """A `PipelineStage` of an FSDP module.

    Schedules with a split backward pass ask for the gradients of inputs (`input`) and of weights (`weight`) apart.
    FSDP's hooks do not see these passes, so gathering, reducing and freeing is done here.
    """

    def __init__(
        self, *args: Any, micro_batches: int, zero_stage: int, splits_backward: bool, **options: Any
    ) -> None:
        """Take what a `PipelineStage` does, and how its backward passes are to be run.

        Args:
            micro_batches: number of backward passes in a step.
            splits_backward: whether gradients of weights are computed apart where the schedule asks for it; if not,
                with those of the inputs, which is earlier than the schedule needs them.
        """
        if not splits_backward:
            options["dw_builder"] = _nothing_left
        super().__init__(*args, **options)
        self.micro_batches = micro_batches
        self.zero_stage = zero_stage
        self._done = 0

    def backward_maybe_with_nosync(
        self,
        backward_type: Literal["full", "input", "weight"],
        bwd_kwargs: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> tuple[Gradients, list[dict[str, Any]] | None]:
        """Run one backward pass, or the part of it that gives the gradients of inputs or of weights."""
        model = self.submod
        assert isinstance(model, FSDPModule)
        outputs, inputs = bwd_kwargs["stage_output"], bwd_kwargs.get("input_values", [])
        if backward_type == "full":
            self._set_flags()
            return stage_backward(outputs, bwd_kwargs["output_grads"], inputs), None
        unshard(model)  # the weights are looked for that the forward pass used
        # Hooks of FSDP that fire all the same must reduce and free nothing yet.
        before_micro_batch(model, is_last=False, zero_stage=1)
        if backward_type == "input":
            found = stage_backward_input(outputs, bwd_kwargs["output_grads"], inputs, _trained(model))
            if self.zero_stage == 3:
                reshard(model)
            return found
        gradients = stage_backward_weight(_trained(model), bwd_kwargs["param_groups"])
        self._set_flags()
        finish_backward(model)
        return gradients, None

    def _set_flags(self) -> None:
        """Set what the pass that completes a micro-batch's gradients reduces and frees."""
        self._done += 1
        is_last = self._done % self.micro_batches == 0
        before_micro_batch(self.submod, is_last=is_last, zero_stage=self.zero_stage)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are not frozen."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


_node_of = _backward._get_grad_fn_or_grad_acc


def _node_of_uneven(t: Tensor) -> Node | None:
    """Return the node at which the gradient of `t` arrives.

    Torch asks a view of `t` for it, which fails where a rank's shard is not as large as the first one's.
    """
    if isinstance(t, DTensor) and t.requires_grad and t.grad_fn is None:
        node = local_view("", t).grad_fn  # type: ignore[arg-type]
        assert node is not None
        return node.next_functions[0][0]
    return _node_of(t)


_backward._get_grad_fn_or_grad_acc = _node_of_uneven


def _nothing_left() -> Callable[[], None]:
    """Return what is to be done in place of a later pass for the weights' gradients."""
    return lambda: None
