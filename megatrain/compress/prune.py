"""Structured pruning: whole attention heads and feed-forward channels go, and a smaller dense model stays.

A head or channel counts by what it adds to the residual stream on calibration text: the norms of its inputs to the
output projection, times those of the weights there (Wanda's score, arXiv 2306.11695, summed over the structure, as in
FLAP, arXiv 2312.11983). Key and value heads go together with the query heads that they serve. What stays of each output
projection is fitted by least squares, so that it returns on this text what the full one did as nearly as it can.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatrain.compress.calibration import Moments, walk
from megatrain.config.errors import UserError
from megatrain.config.load import dump, load
from megatrain.data.loader import Batch
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.nn.decoder import Decoder

Progress = Callable[[str, float], None]
RIDGE = 1e-4
"""Share of the mean of the second moments' diagonal that is added to it, so that the fit exists."""


def pruned_config(model: ModelConfig, *, heads: int | None, ffn: int | None) -> ModelConfig:
    """Return the config of `model` with as many query heads and feed-forward channels in each layer as asked.

    Raises:
        UserError: there are not so many, key heads would serve unequal groups, or the model is of another kind.
    """
    if model.mla is not None or model.experts is not None:
        raise UserError("compress: --method prune knows neither latent attention (model.mla) nor experts")
    if heads is None and ffn is None:
        raise UserError(
            "compress: --method prune needs --heads N, --ffn N or both: how many are kept in each layer"
        )
    serves = model.n_heads // model.kv_heads
    heads, ffn = model.n_heads if heads is None else heads, model.ffn_size if ffn is None else ffn
    if not 0 < heads <= model.n_heads or heads % serves:
        rule = f"must be a multiple of {serves}, the query heads of a key head, " * (serves > 1)
        raise UserError(f"compress: --heads {heads}: {rule or 'must be '}from {serves} to {model.n_heads}")
    if not 0 < ffn <= model.ffn_size:
        raise UserError(f"compress: --ffn {ffn}: must be from 1 to {model.ffn_size}")
    kept: dict[str, int | None] = {"n_heads": heads, "ffn_size": ffn}
    if model.n_kv_heads is not None:
        kept["n_kv_heads"] = heads // serves
    if heads != model.n_heads:
        kept["head_dim"] = model.qk_head_dim
    made: ModelConfig = load(type(model), dump(model) | kept)
    return made


@torch.no_grad()
def prune_model(model: Decoder, cfg: ModelConfig, batches: Sequence[Batch], progress: Progress) -> Decoder:
    """Return `model` with the heads and channels of `cfg` that count most on `batches`; `model` is changed, too."""
    before = model.cfg
    first = next(model.parameters())
    small = get_spec(cfg.kind).build(cfg).to(first.dtype).to(first.device)
    state = model.state_dict()
    serves = before.n_heads // before.kv_heads
    for layer, block, moments in walk(model, batches):
        progress(f"pruning, layer {layer + 1}", layer / before.n_layers)
        at = f"layers.{layer}."
        named = dict(block.named_parameters())
        group = serves * before.qk_head_dim
        groups = _most(named["attn.wo.weight"], moments[f"{at}attn.wo.weight"], group, cfg.kv_heads)
        queries = _members(groups, group)
        keys = _members(groups, before.qk_head_dim)
        channels = _most(named["mlp.down.weight"], moments[f"{at}mlp.down.weight"], 1, cfg.ffn_size)
        for name, kept in (("attn.wo", queries), ("mlp.down", channels)):
            fitted = refitted(named[f"{name}.weight"], moments[f"{at}{name}.weight"].gram, kept)
            state[f"{at}{name}.weight"] = fitted
            named[f"{name}.weight"].zero_()[:, kept] = fitted  # so that the next blocks see the pruned one
        rows = {
            "attn.wq": queries,
            "attn.wk": keys,
            "attn.wv": keys,
            "mlp.gate": channels,
            "mlp.up": channels,
        }
        for name, kept in rows.items():
            for part in ("weight", "bias"):
                if f"{name}.{part}" in named:
                    state[f"{at}{name}.{part}"] = named[f"{name}.{part}"][kept]
    small.load_state_dict(state)
    return small


def _most(weight: Tensor, moments: Moments, size: int, count: int) -> Tensor:
    """Return the `count` structures of `size` inputs each that count most for the output `weight` `(out, in)`."""
    score = (weight.double() * moments.norm).square().sum(0).unflatten(0, (-1, size)).sum(1)
    return score.argsort(dim=-1, descending=True, stable=True)[:count].sort().values


def _members(structures: Tensor, size: int) -> Tensor:
    """Return the indices of the elements of structures of `size`."""
    return (structures[:, None] * size + torch.arange(size, device=structures.device)).flatten()


def refitted(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Return the matrix `(out, kept)` that returns nearest to what `weight` `(out, in)` does, from the inputs `kept`.

    Args:
        gram: `(in, in)`, the sum of x xᵀ. kept: indices of inputs.
    """
    inner = gram[kept][:, kept]
    mean = inner.diagonal().mean()
    inner = inner + torch.where(mean > 0, RIDGE * mean, 1.0) * torch.eye(len(kept)).to(gram)
    # Of what the ridge takes away, nothing is lost: the fit is of the difference to the kept weights.
    exact = weight.double()
    missing = exact @ gram[:, kept] - exact[:, kept] @ gram[kept][:, kept]
    return (exact[:, kept] + torch.linalg.solve(inner, missing.T).T).to(weight.dtype)
