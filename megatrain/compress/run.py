"""Compression of a loaded model by any method, in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatrain.compress.codes import Codes, Grid
from megatrain.compress.methods import Method, Pruning, Quantization, Sparsity
from megatrain.compress.prune import prune_model, pruned_config
from megatrain.compress.quantize import quantize_model
from megatrain.compress.selection import compressed_names, pick_group
from megatrain.compress.sparsify import sparsify_model
from megatrain.config.errors import UserError
from megatrain.data.loader import Batch
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.parallel.quantized_inputs import quantize_inputs
from megatrain.train.export import DTYPES
from megatrain.train.inference import TrainedModel

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model, checked against it."""

    method: Method
    model: ModelConfig
    """What comes of it."""
    names: list[str]
    """Canonical names of the parameters that are compressed."""
    grid: Grid | None
    """Of quantization."""
    dtype: str
    """Of what is not quantized, and of scales: a key of `DTYPES`."""
    sparsity: float


@dataclass(frozen=True)
class Compressed:
    """A model after compression, with the numbers in memory that its files stand for."""

    trained: TrainedModel
    codes: dict[str, Codes]
    """Of quantized parameters by canonical name."""


def make_plan(
    model: ModelConfig,
    method: Method,
    *,
    group: int | None = None,
    head: bool = False,
    dtype: str = "fp16",
    sparsity: float = 0.5,
    heads: int | None = None,
    ffn: int | None = None,
) -> Plan:
    """Check the options against the model, without reading its weights.

    Raises:
        UserError: they do not fit.
    """
    if model.classifier is not None:
        raise UserError(
            "compress: the model classifies (model.classifier); only models that predict tokens are known"
        )
    weights = get_spec(model.kind).plan(model)
    names = compressed_names(weights, head=head)
    grid = None
    if isinstance(method, Quantization):
        if method.fit == "awq" and model.experts is not None:
            raise UserError(
                "compress: int4-awq does not know experts (model.experts): use --method int4-gptq"
            )
        size = pick_group(weights, names, group) if method.is_grouped else None
        grid = Grid(method.number, size, DTYPES[dtype])
    if isinstance(method, Sparsity):
        if not 0 < sparsity < 1:
            raise UserError(f"compress: --sparsity {sparsity:g}: must be above 0 and below 1")
        odd = [name for name in names if weights.shapes[name][-1] % 4]
        if method.is_two_of_four and odd:
            raise UserError(f"compress: 2:4 sparsity needs inputs in multiples of 4; {odd[0]} has others")
    becomes = pruned_config(model, heads=heads, ffn=ffn) if isinstance(method, Pruning) else model
    return Plan(method, becomes, names, grid, dtype, sparsity)


@torch.no_grad()
def compress(trained: TrainedModel, plan: Plan, batches: Sequence[Batch], progress: Progress) -> Compressed:
    """Compress the model of `trained`, whose weights are changed.

    Args:
        batches: calibration text, where the method needs it.
    """
    model, method = trained.parallel.models[0], plan.method
    batches = [_on(batch, trained.parallel.device) for batch in batches]
    codes: dict[str, Codes] = {}
    if isinstance(method, Quantization):
        assert plan.grid is not None
        codes = quantize_model(model, plan.names, method, plan.grid, batches=batches, progress=progress)
    elif isinstance(method, Sparsity):
        sparsify_model(model, plan.names, method, plan.sparsity, batches=batches, progress=progress)
    elif isinstance(method, Pruning):
        model = prune_model(model, plan.model, batches, progress)
        parallel = replace(trained.parallel, models=[model], plan=get_spec(plan.model.kind).plan(plan.model))
        trained = replace(trained, parallel=parallel, cfg=replace(trained.cfg, model=plan.model))
    for name, parameter in model.named_parameters():
        if name not in codes:
            parameter.copy_(parameter.to(DTYPES[plan.dtype]))
    if isinstance(method, Quantization) and method.quantizes_inputs:
        quantize_inputs(trained.parallel)
    return Compressed(trained, codes)


def _on(batch: Batch, device: torch.device) -> Batch:
    moved = {
        name: each.to(device)
        for name in ("tokens", "targets", "positions")
        for each in [getattr(batch, name)]
    }
    return Batch(**moved, doc_ids=None if batch.doc_ids is None else batch.doc_ids.to(device))
