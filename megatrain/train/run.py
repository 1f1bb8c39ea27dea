"""State of one process of a run while it trains."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.load import digest, dump
from megatrain.data.background import CacheCheck
from megatrain.data.loader import Batch, Loader
from megatrain.data.prepare import Prepared
from megatrain.models.flops import flops_per_token
from megatrain.observe.display import Display
from megatrain.observe.rundir import RunLog
from megatrain.runtime.device import Peak, peak_flops
from megatrain.runtime.processes import Processes
from megatrain.train.build import COMPUTE_DTYPE
from megatrain.train.config import Config
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

    @cached_property
    def flops_full(self) -> float:
        """FLOPs per token, counting every query against every key."""
        return flops_per_token(self.cfg.model, self.cfg.seq_len, causal=False)

    @cached_property
    def flops_causal(self) -> float:
        """FLOPs per token, counting the pairs that the causal mask leaves."""
        return flops_per_token(self.cfg.model, self.cfg.seq_len, causal=True)

    @cached_property
    def peak(self) -> Peak | None:
        """Peak FLOP/s of one process's device; None if it is neither published nor measured."""
        return peak_flops(self.state.parallel.device, COMPUTE_DTYPE[self.cfg.train.precision])

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer beside the checkpoints."""
        return tokenizer_digest(self.directory) if self.processes.is_first else ""

    def save(self, *, waits: bool = True) -> None:
        """Save a checkpoint of the present state; all processes call this together.

        Args:
            waits: whether to wait until the tokens are verified, so that no checkpoint is made of damaged ones.

        Raises:
            DamagedDataError: the tokens are damaged; nothing was saved.
        """
        check, step, report = self.cache_check, self.state.step, self.processes.report
        verified = self.processes.agree(lambda: check.require_whole(step, waits=waits, report=report))
        info = {
            "data_unverified_since": None if all(self.processes.gather(verified)) else check.since,
            "run_id": self.cfg.run.id,
            "data_fingerprint": self.data.fingerprint,
            "config_digest": digest(self.cfg),
            "config": dump(self.cfg),
            "tokenizer_sha256": self.tokenizer_sha256,
            "layout": dump(self.cfg.parallel),
        }
        state = self.state
        path = self.checkpointer.save(state.step, state.tensors(), state.metadata(), info)
        self.log.event("save", step=state.step, path=path.name)
