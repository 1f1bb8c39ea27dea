"""Options of the decoder, its loss against its logits, and generation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megatrain.models.decoder import Decoder
from megatrain.models.generate import generate
from megatrain.nn.config import DecoderConfig
from megatrain.nn.init import init_weights
from megatrain.parallel.recompute import recompute_blocks

BASE = DecoderConfig(
    n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61, init_std=0.3
)
OPTIONS: dict[str, dict[str, object]] = {
    "base": {},
    "qk norm": {"qk_norm": True},
    "untied": {"tie_embeddings": False},
    "layer norm": {"norm": "layer"},
    "gelu": {"activation": "gelu", "mlp_bias": True},
    "relu2": {"activation": "relu2"},
    "learned positions": {"positions": "learned", "max_seq_len": 24},
    "window": {"window": 3},
    "softcap": {"logit_softcap": 2.0},
    "scales": {"residual_scale": 0.5, "embedding_scale": 3.0},
    "biases": {"attention_bias": True, "output_bias": True},
}


def make(**options: object) -> tuple[Decoder, DecoderConfig]:
    cfg = replace(BASE, **options)  # type: ignore[arg-type]
    model = Decoder(cfg).double()
    init_weights(model, cfg, seed=1)
    return model, cfg


def draw_tokens() -> torch.Tensor:
    return torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_is_the_cross_entropy_of_the_logits(name: str) -> None:
    model, _ = make(**OPTIONS[name])
    tokens = draw_tokens()
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100
    logits = model(tokens)
    truth = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets=targets), truth)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("base", "biases")])
def test_every_option_changes_the_result(name: str) -> None:  # biases start at 0
    base, changed = make()[0](draw_tokens()), make(**OPTIONS[name])[0](draw_tokens())
    assert not torch.allclose(base, changed)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_sees_the_future(name: str) -> None:
    model, _ = make(**OPTIONS[name])
    tokens = draw_tokens()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_a_packed_document_equals_the_document_alone() -> None:
    model, _ = make(qk_norm=True)
    tokens = draw_tokens()[:1]
    doc_ids = torch.tensor([[0] * 9 + [1] * 15])
    positions = torch.tensor([[*range(9), *range(15)]])
    packed = model(tokens, positions=positions, doc_ids=doc_ids)
    torch.testing.assert_close(packed[:, :9], model(tokens[:, :9]))
    torch.testing.assert_close(packed[:, 9:], model(tokens[:, 9:]))


def test_a_window_forgets() -> None:
    model, _ = make(window=3, n_layers=1)
    tokens = draw_tokens()[:1]
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    torch.testing.assert_close(model(tokens)[:, 3:], model(changed)[:, 3:])


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_changes_no_gradient_and_keeps_less(kind: str) -> None:
    tokens, kept, gradients = draw_tokens(), {}, {}
    for name in ("none", kind):
        model, _ = make()
        recompute_blocks(model, name)  # type: ignore[arg-type]
        kept[name] = 0

        def count(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            kept[name] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens, targets=tokens)
        loss.backward()
        gradients[name] = [p.grad for p in model.parameters()]
    for plain, recomputed in zip(gradients["none"], gradients[kind], strict=True):
        assert torch.equal(plain, recomputed)  # type: ignore[arg-type]
    assert kept[kind] < kept["none"]


def test_greedy_generation_takes_the_likeliest_token() -> None:
    model, _ = make()
    prompt = draw_tokens()[0, :4].tolist()
    produced = list(generate(model, prompt, max_new_tokens=5, context=8, temperature=0))
    for step, token in enumerate(produced):
        seen = (prompt + produced)[: 4 + step][-8:]
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())


def test_generation_repeats_under_a_seed_and_stops() -> None:
    model, _ = make()
    first = list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5))
    assert first == list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5))
    stopped = list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5, stop=first[2]))
    assert stopped == first[: first.index(first[2])]
