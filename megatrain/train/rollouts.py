"""Answers that a model gives while it is trained, and what they earn."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from megatrain.data.loader import IGNORED, Batch
from megatrain.data.tokenizer import Tokenizer
from megatrain.models.generate import Generation, Request, blocks_needed
from megatrain.models.sampling import Sampling
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.packed_logits import PackedLogits
from megatrain.train.rewards import Reward

MAX_TEXTS = 64
"""Answers that are generated together."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of the data with its reference answer, both in tokens; the answer without what ends it."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """An answer in tokens, with the one that ends it if it came to that, and what it earned."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    reward: float


def questions_of(batch: Batch, eos_id: int) -> Iterator[Question]:
    """Yield what the examples of `batch` ask, each up to its first answer."""
    assert batch.doc_ids is not None
    assert batch.examples is not None
    for tokens, targets, ids, numbers in zip(
        batch.tokens, batch.targets, batch.doc_ids, batch.examples, strict=True
    ):
        for n in range(len(numbers)):
            own, wanted = tokens[ids == n].tolist(), targets[ids == n].tolist()
            first = next((place for place, each in enumerate(wanted) if each != IGNORED), None)
            if first is None:
                continue
            last = next((p for p in range(first, len(wanted)) if wanted[p] in (IGNORED, eos_id)), len(wanted))
            yield Question(tuple(own[: first + 1]), tuple(wanted[first:last]))


class Answerer:
    """Lets a model answer; all ranks call it together, and get the same answers."""

    def __init__(
        self, parallel: ParallelModel, tokenizer: Tokenizer, reward: Reward, *, context: int, most: int
    ) -> None:
        """Take the model and what its answers earn.

        Args:
            context: most tokens of a prompt with its answer. most: most tokens of an answer.
        """
        self.parallel, self.tokenizer, self.reward = parallel, tokenizer, reward
        self.context, self.most = context, most

    def answers(
        self, questions: Sequence[Question], *, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Return an answer to each question; temperature 0 is greedy."""
        eos = self.tokenizer.eos_id
        requests = [
            Request(
                prompt=list(question.prompt[-(self.context - 1) :]),
                max_new_tokens=min(self.most, self.context - min(len(question.prompt), self.context - 1)),
                sampling=Sampling(temperature=temperature, seed=seed),
                stop=frozenset({eos}),
            )
            for question, seed in zip(questions, seeds, strict=True)
        ]
        n_blocks = blocks_needed(requests, context=self.context, max_batch=MAX_TEXTS)
        generation = Generation(
            PackedLogits(self.parallel), context=self.context, n_blocks=n_blocks, max_batch=MAX_TEXTS
        )
        numbers = {generation.add(request): n for n, request in enumerate(requests)}
        found: list[list[int]] = [[] for _ in requests]
        while generation.is_busy:
            for produced in generation.step():
                token = eos if produced.finish == "stop" and produced.token is None else produced.token
                if token is not None:
                    found[numbers[produced.request]].append(token)
        rewards = self._rewards(questions, found)
        return [
            Rollout(tuple(request.prompt), tuple(answer), earned)
            for request, answer, earned in zip(requests, found, rewards, strict=True)
        ]

    def _rewards(self, questions: Sequence[Question], answers: list[list[int]]) -> list[float]:
        """Return what the answers earn, as the first rank finds it: a user's function may not be the same twice."""
        decode, eos = self.tokenizer.decode, self.tokenizer.eos_id
        earned = torch.zeros(len(answers), dtype=torch.float64, device=self.parallel.device)
        if self.parallel.mesh is None or dist.get_rank() == 0:
            for n, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                text = decode([token for token in answer if token != eos])
                earned[n] = self.reward(decode(list(question.prompt)), text, decode(list(question.reference)))
        rewards: list[float] = self.parallel.total(earned).tolist()
        return rewards


def as_rows(rollouts: Sequence[Rollout], seq_len: int) -> Batch:
    """Return a batch with a row for each answer, of which the answer alone has a loss; the rest is padding."""
    rows = len(rollouts)
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
    targets = torch.full((rows, seq_len), IGNORED)
    doc_ids = torch.ones(rows, seq_len, dtype=torch.int64)
    positions = torch.zeros(rows, seq_len, dtype=torch.int64)
    for row, each in enumerate(rollouts):
        text = torch.tensor([*each.prompt, *each.answer])
        size, asked = len(text) - 1, len(each.prompt) - 1
        tokens[row, :size] = text[:-1]
        targets[row, asked:size] = text[asked + 1 :]
        doc_ids[row, :size] = 0
        positions[row, :size] = torch.arange(size)
        positions[row, size:] = torch.arange(seq_len - size)
    return Batch(tokens, targets, positions, doc_ids)


def seed_of(*parts: object) -> int:
    """Return a seed that is a function of `parts` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def advantages(rewards: Tensor, group: int) -> Tensor:
    """Return how much better each answer is than its group's mean, in the group's standard deviations, `(answers,)`.

    A group whose answers all earn the same gives nothing to learn.
    """
    groups = rewards.view(-1, group)
    spread = groups.std(1, correction=0, keepdim=True)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()
