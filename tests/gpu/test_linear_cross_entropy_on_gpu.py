"""The fused loss on a CUDA device, of a vocabulary of odd size that takes several chunks of tokens."""

import warnings
from importlib import import_module

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatrain_kernels import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("chunks", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_many_chunks(dtype: torch.dtype, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added in float32 by the product itself: nothing falls back with a warning."""
    module = import_module("megatrain_kernels.linear_xent.op")
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 4096 // chunks)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cuda": 1})
    generator = torch.Generator("cuda").manual_seed(1)
    x, weight = (
        torch.randn(rows, 96, generator=generator, device="cuda").to(dtype).requires_grad_()
        for rows in (4096, 5003)
    )
    targets = torch.randint(5003, (4096,), generator=generator, device="cuda")
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    true_loss = cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = linear_cross_entropy(x, weight, targets, reduction="sum")
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert abs(loss.item() / true_loss.item() - 1) <= tolerance
    true = torch.autograd.grad(true_loss, wide)
    for mine, exact in zip(torch.autograd.grad(loss, (x, weight)), true, strict=True):
        assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()
