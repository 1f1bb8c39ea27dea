"""Which key a query sees: counts and ranges against the mask, which is the definition."""

import itertools

import torch

from megatrain_kernels.flash_attention.reference import Rule, allowed


def test_pairs_and_ranges_are_those_of_the_mask() -> None:
    for q_seq, k_seq, offset, window, causal in itertools.product(
        (1, 4, 7), (1, 5, 8), (-9, -3, 0, 2, 11), (None, 1, 3, 20), (True, False)
    ):
        rule = Rule(causal, 1.0, window, None, offset)
        mask = allowed(
            q_seq, k_seq, causal=causal, window=window, q_offset=offset, device=torch.device("cpu")
        )
        assert rule.pairs(q_seq, k_seq) == mask.sum(), (q_seq, k_seq, rule)
        assert rule.sees_any(0, q_seq, k_seq) >= mask.any().item()
        for query in range(q_seq):
            first, last = rule.keys(query, query + 1, k_seq)
            assert mask[query].nonzero().flatten().tolist() == list(range(first, last)), (query, rule)
