"""The root of a run's config: everything that defines the run, and the rules that join its parts."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.config.schema import Problem, at_least, between, config, nearest_divisors
from megatrain.data.config import DataConfig
from megatrain.models.config import ModelConfig
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import MoEBackendConfig
from megatrain.nn.plan import decoder_plan
from megatrain.observe.config import LogConfig
from megatrain.optim.config import AdamWConfig, OptimConfig
from megatrain.optim.schedule import CosineConfig, ScheduleConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import data_ranks, float8_problems
from megatrain.parallel.layout import problems as layout_problems
from megatrain.train.micro_batch import micro_batch_choices

SCHEMA_VERSION = 3
"""2: the keys of `Config.RENAMED` got their present names. 3: so did the values of `Config.CHANGED`."""


@config
class RunConfig:
    name: str = "default"
    """The run directory is `dir`/`name`; the same name again resumes the run."""
    dir: str = "runs"

    def problems(self) -> Iterator[Problem]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,/-]*", self.name) or ".." in self.name:
            yield Problem(
                "name", self.name, "must be letters, digits and . _ - = , / and start with a letter or digit"
            )


@config
class TrainConfig:
    steps: int = 1000
    """Optimizer steps of the whole run; schedules end here."""
    stop_at: int | None = None
    """Stop (saved, resumable) after this step, without changing the schedule; null: at `steps`."""
    seed: int = 0
    """Seed of initial weights and sample order."""
    resume: Literal["never", "auto", "must"] = "auto"
    """never: start anew, refuse a directory that has checkpoints; auto: go on if there is one; must: refuse to
    start anew."""
    allow_changes: tuple[str, ...] = ()
    """Config keys that may differ from the run's first config although they change the run; `*`: any."""
    precision: Literal["auto", "fp32", "bf16", "fp8", "fp64"] = "auto"
    """Type of the computation. Weights, gradients and optimizer are float32 under bf16 and fp8. fp8: as bf16, with the
    blocks' linear layers (not routers and experts) in 8 bits, on GPUs that have it; a CPU computes the same numbers,
    slowly. MFU is of bf16's peak. auto: bf16 where a quick measurement finds it faster on this device, else fp32."""
    fp8_scaling: Literal["tensor", "row", "block"] = "row"
    """What shares a scale in fp8. tensor: all numbers of an operand; the run then depends on micro_batch_size, and only
    pipelines can cut it. row: a token, or a weight's row; weights' gradients are computed in bf16. block: 128 numbers
    of a token or channel, 128 by 128 of a weight (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""
    z_loss: float = 0.0
    """Factor on the squared log-partition of the logits (PaLM, arXiv 2204.02311)."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay; null: none."""
    eval_every: int = 100
    """Steps between validations; 0: only at the end."""
    eval_tokens: int = 65536
    """Tokens of each validation, always the same ones."""
    early_stop_patience: int = 0
    """Stop after this many validations in a row without a new best; 0: never."""
    sample_tokens: int = 200
    """Tokens of text generated at the end of the run; 0: none."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 1, "steps", "stop_at", "eval_tokens")
        yield from at_least(self, 0, "seed", "z_loss", "eval_every", "early_stop_patience", "sample_tokens")
        yield from between(self, 0, 1, "ema_decay")


@config
class Config:
    """One run. The same config and seed give the same run in every layout."""

    RENAMED: ClassVar[Mapping[str, str | None]] = {
        "parallel.recompute": "parallel.activation_checkpointing",
        "parallel.schedule": "parallel.pp_schedule",
        "parallel.first_layers": "parallel.pp_split",
        "model.window": "model.sliding_window",
        "model.latent": "model.mla",
        "model.moe": "model.experts",
        "engine": None,
    }
    """Key of an earlier version -> its present name; None: removed."""
    CHANGED: ClassVar[Mapping[str, Mapping[object, object]]] = {"schedule.warmup_steps": {None: "auto"}}
    """Present key -> values of an earlier version -> their present form."""

    schema_version: int = SCHEMA_VERSION
    run: RunConfig = RunConfig()
    model: ModelConfig = Qwen3Config(vocab_size=4096)
    data: DataConfig = DataConfig()
    optim: OptimConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    moe: MoEBackendConfig = MoEBackendConfig()
    seq_len: int = 256
    """Tokens of a training sequence."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all devices."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences computed at once on one device; the rest of the global batch is accumulated. auto: as many as fit in
    the device's memory by an estimate, with enough micro-batches for a pipeline."""

    @property
    def resolved_micro_batch_size(self) -> int:
        """`micro_batch_size`, once it is resolved."""
        if self.micro_batch_size == "auto":
            raise ValueError("micro_batch_size=auto is not resolved yet (train/auto.py)")
        return self.micro_batch_size

    def problems(self) -> Iterator[Problem]:
        broken = [*at_least(self, 1, "seq_len", "global_batch_size", "micro_batch_size")]
        yield from broken
        if self.schema_version != SCHEMA_VERSION:
            yield Problem(
                "schema_version", self.schema_version, "written by another version", (SCHEMA_VERSION,)
            )
        if not broken:
            yield from self._layout_problems()
        if self.seq_len > self.model.max_seq_len:
            rule = f"must not exceed model.max_seq_len ({self.model.max_seq_len})"
            yield Problem("seq_len", self.seq_len, rule, (self.model.max_seq_len,))
        if self.schedule.warmup_steps != "auto" and self.schedule.warmup_steps > self.train.steps:
            rule = f"must not exceed train.steps ({self.train.steps})"
            yield Problem("schedule.warmup_steps", self.schedule.warmup_steps, rule, (self.train.steps,))
        if self._trained_vocab_size() > self.model.vocab_size:
            rule = f"must be at least data.tokenizer.vocab_size ({self._trained_vocab_size()})"
            yield Problem("model.vocab_size", self.model.vocab_size, rule, (self._trained_vocab_size(),))

    def new_run_problems(self) -> Iterator[Problem]:
        """Yield the rules that hold for new runs only; earlier versions have started others."""
        size = self._trained_vocab_size()
        if 0 < size < self.model.vocab_size:
            rule = (
                f"differs from model.vocab_size ({self.model.vocab_size}), so rows of the embedding would never be "
                "trained; set model.vocab_size, which the tokenizer follows (auto)"
            )
            yield Problem("data.tokenizer.vocab_size", size, rule, ("auto",))

    def _trained_vocab_size(self) -> int:
        """Return the size asked of a tokenizer that is trained on the data; 0: none is, or as the model's."""
        size = self.data.tokenizer.vocab_size
        is_trained = self.data.kind == "text" and self.data.tokenizer.kind == "bpe"
        return size if is_trained and size != "auto" else 0

    def _layout_problems(self) -> Iterator[Problem]:
        parallel = self.parallel
        if any(True for _ in parallel.problems()):
            parallel = ParallelConfig()
        if parallel.dp_shard == -1:  # not known before the processes are, but a multiple of what ep needs
            least = parallel.ep // math.gcd(parallel.ep, parallel.cp * parallel.tp)
            parallel = dataclasses.replace(parallel, dp_shard=least)
        readers = data_ranks(parallel)
        if self.global_batch_size % readers:
            rule = f"must be a multiple of the {readers} ranks that read different data (dp_replicate x dp_shard)"
            below = self.global_batch_size // readers * readers
            yield Problem(
                "global_batch_size", self.global_batch_size, rule, (below, below + readers)[below == 0 :]
            )
            return
        rows = self.global_batch_size // readers
        micro_batch = self.micro_batch_size
        if micro_batch == "auto":
            micro_batch = micro_batch_choices(parallel, rows)[0]
        if rows % micro_batch:
            share = (
                "global_batch_size" if readers == 1 else f"a rank's share of global_batch_size / {readers}"
            )
            legal = nearest_divisors(rows, micro_batch)
            yield Problem("micro_batch_size", micro_batch, f"must divide {share} ({rows})", legal)
            return
        if any(True for _ in self.model.problems()):
            return
        plan = decoder_plan(self.model)
        yield from layout_problems(parallel, plan, self.seq_len, self.global_batch_size, micro_batch)
        if self.train.precision == "fp8":
            yield from float8_problems(parallel, plan, self.seq_len, self.train.fp8_scaling)
