"""What "auto" takes on a GPU: the fastest path in `choices.json`, which holds what was measured, and is shipped.

`python -m benchmarks.attention_choices RESULT/gpu.json` adds a measured GPU to the table.
"""

import json
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from megatrain_kernels.backend import cuda_capability
from megatrain_kernels.flash_attention.reference import Rule

VARYING = frozenset({"triton_fused", "triton_hopper"})
"""Paths whose gradients differ in their last bits from call to call."""


def mask_of(documents: bool, rule: Rule) -> str:
    """Return the kind of mask by which times are compared."""
    if rule.softcap is not None:
        return "softcap"
    if documents:
        return "documents"
    return "window" if rule.window is not None else "causal" if rule.causal else "full"


@torch.compiler.assume_constant_result
@cache
def measured(
    capability: tuple[int, int], mask: str, head_dim: int, v_dim: int
) -> list[tuple[int, dict[str, float]]]:
    """Return the measured cases of a kind: the keys' number, and milliseconds of both passes by path."""
    table = json.loads(files(__package__).joinpath("choices.json").read_text())
    found = []
    for device in table["devices"]:
        for row in device["cases"] if tuple(device["capability"]) == capability else ():
            if (row["mask"], row["head_dim"], row["v_dim"]) == (mask, head_dim, v_dim):
                found.append((row["k_seq"], row["ms"]))
    return found


def fastest(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> list[str]:
    """Return the paths measured for the nearest length on this kind of GPU, the fastest first; none: an empty list.

    With `torch.use_deterministic_algorithms` those whose bits vary are left out.
    """
    if not q.is_cuda:
        return []
    rows = measured(
        cuda_capability(q.device.index or 0), mask_of(doc_ids is not None, rule), q.shape[-1], v.shape[-1]
    )
    if not rows:
        return []
    k_seq = k.shape[1]
    _, times = min(rows, key=lambda row: abs(row[0].bit_length() - k_seq.bit_length()))
    left_out = VARYING if torch.are_deterministic_algorithms_enabled() else frozenset()
    return sorted(times.keys() - left_out, key=times.__getitem__)
