"""Inputs of attention for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.flash_attention.reference import Rule
from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "batch q_seq k_seq heads kv_heads head_dim v_dim")
CASES = [
    _case("gpt2_124m", "16 1024 1024 12 12 64 64"),
    _case("llama3_1b", "2 8192 8192 32 8 64 64"),
    _case("llama3_8b", "1 8192 8192 32 8 128 128"),
    _case("llama3_8b_16k", "1 16384 16384 32 8 128 128"),
    _case("full_16k", "1 16384 16384 16 16 128 128", causal=False),
    _case("window_16k", "1 16384 16384 32 8 128 128", window=4096),
    _case("documents_16k", "1 16384 16384 32 8 128 128", documents=16),
    _case("softcap_8k", "1 8192 8192 8 4 256 256", softcap=50.0),
    _case("head_96_8k", "1 8192 8192 32 32 96 96"),
    _case("latent_8k", "1 8192 8192 16 16 192 128"),
    _case("ring_block", "1 8192 8192 32 8 128 128", q_offset=8192),
    _case("decode", "64 1 8192 32 8 128 128", q_offset=8191),
]
"""Options are `attention`'s; `documents` is how many equal documents a row holds (as doc_ids)."""
SMALL = [
    _case("causal_64", "2 193 193 4 2 64 64"),
    _case("causal_128", "1 321 321 2 1 128 128"),
    _case("full_128", "1 193 193 2 2 128 128", causal=False),
    _case("window", "1 321 321 2 1 128 128", window=100),
    _case("documents", "2 321 321 2 1 128 128", documents=5),
    _case("softcap_256", "1 193 193 2 1 256 256", softcap=5.0),
    _case("head_96", "1 193 193 2 1 96 96"),
    _case("latent", "1 193 193 2 2 192 128"),
    _case("ring_block", "1 150 193 2 1 128 128", q_offset=193),
    _case("decode", "3 1 321 4 2 128 128", q_offset=320),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Draw q, k and v of normal numbers, and make equal documents where the case has them."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    shapes = [
        (n["batch"], n["q_seq"], n["heads"], n["head_dim"]),
        (n["batch"], n["k_seq"], n["kv_heads"], n["head_dim"]),
        (n["batch"], n["k_seq"], n["kv_heads"], n["v_dim"]),
    ]
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(device, dtype) for shape in shapes)
    options = dict(case.options)
    documents = options.pop("documents", None)
    if documents:
        ids = torch.arange(n["k_seq"], device=device) * documents // n["k_seq"]
        options["doc_ids"] = ids.expand(n["batch"], -1).contiguous()
    return (q, k, v), options


def visible_pairs(sizes: dict[str, int], options: dict[str, Any]) -> int:
    """Count the pairs of query and key of one row and head that see each other."""
    q_seq, k_seq = sizes["q_seq"], sizes["k_seq"]
    documents = options.get("documents", 1)
    rule = Rule(options.get("causal", True), 1.0, options.get("window"), None, options.get("q_offset", 0))
    total = 0
    for query in range(q_seq):
        first, last = rule.keys(query, query + 1, k_seq)
        document = (query + rule.q_offset) * documents // k_seq if documents > 1 else 0
        first, last = (
            max(first, -(-document * k_seq // documents)),
            min(last, -(-(document + 1) * k_seq // documents)),
        )
        total += max(0, last - first)
    return total


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count two products forward and five backward of the visible pairs; each tensor crosses memory once."""
    n = case.sizes
    pairs = n["batch"] * n["heads"] * visible_pairs(n, case.options)
    per_pair = 3 * n["head_dim"] + 2 * n["v_dim"] if backward else n["head_dim"] + n["v_dim"]
    queries = n["batch"] * n["q_seq"] * n["heads"]
    keys = n["batch"] * n["k_seq"] * n["kv_heads"]
    numbers = (queries + keys) * (n["head_dim"] + n["v_dim"])
    statistics = queries * 4 * (2 if backward else 1)  # log-sum-exp, and its gradient
    return Cost(2.0 * pairs * per_pair, float(numbers * itemsize * (2 if backward else 1) + statistics))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    gradients=(0, 1, 2),
    timed_backends=("auto", "triton", "triton_fused", "triton_hopper"),
)
