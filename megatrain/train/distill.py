"""Distillation (Hinton et al., arXiv 1503.02531): the teacher computes each batch beside the model, in its layout."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.config.load import rule_problems
from megatrain.config.schema import ConfigError
from megatrain.data.loader import Batch, StepBatch
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_files import load_tokenizer
from megatrain.nn.init import init_weights
from megatrain.nn.layer import replace_seam
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.distill import DistillHead, TeacherHead
from megatrain.parallel.lora_config import LoRAConfig
from megatrain.parallel.shards import shard_of
from megatrain.train.adopt import WEIGHTS, tensors_of
from megatrain.train.build import build_model
from megatrain.train.config import Config
from megatrain.train.files import read_config
from megatrain.train.objective import Weighed
from megatrain.train.objective_config import DistillConfig, LikelihoodConfig
from megatrain.train.placing import on_device


class Distill:
    """The objective: the teacher's hidden states go with each micro-batch to the loss head."""

    names: tuple[str, ...] = ()
    eval_names: tuple[str, ...] = ()
    rounds = 1
    is_shared = False

    def __init__(self, teacher: ParallelModel, checkpoint: VerifiedCheckpoint | None) -> None:
        self.teacher, self.checkpoint = teacher, checkpoint

    def tensors(self) -> dict[str, Tensor]:
        """Do as `Objective.tensors`: nothing."""
        return {}

    def trained_tokens(self, batch: StepBatch) -> int:
        """Do as `Objective.trained_tokens`."""
        return batch.valid_tokens

    def weigh(self, parallel: ParallelModel, batch: StepBatch, round_: int) -> Weighed:
        """Return the batch with the teacher's hidden states; the loss is that of the pass itself."""
        parts = [replace(part, teacher=self._states(part)) for part in batch.micro_batches]
        return Weighed(replace(batch, micro_batches=parts), None)

    def validate(self, parallel: ParallelModel, batch: Batch) -> Tensor:
        """Refuse: a validation is that of likelihood."""
        raise NotImplementedError("a validation is that of likelihood")

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor | None:
        """Return the teacher's hidden states, `(rows, seq, hidden)` as this rank has them, where its last stage is."""
        tensors = on_device(self.teacher, batch)
        tensors |= {"targets": None, "token_numbers": None}
        if self.teacher.pipeline is not None:
            return self.teacher.pipeline.forward(tensors)
        states: Tensor = self.teacher.models[0](tensors.pop("tokens"), **tensors)
        return states


def teacher_config(cfg: Config, tokenizer: Tokenizer) -> Config:
    """Return the config of the teacher's model in the layout and precision of `cfg`.

    Raises:
        UserError: there is no such run, it does not fit the layout, or has another tokenizer or vocabulary.
    """
    assert isinstance(cfg.objective, DistillConfig)
    directory = Path(str(cfg.objective.teacher))
    theirs = read_config(directory)
    where = f"objective.teacher={directory}"
    if theirs.model.classifier is not None or theirs.lora.rank:
        raise UserError(
            f"{where}: must be a language model without adapters (megatrain export --merge adds them)"
        )
    if load_tokenizer(directory / "tokenizer").digest() != tokenizer.digest():
        raise UserError(f"{where}: has another tokenizer; give the model the teacher's (data.tokenizer)")
    if theirs.model.vocab_size != cfg.model.vocab_size:
        raise UserError(
            f"{where}: its model.vocab_size is {theirs.model.vocab_size}, and must be {cfg.model.vocab_size}"
        )
    if theirs.model.max_seq_len < cfg.seq_len:
        raise UserError(f"{where}: sees {theirs.model.max_seq_len} tokens, fewer than seq_len={cfg.seq_len}")
    found = replace(cfg, model=theirs.model, lora=LoRAConfig(), objective=LikelihoodConfig())
    if broken := list(rule_problems(found)):
        raise ConfigError([dataclasses.replace(each, rule=f"{each.rule} (the teacher)") for each in broken])
    return found


def load_teacher(
    cfg: Config, parallel: ParallelModel, tokenizer: Tokenizer, checkpointer: Checkpointer | None
) -> Distill:
    """Return the objective with its teacher, which the model's loss head knows from now on; all ranks call this.

    Args:
        checkpointer: of the run; None: the teacher is a model of the same config with other initial weights, as in a
            comparison of layouts.

    Raises:
        UserError: as `teacher_config`; or the teacher has no checkpoint.
        DamagedCheckpointError: it is damaged.
    """
    assert isinstance(cfg.objective, DistillConfig)
    theirs = cfg if checkpointer is None else teacher_config(cfg, tokenizer)
    dtype = torch.float64 if cfg.train.precision == "fp64" else torch.float32
    teacher, found = build_model(theirs, parallel.device, parallel.mesh, master_dtype=dtype), None
    if checkpointer is None:
        for model in teacher.models:
            init_weights(
                model,
                teacher.plan,
                seed=cfg.train.seed + 1,
                shard_of=lambda name, p: shard_of(p, teacher.splits.get(name)),
            )
    else:
        directory = Path(str(cfg.objective.teacher)) / "checkpoints"
        other = Checkpointer(directory, cfg.checkpoint, checkpointer.processes, moves_damaged=False)
        found = other.load(tensors_of(teacher), only=WEIGHTS)
        if found is None:
            raise UserError(f"objective.teacher={cfg.objective.teacher}: has no checkpoint yet")
    if teacher.pipeline is not None:
        teacher.pipeline.sync_tied_embeddings()
    _attach(teacher, parallel, cfg.objective)
    return Distill(teacher, found)


def _attach(teacher: ParallelModel, parallel: ParallelModel, how: DistillConfig) -> None:
    """Let `teacher` return hidden states, and the loss head of `parallel` compare with them."""
    group = parallel.mesh.tp.get_group() if parallel.mesh is not None and parallel.cfg.tp > 1 else None
    own, theirs = parallel.models[-1], teacher.models[-1]
    if own.norm is None:
        return  # the last stage is on another rank
    head = TeacherHead()
    replace_seam(theirs, "loss_head", head)
    mixed = DistillHead(own.loss_head, head, alpha=how.alpha, temperature=how.temperature, group=group)
    replace_seam(own, "loss_head", mixed)
