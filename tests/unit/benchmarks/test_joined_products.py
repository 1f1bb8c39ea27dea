"""The benchmark of joined products measures ways that compute the same."""

import torch

from benchmarks.joined_products import WAYS, measure


def test_all_ways_compute_the_same() -> None:
    torch.manual_seed(0)
    x, weights = (
        torch.randn(6, 8, requires_grad=True),
        [torch.randn(n, 8, requires_grad=True) for n in (5, 3)],
    )
    found = []
    for way in WAYS.values():
        outputs = way(x, weights)
        loss = torch.stack([out.square().sum() for out in outputs]).sum()
        found.append([*outputs, *torch.autograd.grad(loss, (x, *weights))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_every_way_is_timed() -> None:
    assert all(ms > 0 for ms in measure(4, 8, (5, 3), torch.device("cpu")).values())
