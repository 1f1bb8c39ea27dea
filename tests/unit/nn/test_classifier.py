"""The classifier's loss is torch's: cross entropy with class weights, or binary cross entropy with positive weights."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.nn.classifier import ClassifierHead, chosen_labels
from megatrain.nn.config import ClassifierConfig

LABELS = ("a", "b", "c")
WEIGHTS = (0.5, 1.0, 3.0)


def head(*, multi_label: bool, weights: tuple[float, ...] | None) -> ClassifierHead:
    return ClassifierHead(ClassifierConfig(labels=LABELS, multi_label=multi_label, class_weights=weights))


def draw(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).requires_grad_()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_one_label(weights: tuple[float, ...] | None) -> None:
    hidden, weight = draw(2, 5, 8), draw(3, 8)
    targets = torch.tensor([[-100, 0, -100, 2, 1], [2, -100, -100, -100, 0]])
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    logits = (hidden @ weight.T).flatten(0, 1)
    truth = F.cross_entropy(logits, targets.flatten(), weight=given, reduction="sum")
    loss = head(multi_label=False, weights=weights)(hidden, weight, targets)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    both = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, truth))
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_several_labels(weights: tuple[float, ...] | None) -> None:
    hidden, weight = draw(2, 4, 8), draw(3, 8)
    targets = torch.tensor([[-100, 0b000, 0b101, -100], [0b111, -100, 0b010, -100]])
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    rows = targets >= 0
    truth_of = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.float64)
    logits = (hidden @ weight.T)[rows]
    truth = F.binary_cross_entropy_with_logits(logits, truth_of, pos_weight=given, reduction="sum") / 3
    own = head(multi_label=True, weights=weights)
    loss = own(hidden, weight, targets)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    both = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, truth))
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    each = own(hidden, weight, targets, per_token=True)
    assert (each[~rows] == 0).all()
    assert chosen_labels(logits, is_multi=True).tolist() == [
        sum(1 << c for c, value in enumerate(row) if value > 0) for row in logits.tolist()
    ]
