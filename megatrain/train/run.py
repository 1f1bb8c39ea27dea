"""State of one process of a run while it trains."""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.retention import EVAL_LOSS
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import Checkpointer
from megatrain.checkpoint.uploads import Uploader
from megatrain.config.load import digest, dump
from megatrain.data.background import CacheCheck
from megatrain.data.loader import Batch, Loader
from megatrain.data.prepare import Prepared
from megatrain.models.flops import flops_per_token
from megatrain.observe.display import Display
from megatrain.observe.rundir import RunLog
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.device import Peak, peak_flops
from megatrain.runtime.processes import Processes
from megatrain.train.build import COMPUTE_DTYPE
from megatrain.train.config import Config
from megatrain.train.durable import Fetched, begin_uploads, finish_uploads
from megatrain.train.files import tokenizer_digest
from megatrain.train.state import TrainState


@dataclass(frozen=True)
class Run:
    """Objects created before the first step. Only `state` changes afterwards."""

    cfg: Config
    directory: Path
    processes: Processes
    data: Prepared
    cache_check: CacheCheck
    state: TrainState
    loader: Loader
    eval_batches: list[Batch]
    checkpointer: Checkpointer
    display: Display
    log: RunLog
    signals: StopSignals
    notices: tuple[str, ...] = ()
    """What the check of the machines has found."""
    tasks: "Callable[[Run], dict[str, Any]] | None" = None
    """Evaluates the model on the config's tasks; None: there are none."""
    fetched: Fetched | None = None
    """What was fetched from the durable tier; None without one."""

    @cached_property
    def flops_full(self) -> float:
        """FLOPs per token, counting every query against every key."""
        frozen = self.cfg.lora.rank > 0
        return flops_per_token(self.cfg.model, self.cfg.seq_len, causal=False, frozen=frozen)

    @cached_property
    def flops_causal(self) -> float:
        """FLOPs per token, counting the pairs that the causal mask leaves."""
        frozen = self.cfg.lora.rank > 0
        return flops_per_token(self.cfg.model, self.cfg.seq_len, causal=True, frozen=frozen)

    @cached_property
    def peak(self) -> Peak | None:
        """Peak FLOP/s of one process's device; None if it is neither published nor measured."""
        return peak_flops(self.state.parallel.device, COMPUTE_DTYPE[self.cfg.train.precision])

    @cached_property
    def host(self) -> str:
        """Name of the machine of this process."""
        return platform.node()

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer beside the checkpoints."""
        return tokenizer_digest(self.directory) if self.processes.is_first else ""

    @cached_property
    def saver(self) -> Saver:
        """Saves of this run. All processes ask for it together the first time, once the run has been resumed."""
        is_async = self.cfg.checkpoint.async_save
        return Saver(self.checkpointer, self.processes.beside("saves") if is_async else self.processes)

    def any_wants(self, wanted: bool) -> bool:
        """Return whether any process says so; all call this together."""
        parallel = self.state.parallel
        if self.processes.size == 1:
            return wanted
        return bool(parallel.total(torch.tensor(float(wanted), device=parallel.device)) > 0)

    @cached_property
    def uploads(self) -> Uploader | None:
        """Uploads to the durable tier, by the first process; the run is resumed and owned when they begin."""
        if not self.processes.is_first:
            return None
        return begin_uploads(self.cfg, self.directory, self.checkpointer.require_owner)

    def begin_uploads(self) -> None:
        """Upload what the durable tier lacks, and from now on each checkpoint that is committed."""
        if self.uploads is not None:
            self.checkpointer.on_commit = self.uploads.submit
            self.checkpointer.in_use = self.uploads.in_use

    def finish_uploads(self) -> None:
        """Wait for the last upload; all processes call this together, at the end.

        Raises:
            UploadError: it failed, and the config does not let a run end without it.
        """
        self.processes.from_first(self._finish_uploads)

    def _finish_uploads(self) -> None:
        if self.uploads is not None:
            finish_uploads(self.uploads, self.cfg, progress=self.display.phase)

    def save(self, *, eval_loss: float | None, is_last: bool, waits: bool = True) -> float:
        """Save a checkpoint of the present state, or begin to; all processes call this together.

        Returns the seconds for which training stood still.

        Args:
            eval_loss: validation loss of this step, if it was validated.
            waits: whether to wait until the tokens are verified, so that no checkpoint is made of damaged ones.

        Raises:
            DamagedDataError: the tokens are damaged; nothing was saved.
        """
        self.processes.doing("saving", self.state.step)
        check, step, report = self.cache_check, self.state.step, self.processes.report
        verified = self.processes.agree(lambda: check.require_whole(step, waits=waits, report=report))
        info: dict[str, Any] = {
            "data_unverified_since": None if all(self.processes.gather(verified)) else check.since,
            "run_id": self.cfg.run.id,
            "data_fingerprint": self.data.fingerprint,
            "config_digest": digest(self.cfg),
            "config": dump(self.cfg),
            "tokenizer_sha256": self.tokenizer_sha256,
            "layout": dump(self.cfg.parallel),
        }
        if self.state.base:
            info["base"] = self.state.base
        if self.state.round:
            info["round"] = self.state.round
        if eval_loss is not None and math.isfinite(eval_loss):
            info[EVAL_LOSS] = eval_loss
        state = self.state
        return self.saver.save(state.step, state.tensors, state.metadata(), info, is_last=is_last)
