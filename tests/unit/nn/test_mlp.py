"""The feed-forward block."""

import pytest
import torch

from megatrain.nn import mlp
from megatrain.nn.contract import Weight
from megatrain.nn.mlp import PlainMLP
from megatrain_kernels import bias_gelu


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_may_be_added_by_the_product_or_by_the_activation(
    activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU, and as on a GPU: same outputs and gradients."""
    torch.manual_seed(0)
    shapes = {"up": (24, 8), "down": (8, 24)}
    block = PlainMLP({name: Weight(shape, bias=bias) for name, shape in shapes.items()}, activation).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    calls = []
    monkeypatch.setattr(mlp, "bias_gelu", lambda *args, **kw: calls.append(1) or bias_gelu(*args, **kw))
    for devices in (("cpu",), ()):
        monkeypatch.setattr(mlp, "PRODUCT_ADDS_BIAS", devices)
        out = block(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, *block.parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert len(calls) == (bias and activation != "relu2")
