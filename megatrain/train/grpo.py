"""Group-relative policy optimization (Shao et al., arXiv 2402.03300, section 4.1).

A step samples a group of answers to each of its prompts. An answer's advantage A is its reward relative to the group's.
The loss is the mean over answers, and over the tokens of each, of

    -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) + β (e^d - d - 1),

where ρ is a token's probability relative to that at which it was sampled, and d the logarithm of its probability under
the source relative to the present one. The gradient is that of the tokens' cross entropies times ρ A where ρ is not
clipped, less β (1 - e^d).
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatrain.data.loader import Batch, StepBatch
from megatrain.data.tokenizer import Tokenizer
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.layout import data_ranks
from megatrain.train.config import Config
from megatrain.train.objective import Weighed, document_sums, token_losses
from megatrain.train.objective_config import GRPOConfig
from megatrain.train.placing import on_device
from megatrain.train.rewards import reward_named
from megatrain.train.rollouts import Answerer, Rollout, advantages, as_rows, questions_of, seed_of


class GRPO:
    """The objective, with the answers of the present step."""

    names: tuple[str, ...] = ("reward", "answer_tokens", "kl", "clipped")
    eval_names: tuple[str, ...] = ("reward",)
    is_shared = True

    def __init__(self, cfg: Config, parallel: ParallelModel, tokenizer: Tokenizer) -> None:
        """Take the model that answers.

        Raises:
            UserError: there is no such reward.
        """
        assert isinstance(cfg.objective, GRPOConfig)
        self.cfg, self.how, self.tokenizer = cfg, cfg.objective, tokenizer
        self.rounds = cfg.objective.updates
        self.reference: ParallelModel | None = None
        """The source, where the divergence from it has a cost."""
        self._answerer = Answerer(
            parallel,
            tokenizer,
            reward_named(cfg.objective.reward),
            context=cfg.seq_len,
            most=cfg.objective.answer_tokens,
        )
        self._parts: list[Batch] = []
        self._before: list[Tensor] = []
        self._advantages: list[Tensor] = []
        self._rollouts: list[Rollout] = []

    def tensors(self) -> dict[str, Tensor]:
        """Do as `Objective.tensors`: nothing."""
        return {}

    def trained_tokens(self, batch: StepBatch) -> int:
        """Do as `Objective.trained_tokens`: those of the answers, for each update."""
        return self.rounds * sum(len(each.answer) for each in self._rollouts)

    def weigh(self, parallel: ParallelModel, batch: StepBatch, round_: int) -> Weighed:
        """Do as `Objective.weigh`. The metrics are the mean reward and length of answers, and over the tokens the
        divergence from the source, and the share that is clipped."""
        if round_ == 0:
            self._sample(parallel, batch)
        answers = self.cfg.global_batch_size
        parts, sums = [], torch.zeros(5, dtype=torch.float64, device=parallel.device)
        for n, (part, earned) in enumerate(zip(self._parts, self._advantages, strict=True)):
            now = -token_losses(parallel, on_device(parallel, part))
            if round_ == 0:
                self._before.append(now)
            known = None
            if self.reference is not None:
                known = -token_losses(self.reference, on_device(self.reference, part))
            factors, found = self._factors(parallel, part, (now, self._before[n], known), earned)
            sums += found
            parts.append(replace(part, factors=factors))
        sums /= answers
        if not parallel.owns_rows():
            sums.zero_()
        if parallel.mesh is None or (parallel.owns_rows() and parallel.mesh.data_rank == 0):
            sums[1] += sum(each.reward for each in self._rollouts) / answers
            sums[2] += sum(len(each.answer) for each in self._rollouts) / answers
        return Weighed(replace(batch, micro_batches=parts, valid_tokens=answers), sums)

    def validate(self, parallel: ParallelModel, batch: Batch) -> Tensor:
        """Do as `Objective.validate`: minus the mean reward of greedy answers is the loss."""
        asked = list(questions_of(batch, self.tokenizer.eos_id))
        sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)
        if not asked:
            return sums
        found = self._answerer.answers(asked, temperature=0.0, seeds=[0] * len(asked))
        if parallel.mesh is None or (parallel.owns_rows() and parallel.mesh.data_rank == 0):
            earned = sum(each.reward for each in found)
            sums += torch.tensor([-earned, earned, len(found)], dtype=torch.float64)
        return sums

    def _sample(self, parallel: ParallelModel, batch: StepBatch) -> None:
        """Sample the answers of the step, the same on all ranks, and keep this rank's rows."""
        cfg, group = self.cfg, self.how.group_size
        asked = [q for part in batch.micro_batches for q in questions_of(part, self.tokenizer.eos_id)]
        seeds = [seed_of(cfg.train.seed, batch.step, n) for n in range(len(asked) * group)]
        repeated = [question for question in asked for _ in range(group)]
        self._rollouts = self._answerer.answers(repeated, temperature=self.how.temperature, seeds=seeds)
        rewards = torch.tensor([each.reward for each in self._rollouts], dtype=torch.float64)
        earned = advantages(rewards, group).to(parallel.device)
        readers, reader = 1, 0
        if parallel.mesh is not None:
            reader, readers = parallel.mesh.data_rank, data_ranks(parallel.cfg)
        rows = cfg.global_batch_size // readers
        size = cfg.resolved_micro_batch_size
        cuts = [slice(n, n + size) for n in range(reader * rows, (reader + 1) * rows, size)]
        self._parts = [as_rows(self._rollouts[cut], cfg.seq_len) for cut in cuts]
        self._advantages = [earned[cut] for cut in cuts]
        self._before = []

    def _factors(
        self,
        parallel: ParallelModel,
        part: Batch,
        logs: tuple[Tensor, Tensor, Tensor | None],
        earned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of the tokens `(rows, seq)`, in full, and sums over rows as `weigh` has them.

        Args:
            logs: log-probabilities `(rows, seq / cp)` now, when the answer was sampled, and under the source.
        """
        now, before, known = logs
        own = parallel.shard_batch({"targets": part.targets})["targets"]
        assert own is not None
        is_answer = (own >= 0).to(now.device)
        lengths = (part.targets >= 0).sum(1, keepdim=True).to(now.device)
        ratio = (now - before).exp()
        gain = earned[:, None]
        clipped = ratio.clamp(1 - self.how.clip, 1 + self.how.clip)
        losses = -torch.minimum(ratio * gain, clipped * gain)
        is_clipped = (clipped * gain < ratio * gain) & is_answer
        slopes = ratio * gain * ~is_clipped
        divergence = torch.zeros_like(now)
        if known is not None:
            d = known - now
            divergence = d.exp() - d - 1
            losses = losses + self.how.kl * divergence
            slopes = slopes - self.how.kl * (1 - d.exp())
        columns = [each.to(torch.float64) * is_answer / lengths for each in (losses, divergence, is_clipped)]
        assert part.doc_ids is not None
        ids = part.doc_ids.to(now.device)
        loss, kl, cut = (document_sums(parallel, each, ids, 1).sum() for each in columns)
        zero = torch.zeros_like(loss)
        factors = parallel.full_sequence(slopes * is_answer / lengths)
        return factors.cpu(), torch.stack([loss, zero, zero, kl, cut])
