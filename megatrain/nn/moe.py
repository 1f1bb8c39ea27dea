"""Mixture of experts without dropped tokens: router, experts, and the dispatch of tokens to them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from megatrain.config.errors import UserError
from megatrain.nn.balance_point import BalancePoint
from megatrain.nn.config import DecoderConfig, ExpertsConfig
from megatrain.nn.contract import Weight
from megatrain.nn.layer import Layer, replace_seam
from megatrain.nn.megablocks import check_megablocks, megablocks_product
from megatrain.nn.mlp import GatedMLP
from megatrain.nn.plan import experts_weights, part_of
from megatrain_kernels import grouped_gemm, moe_gate, permute, swiglu, unpermute
from megatrain_kernels.backend import triton_runs_on

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


class Routing(NamedTuple):
    """Assignment of tokens to experts; `tokens` counts all tokens of the batch, row by row."""

    indices: Tensor
    """`(tokens, top_k)` int64: experts of each token, the best first."""
    weights: Tensor
    """`(tokens, top_k)`: factors on what they return; float32 at least."""
    scores: Tensor
    """`(tokens, n_experts)`: of all experts, without bias; float32 at least."""


class Router(Layer):
    """Scores tokens against experts, in float32 at least: near ties should not depend on bf16's rounding."""

    def __init__(self, weight: Weight, cfg: ExpertsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(weight.shape))

    def forward(self, x: Tensor, bias: Tensor | None) -> Routing:
        """Choose experts for `x` `(tokens, hidden)`; `bias` `(n_experts,)` enters the choice, not the weights."""
        compute = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(compute), self.tensor("weight").to(compute))
        cfg = self.cfg
        indices, weights, scores = moe_gate(
            logits,
            bias,
            top_k=cfg.top_k,
            scores=cfg.routing,
            normalize=cfg.normalize_top_k,
            scale=cfg.routed_scale,
            n_groups=cfg.n_groups,
            top_groups=cfg.top_groups,
        )
        return Routing(indices, weights, scores)


class Experts(Layer):
    """Gated feed-forward blocks, stacked; each one's matrices are laid out as nn.Linear's."""

    SEAMS = ("parameter_view", "product")

    def __init__(self, gate: Weight, up: Weight, down: Weight) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(w.shape)) for w in (gate, up, down))
        self.product: GroupedProduct = grouped_gemm

    def forward(self, rows: Tensor, group_sizes: Tensor) -> Tensor:
        """Apply each expert to its rows; returns `(rows, hidden)`.

        Args:
            rows: `(rows, hidden)` sorted by expert.
            group_sizes: `(experts,)` int64, the number of rows of each.
        """
        gate, up = (self.product(rows, self.tensor(name), group_sizes) for name in ("gate", "up"))
        return self.product(swiglu(gate, up), self.tensor("down"), group_sizes)


Dispatch = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def dispatch(tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Send tokens to experts that are all here and return the weighted sum of their outputs, `(tokens, hidden)`.

    Args:
        tokens: `(tokens, hidden)`. indices, weights: `(tokens, top_k)`.
    """
    rows, permutation = permute(tokens, indices, experts.gate.shape[0])
    return unpermute(experts(rows, permutation.group_sizes), permutation, weights)


class MoE(nn.Module):
    """A mixture of experts, `(batch, seq, hidden)` to the same. Expert parallelism replaces `dispatch`."""

    SEAMS = ("dispatch",)

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        moe = cfg.experts
        assert moe is not None
        weights = experts_weights(cfg)
        self.router = Router(weights["router"], moe)
        self.experts = Experts(*(weights[f"experts.{name}"] for name in ("gate", "up", "down")))
        shared = part_of(weights, "shared")
        self.shared = GatedMLP(shared) if shared else None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", None if moe.bias_rate is None else torch.zeros(moe.n_experts))
        self.balance = BalancePoint(moe)
        self.dispatch: Dispatch = dispatch

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        routing = self.router(tokens, self.expert_bias)
        out = self.dispatch(tokens, routing.indices, routing.weights, self.experts).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        batch = (x.shape[0], -1)
        return self.balance(out, routing.indices.unflatten(0, batch), routing.scores.unflatten(0, batch))


KERNELS = {"auto": "auto", "loop": "reference", "grouped_mm": "torch", "triton": "triton"}
"""`moe.backend` -> backend of `grouped_gemm`."""


def use_experts_backend(model: nn.Module, backend: str, compute_dtype: torch.dtype) -> None:
    """Let all experts of `model`, which is already on its device, multiply by the `moe.backend` of that name.

    Raises:
        UserError: it is not installed, or cannot compute in `compute_dtype` on the model's device.
    """
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        if backend == "megablocks":
            check_megablocks(experts.gate.device, compute_dtype)
            replace_seam(experts, "product", megablocks_product)
            continue
        if backend == "triton" and not triton_runs_on(experts.gate):
            raise UserError(
                "moe.backend=triton needs a GPU with tensor cores and the package triton: set auto"
            )
        replace_seam(experts, "product", partial(grouped_gemm, backend=KERNELS[backend]))
