"""The embedding's gradient, also in low precision."""

import pytest
import torch

from megatrain.nn.contract import Weight
from megatrain.nn.embed import Embedding

VOCAB, SIZE, TOKENS = 50, 16, 2000


def draw(dtype: torch.dtype) -> tuple[Embedding, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = Embedding(Weight((VOCAB, SIZE))).to(dtype)
    model.weight.data = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)
    index = torch.randint(VOCAB // 2, (2, TOKENS // 2), generator=generator)  # half of the rows are not used
    grad = (torch.randn(2, TOKENS // 2, SIZE, generator=generator) + 0.5).to(dtype)
    return model, index, grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_gradient(dtype: torch.dtype) -> None:
    model, index, grad = draw(dtype)
    rows = model(index)
    assert torch.equal(rows, torch.stack([model.weight[i] for i in index.flatten()]).view_as(rows))
    rows.backward(grad)
    expected = torch.zeros(VOCAB, SIZE, dtype=torch.float64)
    for token, each in zip(index.flatten().tolist(), grad.reshape(-1, SIZE), strict=True):
        expected[token] += each.double()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == dtype
    # The sum of 80 values near 1 is off by at most 80 · 80 / 2 units of the summing type; then one rounding.
    summing = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(
        model.weight.grad.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=3200 * summing
    )


def test_a_frozen_table_gets_no_gradient() -> None:
    model, index, _ = draw(torch.bfloat16)
    model.weight.requires_grad_(False)
    assert not model(index).requires_grad
