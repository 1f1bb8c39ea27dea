"""The gate's Triton kernels against a loop over tokens in float64, and its gradients against PyTorch's in float64."""

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain_kernels import moe_gate
from megatrain_kernels.router.reference import GateRule

TOLERANCE = (
    32 * torch.finfo(torch.float32).eps
)  # scores are at most 1; a weight is a quotient of a few of them
GROUPED: dict[str, Any] = {"scores": "sigmoid", "scale": 2.5, "n_groups": 8, "top_groups": 3}
RULE: dict[str, Any] = {"scores": "softmax", "normalize": True, "scale": 1.0, "n_groups": 1, "top_groups": 1}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "softmax": (17, 8, {"top_k": 2}),
    "one token, one expert": (1, 1, {"top_k": 1}),
    "not a power of two": (9, 60, {"top_k": 7, "normalize": False}),
    "all experts": (5, 6, {"top_k": 6, "scale": 0.3}),
    "sigmoid": (11, 33, {"top_k": 4, "scores": "sigmoid"}),
    "sigmoid as it is": (11, 16, {"top_k": 4, "scores": "sigmoid", "normalize": False, "scale": 2.0}),
    "groups": (19, 64, {"top_k": 6, **GROUPED}),
    "groups of softmax": (19, 32, {"top_k": 3, "n_groups": 4, "top_groups": 2}),
    "no tokens": (0, 8, {"top_k": 2}),
}


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).float()


def true_choice(scores: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Token by token, by sorting."""
    found = []
    for row in scores if bias is None else scores + bias:
        groups = row.tolist()
        size = len(groups) // options.get("n_groups", 1)
        parts = [groups[at : at + size] for at in range(0, len(groups), size)]
        order = sorted(range(len(parts)), key=lambda g: -sum(sorted(parts[g])[-2:]))
        usable = [g * size + i for g in order[: options.get("top_groups", 1)] for i in range(size)]
        found.append(sorted(usable, key=lambda expert: -groups[expert])[: options["top_k"]])
    return torch.tensor(found, dtype=torch.int64).view(len(scores), options["top_k"])


def right(logits: Tensor, bias: Tensor | None, options: dict[str, Any], backend: str = "triton") -> bool:
    """Choice, weights, scores and the gradient of the logits."""
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    true_scores = wide.sigmoid() if options.get("scores") == "sigmoid" else wide.softmax(-1)
    true_indices = true_choice(true_scores.detach(), None if bias is None else bias.double(), options)
    true_weights = true_scores.gather(1, true_indices) * options.get("scale", 1.0)
    if options.get("normalize", True):
        true_weights = true_weights / true_scores.gather(1, true_indices).sum(-1, keepdim=True)
    indices, weights, scores = moe_gate(leaf, bias, backend=backend, **options)
    if not torch.equal(indices, true_indices):
        return False
    cotangents = draw(5, *weights.shape), draw(6, *scores.shape)
    (grad,) = torch.autograd.grad((weights, scores), leaf, cotangents)
    (true,) = torch.autograd.grad((true_weights, true_scores), wide, [t.double() for t in cotangents])
    pairs = ((weights, true_weights), (scores, true_scores), (grad, true))
    return all(
        (mine.dtype, mine.shape) == (torch.float32, truth.shape)
        and bool(((mine.double() - truth).abs() <= TOLERANCE * truth.abs().clamp(min=1)).all())
        for mine, truth in pairs
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "options"), CASES.values(), ids=CASES)
def test_case(tokens: int, experts: int, options: dict[str, Any], biased: bool, backend: str) -> None:
    assert right(draw(1, tokens, experts), draw(2, experts, scale=0.1) if biased else None, options, backend)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 8),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any(tokens: int, experts: int, top_k: int, scores: str, normalize: bool, seed: int) -> None:
    options = {"top_k": min(top_k, experts), "scores": scores, "normalize": normalize}
    assert right(draw(seed, tokens, experts, scale=2), draw(seed + 1, experts, scale=0.2), options)


def test_strided_logits() -> None:
    assert right(draw(1, 40, 9).T, None, {"top_k": 3})
    assert right(draw(1, 9, 80)[:, ::2], None, {"top_k": 3})


def test_large_logits_stay_numbers() -> None:
    """exp of them would not; sigmoids of all experts may be 0, and then so are the weights."""
    assert right(draw(1, 9, 16, scale=200), None, {"top_k": 1, "normalize": False})
    # Not larger: sigmoids would be rounded to 1, and the best expert could be any of those.
    assert right(draw(1, 9, 16, scale=5), None, {"top_k": 2, "scores": "sigmoid", "normalize": False})
    weights = moe_gate(torch.full((2, 8), -200.0), top_k=2, scores="sigmoid", backend="triton")[1]
    assert torch.equal(weights, torch.zeros(2, 2))


def test_equal_scores_give_different_experts() -> None:
    """Of equal ones the first, also across groups: each token has top_k experts."""
    indices = moe_gate(torch.zeros(3, 64), top_k=6, **GROUPED, backend="triton")[0]
    assert indices.tolist() == [list(range(6))] * 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 2, **GROUPED}])
def test_a_token_that_is_not_a_number(options: dict[str, Any]) -> None:
    """Its experts exist, its weights show it, and the other tokens do not notice."""
    logits = draw(1, 3, 64)
    clean = moe_gate(logits, backend="triton", **options)
    logits[1, 5] = torch.nan
    indices, weights, _ = moe_gate(logits, backend="triton", **options)
    assert 0 <= int(indices[1].min()) <= int(indices[1].max()) < 64
    assert len(set(indices[1].tolist())) == 2
    assert weights[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(indices[row], clean[0][row])
        assert torch.equal(weights[row], clean[1][row])


def _not_taken(module: Any, patch: pytest.MonkeyPatch) -> None:
    """One group more than allowed."""
    inside = module.inside_best_groups
    patch.setattr(module, "inside_best_groups", lambda *args: inside(*args[:-1], args[-1] + 1))


def _launched_with(kernel: Any, place: int, change: Any) -> Any:
    """The kernel, with another value of its argument at `place`; 19 tokens need three programs."""

    def launch(*args: Any, **constants: Any) -> None:
        kernel[(3,)](*args[:place], change(args[place]), *args[place + 1 :], **constants)

    return {(3,): launch}


def _mask_off_by_one(module: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "gate_kernel", _launched_with(module.gate_kernel, 5, lambda tokens: tokens - 1))


def _missing_scale(module: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        module, "gate_backward_kernel", _launched_with(module.gate_backward_kernel, 7, lambda scale: 1.0)
    )


def _unnormalised(module: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "SMALL", 1.0)


@pytest.mark.parametrize("breaks", [_not_taken, _mask_off_by_one, _missing_scale, _unnormalised])
def test_a_broken_kernel_is_noticed(breaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, options = draw(1, 19, 64), {"top_k": 6, **GROUPED}
    assert right(logits, None, options)
    breaks(import_module("megatrain_kernels.router.triton"), monkeypatch)
    assert not right(logits, None, options)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 2, **GROUPED}])
def test_operators_keep_their_contract(options: dict[str, Any]) -> None:
    """Schema, fake shapes and strides, and the gradient's registration, as torch checks them."""
    operation = import_module("megatrain_kernels.router.op")
    rule = GateRule(**{**RULE, **options})
    logits = draw(1, 5, 64).requires_grad_()
    torch.library.opcheck(operation.gate_op, (logits, draw(2, 64, scale=0.1), *rule, "triton"))
    weights, scores, indices = operation.gate_op(logits.detach(), None, *rule, "triton")
    settings_ = (rule.scores, rule.normalize, rule.scale, "triton")
    torch.library.opcheck(operation.gate_backward_op, (indices, scores, weights, scores, *settings_))


def test_pytorch_takes_over_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same results, and the gradient's closed form."""
    operation = import_module("megatrain_kernels.router.op")
    kernels = import_module("megatrain_kernels.router.triton")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("megatrain_kernels.kernel._failed", set())
    monkeypatch.setattr(kernels, "gate", fails)
    monkeypatch.setattr(kernels, "gate_backward", fails)
    for options in ({"scores": "softmax", "scale": 2.0}, {"scores": "sigmoid", "normalize": False}):
        rule = GateRule(**{"top_k": 2, **RULE, **options})
        leaf, cotangents = draw(1, 5, 8).requires_grad_(), (draw(5, 5, 2), draw(6, 5, 8))
        with pytest.warns(
            UserWarning, match="moe_gate: Triton failed, PyTorch takes over: no such instruction"
        ):
            found = operation.gate_op(leaf, None, *rule, "triton_or_torch")
        with pytest.warns(UserWarning, match="moe_gate: Triton failed"):
            (grad,) = torch.autograd.grad(found[:2], leaf, cotangents)
        _, weights, scores = moe_gate(leaf, backend="torch", **rule._asdict())
        (true,) = torch.autograd.grad((weights, scores), leaf, cotangents)
        torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs float32; got torch.float64"):
        moe_gate(torch.zeros(2, 8, dtype=torch.float64), top_k=2, backend="triton")
    with pytest.raises(ValueError, match="12 experts in 4"):
        moe_gate(torch.zeros(2, 12), top_k=2, n_groups=4, top_groups=2, backend="triton")
    with pytest.raises(ValueError, match="scores='tanh'"):
        moe_gate(torch.zeros(2, 8), top_k=2, scores="tanh")
