"""Attention in float64 by chunks of queries, on the device itself, with what rounding may put each element off.

32k tokens take seconds on a GPU and no more memory than a chunk's scores. The gradients are written out, so that each
is known together with the sizes of the terms that it is a sum of (`rounding.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.rounding import Rounding
from megatrain_kernels.flash_attention.reference import Rule, allowed

CHUNK = 1 << 24
"""Scores of a chunk; ten such tensors of float64 are held at once."""

Found = dict[str, tuple[Tensor, Tensor]]
"""Name -> the true result and what each of its elements may be off."""


class _Sums(NamedTuple):
    """What is added up over queries for the gradient of keys or values, `(group, k_seq, dim)` each."""

    value: Tensor
    size: Tensor
    squares: Tensor
    noise: Tensor
    by_delta: Tensor
    by_delta_squares: Tensor

    @classmethod
    def zeros(cls, group: int, like: Tensor) -> "_Sums":
        """Return sums of nothing yet."""
        return cls(*(like.new_zeros(group, *like.shape) for _ in cls._fields))

    def add(
        self, seen: slice, weights: Tensor, terms: Tensor, noise: Tensor, by_delta: Tensor | None
    ) -> None:
        """Add weightsᵀ terms `(group, keys, dim)`.

        noise: error of each weight. by_delta: that part which is one for all weights of a query, times each's share.
        """
        turned = weights.mT
        self.value[:, seen] += turned @ terms
        self.size[:, seen] += turned.abs() @ terms.abs()
        self.squares[:, seen] += turned.square() @ terms.square()
        self.noise[:, seen] += noise.mT @ terms.abs()
        if by_delta is not None:
            self.by_delta[:, seen] += by_delta.mT.abs() @ terms.abs()
            self.by_delta_squares[:, seen] += by_delta.mT.square() @ terms.square()

    def found(self, r: Rounding) -> tuple[Tensor, Tensor]:
        """Return the sum over the group's heads, each of which may have been stored, and what it may be off."""
        stored = 2 * r.u * self.value.abs().sum(0)
        terms = r.u * r.of_terms(self.size.sum(0), self.squares.sum(0))
        delta = r.of_terms(self.by_delta.sum(0), self.by_delta_squares.sum(0))
        return self.value.sum(0), stored + terms + self.noise.sum(0) + delta


class _Inputs(NamedTuple):
    """One batch row and key head: q `(group, q_seq, dim)`, k and v `(k_seq, dim)`, the rest as q; all float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    docs: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def attention_truth(
    given: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    r: Rounding,
) -> Found:
    """Return output, log-sum-exp and the three gradients, with what their elements may be off.

    Args:
        given: q, k, v as `attention` takes them, of any type. options: its options.
        grad_out, grad_lse: gradients of output and log-sum-exp; None: of the output alone.

    Returns:
        "output 0" (the output), "output 1" (the log-sum-exp), "gradient 0" to "gradient 2" (q, k, v).
    """
    q, k, v = (t.double() for t in given)
    scale = options.get("scale")
    rule = Rule(
        options.get("causal", True),
        q.shape[-1] ** -0.5 if scale is None else scale,
        options.get("window"),
        options.get("softcap"),
        options.get("q_offset", 0),
    )
    batch, q_seq, heads, _ = q.shape
    kv_heads, docs = k.shape[2], options.get("doc_ids")
    lse_gradient = q.new_zeros(batch, heads, q_seq) if grad_lse is None else grad_lse.double()
    parts = []
    for row in range(batch):
        for head in range(kv_heads):
            mine = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            one = _Inputs(
                q[row, :, mine].transpose(0, 1),
                k[row, :, head],
                v[row, :, head],
                None if docs is None else docs[row],
                grad_out[row, :, mine].transpose(0, 1).double(),
                lse_gradient[row, mine],
            )
            parts.append(_one_head(one, rule, r))
    return {
        name: (
            _joined([part[name][0] for part in parts], name, batch, kv_heads),
            _joined([part[name][1] for part in parts], name, batch, kv_heads),
        )
        for name in parts[0]
    }


def _joined(parts: list[Tensor], name: str, batch: int, kv_heads: int) -> Tensor:
    """Put what was found for each batch row and key head into the shape that `attention` gives."""
    whole = torch.stack(parts).unflatten(0, (batch, kv_heads))
    if name == "output 1":
        return whole.flatten(1, 2)
    if name in ("output 0", "gradient 0"):  # (batch, kv_heads, group, seq, dim)
        return whole.flatten(1, 2).transpose(1, 2)
    return whole.transpose(1, 2)


def _one_head(x: _Inputs, rule: Rule, r: Rounding) -> Found:
    group, q_seq, _ = x.q.shape
    k_seq = x.k.shape[0]
    rows = max(1, CHUNK // (group * k_seq))
    sums = {"gradient 1": _Sums.zeros(group, x.k), "gradient 2": _Sums.zeros(group, x.v)}
    by_query: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [] for name in ("output 0", "output 1", "gradient 0")
    }
    for start in range(0, q_seq, rows):
        part = slice(start, min(start + rows, q_seq))
        for name, found in _chunk(x, rule, r, part, sums).items():
            by_query[name].append(found)
    found = {
        name: (torch.cat([t for t, _ in chunks], 1), torch.cat([t for _, t in chunks], 1))
        for name, chunks in by_query.items()
    }
    return found | {name: each.found(r) for name, each in sums.items()}


def _chunk(x: _Inputs, rule: Rule, r: Rounding, part: slice, sums: dict[str, _Sums]) -> Found:
    """Return what belongs to some queries, and add their parts to the gradients of keys and values.

    With probabilities P = exp(S - lse): dS = P ∘ (dO Vᵀ - delta), delta = rowsum(dO ∘ O) - dlse. A kernel has P and dS
    in the inputs' type when it multiplies them, and O too when it makes delta, so that an error of delta is one for
    all keys of a query.
    """
    first, last = rule.keys(part.start, part.stop, x.k.shape[0])
    seen = slice(first, max(last, first + 1))  # one key at least, which the mask then hides
    q, k, v, grad_out = x.q[:, part], x.k[seen], x.v[seen], x.grad_out[:, part]
    scores, slope = _scores(q, k, rule)
    scores = scores.masked_fill(~_mask(x, rule, part, seen), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse.masked_fill(lse.isneginf(), 0.0)).exp()
    # Scores are float32: an error of one is one of its probability's size.
    largest = rule.scale * q.norm(dim=-1, keepdim=True) * x.k.norm(dim=-1).max() + (rule.softcap or 0.0)
    noise = r.e * (1 + largest)
    size = p @ v.abs()
    out = p @ v
    terms = r.of_terms(size, (p.square() @ v.square()))
    out_off = r.u * (out.abs() + terms) + noise * size
    lse_off = noise + r.e * lse.abs().masked_fill(lse.isinf(), 0.0)

    product = out * grad_out
    delta = product.sum(-1, keepdim=True) - x.grad_lse[:, part, None]
    known = out_off * grad_out
    delta_off = r.of_terms(known.abs().sum(-1, keepdim=True), known.square().sum(-1, keepdim=True))
    delta_off = delta_off + r.e * (product.abs().sum(-1, keepdim=True) + delta.abs())
    steep = p * slope
    ds = steep * (grad_out @ v.mT - delta)
    ds_off = noise * ds.abs() + steep.abs() * (
        r.e * grad_out.norm(dim=-1, keepdim=True) * x.v.norm(dim=-1).max()
    )
    grad_q = ds @ k
    terms = r.of_terms(ds.abs() @ k.abs(), ds.square() @ k.square())
    grad_q_off = 2 * r.u * grad_q.abs() + r.u * terms + ds_off @ k.abs() + delta_off * (steep @ k).abs()
    sums["gradient 1"].add(seen, ds, q, ds_off, steep * delta_off)
    sums["gradient 2"].add(seen, p, grad_out, noise * p, None)
    return {
        "output 0": (out, out_off),
        "output 1": (lse.squeeze(-1), lse_off.squeeze(-1)),
        "gradient 0": (grad_q, grad_q_off),
    }


def _scores(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the scores, and their derivative by the plain product of query and key."""
    raw = rule.scale * (q @ k.mT)
    if rule.softcap is None:
        return raw, torch.full_like(raw[..., :1], rule.scale)
    bent = (raw / rule.softcap).tanh()
    return rule.softcap * bent, rule.scale * (1 - bent.square())


def _mask(x: _Inputs, rule: Rule, part: slice, seen: slice) -> Tensor:
    rows, keys = part.stop - part.start, seen.stop - seen.start
    mask = allowed(
        rows,
        keys,
        causal=rule.causal,
        window=rule.window,
        q_offset=part.start + rule.q_offset - seen.start,
        device=x.q.device,
    )
    if x.docs is None:
        return mask
    queries = x.docs[part.start + rule.q_offset : part.stop + rule.q_offset]
    return mask & (queries[:, None] == x.docs[None, seen])
