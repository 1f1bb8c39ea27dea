"""Mixture of experts: gradients, the seam, and equal load."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.config.schema import ConfigError
from megatrain.nn.balance import (
    balance_experts,
    begin_balance,
    take_expert_counts,
    update_expert_bias,
)
from megatrain.nn.config import DecoderConfig, ExpertsConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.moe import Experts, MoE, use_experts_backend
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.activation_checkpointing import checkpoint_activations
from megatrain.parallel.config import ParallelConfig
from megatrain_kernels import permute, unpermute

MOE = ExpertsConfig(
    n_experts=6, top_k=2, ffn_size=10, n_shared_experts=1, aux_loss=0.3, bias_rate=0.01, first_k_dense=1
)
CFG = DecoderConfig(
    n_layers=3, hidden_size=16, n_heads=2, ffn_size=24, vocab_size=31, init_std=0.4, experts=MOE
)


def make(cfg: DecoderConfig = CFG) -> Decoder:
    model = Decoder(cfg).double()
    init_weights(model, decoder_plan(cfg), seed=4)
    return model


def make_block(moe: ExpertsConfig) -> MoE:
    generator = torch.Generator().manual_seed(1)
    block = MoE(replace(CFG, experts=moe)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return block


def draw_tokens() -> Tensor:
    return torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_balance_loss_by_counting(routing: str) -> None:
    """The gradient with it, less that without it, is that of the papers' formula summed over sequences and tokens."""
    moe = replace(MOE, routing=routing)  # type: ignore[type-var]
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for aux_loss in (0.3, 0.0):
        block = make_block(replace(moe, aux_loss=aux_loss))
        block.balance.scale = 0.25
        inputs = x.clone().requires_grad_()
        block(inputs).square().sum().backward()
        results.append(gradients(block) | {"x": inputs.grad})
    block = make_block(moe)
    inputs = x.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in inputs:
        logits = row @ block.router.weight.T
        scores = torch.sigmoid(logits) if routing == "sigmoid" else torch.softmax(logits, -1)
        shares = scores / scores.sum(-1, keepdim=True)
        for expert in range(6):
            load = sum(expert in token.argsort(descending=True)[:2].tolist() for token in scores)
            total = total + 7 * (6 / (2 * 7) * load) * shares[:, expert].mean()
    truth = torch.autograd.grad(0.25 * 0.3 * total, [block.router.weight, inputs])
    for name, expected in zip(("router.weight", "x"), truth, strict=True):
        torch.testing.assert_close(results[0][name] - results[1][name], expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(results[0]["experts.down"], results[1]["experts.down"])


def test_a_cut_sequence_has_the_balance_loss_of_the_whole() -> None:
    """Halves that sum their statistics through the seam get the gradients that the whole sequence gets."""
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = make_block(MOE)
    whole(x).square().sum().backward()
    parts = []
    for half in (0, 1):
        own, other = x.chunk(2, 1)[half], x.chunk(2, 1)[1 - half]
        block = make_block(MOE)
        routing = block.router(other.flatten(0, 1), block.expert_bias)
        chosen = torch.zeros_like(routing.scores).scatter_(1, routing.indices, 1.0)
        shares = routing.scores / routing.scores.sum(-1, keepdim=True)
        away = [t.view(2, 4, 6).sum(1).detach() for t in (chosen, shares)]
        block.balance.sequence_sum = lambda local, away=away: local + away.pop(0)
        block(own).square().sum().backward()
        parts.append(gradients(block))
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected, rtol=1e-12, atol=1e-12)


def counts_by_hand(model: Decoder, tokens: Tensor) -> Tensor:
    counts = torch.zeros(3, 6, dtype=torch.int64)

    def count(layer: int, indices: Tensor) -> None:
        for expert in indices.flatten().tolist():
            counts[layer, expert] += 1

    hooks = []
    for layer in (1, 2):
        router = model.layers[str(layer)].moe.router  # type: ignore[union-attr]
        hooks.append(router.register_forward_hook(lambda _m, _i, out, layer=layer: count(layer, out.indices)))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_training_tokens_are_counted_once(recompute: str) -> None:
    model = make()
    tokens = draw_tokens()
    expected = counts_by_hand(model, tokens)  # itself not counted: nothing is trained there
    assert expected.sum(1).tolist() == [0, 72, 72]
    checkpoint_activations(model, decoder_plan(CFG), None, ParallelConfig(activation_checkpointing=recompute))  # type: ignore[arg-type]
    for micro_batch in tokens.split(1):
        model(micro_batch, targets=micro_batch).backward()
    with torch.no_grad():
        model(tokens, targets=tokens)
    cpu = torch.device("cpu")
    assert torch.equal(take_expert_counts([model], CFG, cpu), expected)
    assert not take_expert_counts([model], CFG, cpu).any()


@pytest.mark.parametrize("how", ["full", "selective", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the tracer, about its own internals
def test_wrapped_blocks_have_the_same_gradients(how: str) -> None:
    tokens, models = draw_tokens(), (make(), make())
    if how == "compiled":
        for _, block in models[1].blocks():
            block.compile(backend="aot_eager")  # traced as ever, without the time to make code
    else:
        checkpoint_activations(
            models[1], decoder_plan(CFG), None, ParallelConfig(activation_checkpointing=how)
        )  # type: ignore[arg-type]
    for model in models:
        begin_balance([model], 0.1)
        (0.1 * model(tokens, targets=tokens)).backward()
    counts = [take_expert_counts([model], CFG, torch.device("cpu")) for model in models]
    assert torch.equal(*counts)
    for name, expected in gradients(models[0]).items():
        torch.testing.assert_close(gradients(models[1])[name], expected, rtol=1e-9, atol=1e-12)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    block = make_block(replace(MOE, aux_loss=0.0))
    assert block.expert_bias is not None
    block.expert_bias[3] = -torch.inf
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    block(x).sum().backward()
    for matrix in (block.experts.gate, block.experts.up, block.experts.down):
        assert matrix.grad is not None
        assert not matrix.grad[3].any()
        assert matrix.grad.any(-1).any(-1).sum() == 5


def test_bias_moves_towards_equal_load_at_the_rate() -> None:
    model = make()
    counts = torch.tensor([[0] * 6, [12, 12, 12, 12, 12, 12], [0, 30, 13, 11, 10, 8]])
    update_expert_bias([model], counts, 0.5)
    update_expert_bias([model], counts * 3, 0.5)  # counted on three ranks each
    biases = [model.layers[str(layer)].moe.expert_bias.tolist() for layer in (1, 2)]  # type: ignore[union-attr]
    assert biases == [[0.0] * 6, [1.0, -1.0, -1.0, 1.0, 1.0, 1.0]]


def test_balancing_evens_the_load() -> None:
    model, tokens = make(), draw_tokens()
    spread = []
    for _ in range(60):
        model(tokens, targets=tokens).backward()
        seen: list[Tensor] = []
        balance_experts([model], CFG, lambda counts, seen=seen: seen.append(counts) or counts)  # type: ignore[func-returns-value]
        spread.append(seen[0][1:].double().std().item())
    assert spread[-1] < 0.4 * spread[0]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    block = make_block(replace(MOE, top_k=6, aux_loss=0.0))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = block(x)
    assert block.expert_bias is not None
    block.expert_bias += torch.arange(6)  # all are chosen whatever the bias
    torch.testing.assert_close(block(x), before, rtol=1e-12, atol=1e-12)


def test_dispatch_can_be_replaced() -> None:
    """As expert parallelism would: here the experts' halves work one after the other."""
    block = make_block(MOE)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = block(x)

    def in_halves(tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        rows, permutation = permute(tokens, indices, 6)
        sizes = permutation.group_sizes
        cut = int(sizes[:3].sum())
        lower, upper = sizes.clone(), sizes.clone()
        lower[3:], upper[:3] = 0, 0
        done = torch.cat([experts(rows[:cut], lower), experts(rows[cut:], upper)])
        return unpermute(done, permutation, weights)

    block.dispatch = in_halves
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_backends_agree(backend: str) -> None:
    tokens, models = draw_tokens(), (make(), make())
    use_experts_backend(models[1], backend, torch.float64)
    for model in models:
        model(tokens, targets=tokens).backward()
    for name, expected in gradients(models[0]).items():
        torch.testing.assert_close(gradients(models[1])[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they may run")
@pytest.mark.parametrize(
    ("backend", "need"), [("triton", "a GPU"), ("megablocks", "a GPU .* the packages megablocks")]
)
def test_a_backend_that_cannot_run_here_is_refused(backend: str, need: str) -> None:
    with pytest.raises(UserError, match=f"moe.backend={backend} needs {need}"):
        use_experts_backend(make(), backend, torch.bfloat16)


def test_bf16_keeps_the_choice_in_float32() -> None:
    block = make_block(MOE).bfloat16()
    routing = block.router(torch.ones(3, 16, dtype=torch.bfloat16), block.expert_bias)
    assert (routing.scores.dtype, routing.weights.dtype) == (torch.float32, torch.float32)
    assert block(torch.ones(1, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


WRONG = {
    "experts.n_groups": {"n_experts": 8, "n_groups": 3},
    "experts.top_groups": {"n_experts": 8, "n_groups": 2, "top_groups": 3},
    "experts.top_k": {"n_experts": 8, "n_groups": 4, "top_groups": 1, "top_k": 3},
}


@pytest.mark.parametrize("field", WRONG)
def test_impossible_routing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}="):
        load(DecoderConfig, {"experts": WRONG[field]})


def test_experts_need_their_activation() -> None:
    with pytest.raises(ConfigError, match="activation=gelu: is not supported with experts"):
        load(DecoderConfig, {"experts": {}, "activation": "gelu"})
