"""The optimizer's update of a group of parameters: the public function and its PyTorch operator."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatrain_kernels.dynamic_map import n_blocks
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
from megatrain_kernels.optimizer.cases import SUITE
from megatrain_kernels.optimizer.reference import MOMENTS, Place, Update, optimizer_step_reference, whole
from megatrain_kernels.optimizer.torch import update_group

OTHER_SHAPES = {"step", *(f"{name}_scale" for names in MOMENTS.values() for name in names)}
"""Fields that have not the weight's shape."""


@torch.library.custom_op("megatrain::optimizer_step", mutates_args=("updated", "gradients"))
def optimizer_step_op(
    updated: list[Tensor],
    gradients: list[Tensor],
    clip: Tensor | None,
    rule: str,
    numbers: list[float],
    states: str,
    flags: list[bool],
    places: list[int],
    path: str,
) -> None:
    """Update a group in place; `updated` are all its tensors but the gradients, field after field.

    Args:
        numbers, flags: those of `Update`, in its order.
        places: the numbers of each parameter's `Place`.
    """
    lr, weight_decay, beta1, beta2, eps = numbers
    nesterov, stochastic, copies = flags
    how = Update(rule, lr, weight_decay, beta1, beta2, eps, nesterov, states, stochastic, copies)
    fields = [name for name in how.fields if name != "gradient"]
    group = {"gradient": gradients, **_by_field(updated, fields)}
    width = len(Place._fields)
    found = [Place(*places[start : start + width]) for start in range(0, len(places), width)]
    kind = (rule, states, *flags, *(t[0].dtype for t in group.values()))
    if run_triton(OPTIMIZER_STEP, path, "launch", group, how, found, clip, kind=kind) is None:
        update_group(group, how, found, clip)


@optimizer_step_op.register_fake
def _fake(*_: object) -> None:
    pass


def _by_field(tensors: Sequence[Tensor], fields: Sequence[str]) -> dict[str, list[Tensor]]:
    count = len(tensors) // len(fields)
    return {name: list(tensors[n * count : (n + 1) * count]) for n, name in enumerate(fields)}


def optimizer_step(
    *tensors: Tensor,
    how: Update,
    clip: Tensor | None = None,
    places: Sequence[Place] = (),
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Update a group of parameters in place, on a GPU in one launch, as `optimizer_step_reference` defines it.

    Args:
        tensors: all weights, then all gradients, and so on for each of `how.fields`, with the parameters in the same
            order. A parameter's tensors have one shape `(..., rows, columns)`, but its scales `(..., rows, blocks)` and
            its count of updates, a float32 scalar, which is raised. Weights float32, float64, bfloat16 or float16, the
            same for all; so are gradients, states and copies. All but gradients contiguous. Gradients may be changed.
        clip: factor on all gradients, a scalar on the device, so that nobody waits for it; None: 1.
        places: where each parameter lies in the full tensor that it is a shard of, with the key of its random bits;
            default: each is full, and its number is its key.

    Returns:
        The weights, and their copies if there are any: the tensors given.

    Raises:
        ValueError: tensors that do not fit, or no backend of that name.
    """
    group = _checked(tensors, how, clip)
    weights = group["weight"]
    if not places:
        places = [whole(weight.shape, number) for number, weight in enumerate(weights)]
    if len(places) != len(weights):
        raise ValueError(f"{len(places)} places for {len(weights)} weights: must be one each, or none")
    path = select(OPTIMIZER_STEP, backend, weights[0], group["gradient"][0])
    group["gradient"] = [gradient.contiguous() for gradient in group["gradient"]]
    if path == "reference":
        if how.is_counted:
            torch._foreach_add_(group["step"], 1)
        for n, place in enumerate(places):
            optimizer_step_reference({name: group[name][n] for name in group}, how, place, clip)
    elif path == "torch":
        update_group(group, how, places, clip)
    else:
        optimizer_step_op(
            [t for name in how.fields if name != "gradient" for t in group[name]],
            group["gradient"],
            clip,
            how.rule,
            [how.lr, how.weight_decay, how.beta1, how.beta2, how.eps],
            how.states,
            [how.nesterov, how.stochastic, how.copies],
            [number for place in places for number in place],
            path,
        )
    return (*weights, *group.get("copy", ()))


RULES = ("adamw", "lion", "sgd")
STATES: dict[str, torch.dtype | None] = {"full": None, "bf16": torch.bfloat16, "int8": torch.uint8}
"""Types of states; None: the weights' own, in float32 at least."""


def _checked(tensors: Sequence[Tensor], how: Update, clip: Tensor | None) -> dict[str, list[Tensor]]:
    """Return the tensors by field.

    Raises:
        ValueError: they do not fit.
    """
    if how.rule not in RULES or how.states not in STATES:
        known = f"{', '.join(RULES)}, and states {', '.join(STATES)}"
        raise ValueError(f"rule {how.rule!r} with states {how.states!r}: must be one of {known}")
    if not tensors or len(tensors) % len(how.fields):
        raise ValueError(f"{len(tensors)} tensors: must be as many of each of {', '.join(how.fields)}")
    group = _by_field(tensors, how.fields)
    weights = group["weight"]
    types = _types(group, how)
    device, shapes = weights[0].device, [weight.shape for weight in weights]
    for name, found in group.items():
        wanted = shapes if name not in OTHER_SHAPES else [_shape(name, shape) for shape in shapes]
        fits = [
            tensor.shape == shape and tensor.dtype == types[name] and tensor.device == device
            and (name == "gradient" or tensor.is_contiguous())
            for tensor, shape in zip(found, wanted, strict=True)
        ]  # fmt: skip
        if not all(fits):
            n = fits.index(False)
            rule = f"{name} {n} must be contiguous, {types[name]} {tuple(wanted[n])}, on {device}"
            require(False, rule, weight=weights[n], **{f"{name}_": found[n]})
    require_floating(weight=weights[0], gradient=group["gradient"][0])
    if clip is not None:
        if not isinstance(clip, Tensor):
            raise ValueError(f"clip={clip!r}: must be a floating scalar tensor, or None")
        require(clip.ndim == 0 and clip.is_floating_point(), "clip must be a floating scalar", clip=clip)
        require_one_device(weight=weights[0], clip=clip)
    return group


def _types(group: Mapping[str, list[Tensor]], how: Update) -> dict[str, torch.dtype]:
    wide = torch.promote_types(group["weight"][0].dtype, torch.float32)
    state = STATES[how.states] or wide
    found = {"step": torch.float32} | dict.fromkeys(how.moments, state)
    found |= {name: wide for name in group if name.endswith("_scale")}
    return {name: found.get(name, tensors[0].dtype) for name, tensors in group.items()}


def _shape(name: str, weight: torch.Size) -> torch.Size:
    return torch.Size(()) if name == "step" else torch.Size((*weight[:-1], n_blocks(weight[-1])))


def _unsupported(weight: Tensor, gradient: Tensor) -> str | None:
    return wrong_dtype(weight) or wrong_dtype(gradient)


OPTIMIZER_STEP = register(
    Kernel(
        function=optimizer_step,
        reference=optimizer_step_reference,
        suite=SUITE,
        unsupported=_unsupported,
    )
)
