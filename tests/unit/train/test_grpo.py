"""Group-relative policy optimization against its formula, differentiated by torch, in float64; and rewards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import CFG as PLAIN
from layouts import examples_store
from planted_reward import even_tokens
from torch import Tensor

from megatrain.config.errors import UserError
from megatrain.data.config import TokenizerConfig
from megatrain.data.loader import Batch
from megatrain.data.tokenizer import ByteTokenizer
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.grpo import GRPO
from megatrain.train.objective_config import GRPOConfig
from megatrain.train.rewards import number, reward_named
from megatrain.train.rollouts import advantages, questions_of
from megatrain.train.state import TrainState
from megatrain.train.step import accumulate_gradients, train_step

HOW = GRPOConfig(reward="exact", group_size=4, answer_tokens=6, clip=0.1, updates=2)
CFG = replace(
    PLAIN,
    data=replace(PLAIN.data, kind="chat", path="rows", tokenizer=TokenizerConfig(kind="bytes")),
    objective=HOW,
    train=replace(PLAIN.train, z_loss=0.0),
    micro_batch_size=4,
)
STORE = examples_store([n % 9 + 3 for n in range(60)])


def of_run(cfg: Config, reward: object) -> tuple[TrainState, GRPO]:
    state = build_state(cfg, torch.device("cpu"))
    found = GRPO(cfg, state.parallel, ByteTokenizer())
    found._answerer.reward = reward  # type: ignore[assignment]
    state.objective = found
    return state, found


def log_probabilities(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids)
    return logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_metrics_and_gradients(kl: float) -> None:
    state, objective = of_run(replace(CFG, objective=replace(HOW, kl=kl)), even_tokens)
    if kl:
        objective.reference = build_state(
            replace(CFG, train=replace(CFG.train, seed=9)), torch.device("cpu")
        ).parallel
    batch = build_loader(CFG, STORE, None).step_batch(0)
    assert sum(map(len, [part.tokens for part in batch.micro_batches])) == 2  # prompts for 8 answers
    accumulate_gradients(state, batch, CFG, round_=0)
    before = [log_probabilities(state.model, part).detach() for part in objective._parts]
    state.weights.zero_gradients()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rewards = torch.tensor([each.reward for each in objective._rollouts], dtype=torch.float64)
    gains = advantages(rewards, 4).split(4)
    assert rewards.unique().numel() > 2
    loss, clipped, divergences = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for part, old, gain in zip(objective._parts, before, gains, strict=True):
        now, is_answer = log_probabilities(state.model, part), part.targets >= 0
        ratio, a = (now - old).exp(), gain[:, None]
        each = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
        is_cut = ((ratio.clamp(0.9, 1.1) * a < ratio * a) & is_answer).double()
        clipped += float((is_cut.sum(1) / is_answer.sum(1)).sum())
        if kl:
            assert objective.reference is not None
            known = log_probabilities(objective.reference.models[0], part).detach()
            d = (known - now).exp() - (known - now) - 1
            each = each + kl * d
            divergences += float(((d.detach() * is_answer).sum(1) / is_answer.sum(1)).sum())
        loss = loss + ((each * is_answer).sum(1) / is_answer.sum(1)).sum() / 8
    true = torch.autograd.grad(loss, list(state.model.parameters()))
    sums = accumulate_gradients(state, batch, CFG, round_=1)
    lengths = [len(each.answer) for each in objective._rollouts]
    expected = [loss.item(), rewards.mean().item(), np.mean(lengths), divergences / 8, clipped / 8]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-10, atol=1e-11)
    assert clipped > 0
    for parameter, gradient in zip(state.model.parameters(), true, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11)


def test_training_raises_the_reward() -> None:
    state, _ = of_run(replace(CFG, objective=replace(HOW, updates=1)), even_tokens)
    loader = build_loader(CFG, STORE, None)
    rewards = []
    for step in range(30):
        stats = train_step(state, loader.step_batch(step), CFG, lr=1e-2)
        rewards.append(stats.more()["reward"])
    assert np.mean(rewards[:5]) < 0.7
    assert np.mean(rewards[-5:]) > 0.9
    assert state.tokens == 30 * 8 * 6


def test_questions_are_prompts_up_to_the_first_answer() -> None:
    batch = build_loader(CFG, STORE, None).step_batch(0).micro_batches[0]
    for question, row, numbers in zip(
        questions_of(batch, 999), batch.tokens, batch.examples or (), strict=True
    ):
        begin = int(STORE.document_starts[numbers[0]])
        assert STORE.answers is not None
        first = begin + int(STORE.answers[begin:].argmax())
        assert (
            question.prompt
            == tuple(STORE.tokens[begin:first].tolist())
            == tuple(row[: first - begin].tolist())
        )
        assert question.reference[0] == STORE.tokens[first]


def test_rewards(tmp_path: Path) -> None:
    assert number("1 + 1?", "It is 2.", "2") == 1
    assert number("", "1,000", "so: 1000") == 1
    assert number("", "none", "2") == 0
    assert reward_named("exact")("", " a", "a ") == 1
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(prompt, answer, reference):\n    return -len(answer)\n\ndef bad(*a):\n    return 'x'\n"
    )
    assert reward_named(f"{file}:short")("", "abc", "") == -3
    with pytest.raises(UserError, match="must return a number"):
        reward_named(f"{file}:bad")("", "a", "")
    for name, said in (
        ("nothing", r"or FILE.py:FUNCTION"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        (f"{file}:no", "has no function no"),
    ):
        with pytest.raises(UserError, match=said):
            reward_named(name)
