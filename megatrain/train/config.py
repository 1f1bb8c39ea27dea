"""Root config: everything that defines a run, and the rules that span several parts of it."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.config.load import rule_problems
from megatrain.config.paths import PathText
from megatrain.config.ranges import Count, DecayRate, NonNegative, Positive, PositiveCount, Size
from megatrain.config.schema import Problem, config, nearest_divisors
from megatrain.data.config import LABELLED, DataConfig
from megatrain.engines.config import DeepSpeedConfig, EngineName, engine_problems
from megatrain.models.config import ModelConfig
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import MoEBackendConfig
from megatrain.nn.plan import decoder_plan
from megatrain.observe.config import LogConfig
from megatrain.optim.config import AdamWConfig, OptimConfig, state_problems
from megatrain.optim.privacy_config import PrivacyConfig, privacy_problems
from megatrain.optim.schedule import CosineConfig, ScheduleConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import data_ranks, float8_problems, group_problems
from megatrain.parallel.layout import problems as layout_problems
from megatrain.parallel.lora_config import LoRAConfig, lora_problems
from megatrain.resilience.config import ResilienceConfig
from megatrain.train.images import image_problems
from megatrain.train.micro_batch import micro_batch_choices
from megatrain.train.objective_config import GRPOConfig, LikelihoodConfig, ObjectiveConfig
from megatrain.train.tasks_config import TasksConfig

SCHEMA_VERSION = 3
"""2: the keys of `Config.RENAMED` got their present names. 3: so did the values of `Config.CHANGED`."""
LONGEST_NAME = 255
"""Bytes of a file's name, at most: those of the file systems in use."""


@config
class RunConfig:
    name: str = "default"
    """Name of the run; its directory is `dir`/`name`. Starting with the same name resumes the run."""
    dir: PathText = "runs"
    """Parent of the run directories."""
    id: str = ""
    """Identity of the run, which its checkpoints, records and Weights & Biases carry; empty: drawn when it starts, and
    kept when it is resumed."""

    def problems(self) -> Iterator[Problem]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,/-]*", self.name) or ".." in self.name:
            yield Problem(
                "name",
                self.name,
                "must consist of letters, digits and . _ - = , / and start with a letter or digit",
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", self.id):
            yield Problem("id", self.id, "must consist of at most 64 letters, digits, - and _")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", self.dir):
            rule = (
                "must be a directory of this machine: locks, and files that grow line by line, can't be in an object "
                "store. checkpoint.durable=URL copies each checkpoint and the run's records there"
            )
            yield Problem("dir", self.dir, rule)
        for field, path in (("name", self.name), ("dir", self.dir)):
            if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.split("/")):
                yield Problem(field, path, f"must not have a part of more than {LONGEST_NAME} bytes")


@config
class TrainConfig:
    steps: PositiveCount = 1000
    """Number of optimizer steps of the run; the learning-rate schedule ends here."""
    stop_at: PositiveCount | None = None
    """Save and stop after this step without changing the learning-rate schedule; the run can be resumed.
    null: stop at `steps`."""
    time_budget: Positive | None = None
    """Seconds from the start of the command after which training must have stopped and saved, so that a scheduler can
    start it again: it stops (exit code 75) when the next step and a save might end too late. null: no limit."""
    seed: Count = 0
    """Seed of the initial weights and the sample order."""
    resume: Literal["never", "auto", "must"] = "auto"
    """never: start a new run, and fail if the directory has checkpoints; auto: resume from the latest checkpoint if
    there is one; must: resume, and fail if there is no checkpoint."""
    allow_changes: tuple[str, ...] = ()
    """Config keys that may differ on resuming although they change the result of the run; `*`: any."""
    precision: Literal["auto", "fp32", "bf16", "fp8", "fp64"] = "auto"
    """Compute dtype. Under bf16 and fp8, master weights and gradients stay in float32, and the
    optimizer's states unless optim.states says otherwise. fp8: like bf16,
    with the linear layers of the blocks (but not routers and experts) in 8 bits, on GPUs that support it; a CPU
    computes the same numbers, slowly; MFU is relative to the bf16 peak; small models get slower (docs/gpus.md). auto:
    bf16 if a quick benchmark finds it faster on this device, else fp32."""
    fp8_scaling: Literal["tensor", "row", "block"] = "row"
    """Granularity of fp8 scales. tensor: one per operand; results then depend on micro_batch_size, and only pipeline
    parallelism can split a batch. row: one per token or weight row; weight gradients are computed in bf16. block: one
    per 128 elements of a token or channel and per 128 x 128 block of a weight (DeepSeek-V3, arXiv 2412.19437,
    section 3.3)."""
    fp8_gradients: Literal["e5m2", "e4m3"] = "e5m2"
    """Format of gradients in fp8. e5m2: two bits of mantissa, numbers from 2^-16 to 57344. e4m3: three bits, from 2^-9
    to 448, which is enough where few numbers share a scale (as DeepSeek-V3 does, with fp8_scaling=block)."""
    qat: Literal["none", "int8", "int4"] = "none"
    """Quantization-aware training: the linear layers of the blocks multiply with weights rounded to these numbers, and
    learn to bear it; the weights themselves stay exact. `megatrain compress` rounds them for good."""
    qat_group: Size = 32
    """Inputs of a layer that share a scale, with `qat`: those of `megatrain compress --group`."""
    z_loss: NonNegative = 0.0
    """Coefficient of the z-loss, the squared log-partition of the logits (PaLM, arXiv 2204.02311); 0: none."""
    ema_decay: DecayRate | None = None
    """Decay per step of an exponential moving average (EMA) of the weights, which validation, samples, `generate` and
    `export` then use instead of the weights; null: no average."""
    eval_every: Count = 100
    """Steps between validations, of which the first is before any training; 0: only at the end of the run."""
    eval_tokens: PositiveCount = 65536
    """Number of tokens in each validation; they are the same every time."""
    early_stop_patience: Count = 0
    """Stop after this many consecutive validations without a new best loss; 0: never."""
    sample_tokens: Count = 200
    """Tokens of the text sample generated at the end of the run; those after a validation are of at most 64. A sample
    ends after a minute; 0: no samples."""


@config
class Config:
    """Config of one run. The same config and seed give the same run in every parallel layout."""

    RENAMED: ClassVar[Mapping[str, str | None]] = {
        "parallel.recompute": "parallel.activation_checkpointing",
        "parallel.schedule": "parallel.pp_schedule",
        "parallel.first_layers": "parallel.pp_split",
        "model.window": "model.sliding_window",
        "model.latent": "model.mla",
        "model.moe": "model.experts",
    }
    """Key of an earlier version -> its present name; None: removed."""
    CHANGED: ClassVar[Mapping[str, Mapping[object, object]]] = {"schedule.warmup_steps": {None: "auto"}}
    """Present key -> values of an earlier version -> their present form."""

    schema_version: PositiveCount = SCHEMA_VERSION
    """Version of the config format; older configs are upgraded when they are read."""
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
    lora: LoRAConfig = LoRAConfig()
    objective: ObjectiveConfig = LikelihoodConfig()
    tasks: TasksConfig = TasksConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    engine: EngineName = "native"
    """Library that runs the passes and shards the model. native: PyTorch, in every layout; deepspeed: ZeRO-0 to ZeRO-3
    by DeepSpeed; accelerate: DDP and FSDP2 by Hugging Face Accelerate. The last two run data parallelism only."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    seq_len: Size = 256
    """Length of a training sequence in tokens."""
    global_batch_size: Size = 16
    """Sequences per optimizer step, over all devices."""
    micro_batch_size: Size | Literal["auto"] = "auto"
    """Sequences per forward and backward pass on one device; gradients are accumulated over the global batch. auto: as
    many as are estimated to fit in device memory, with enough micro-batches for a pipeline."""

    @property
    def resolved_micro_batch_size(self) -> int:
        """`micro_batch_size`, once it is resolved."""
        if self.micro_batch_size == "auto":
            raise ValueError("micro_batch_size=auto is not resolved yet (train/auto.py)")
        return self.micro_batch_size

    def problems(self) -> Iterator[Problem]:
        if self.schema_version != SCHEMA_VERSION:
            yield Problem(
                "schema_version",
                self.schema_version,
                "was written by another version of the config format",
                (SCHEMA_VERSION,),
            )
        yield from self._layout_problems()
        yield from engine_problems(
            self.engine,
            self.parallel,
            self.deepspeed,
            precision=self.train.precision,
            optimizer=self.optim.kind,
            ema_decay=self.train.ema_decay,
        )
        yield from self._native_problems()
        yield from self._lora_problems()
        yield from self._rounding_problems()
        yield from image_problems(self.model, self.data, self.parallel, self.seq_len)
        yield from self._objective_problems()
        yield from privacy_problems(
            self.privacy,
            self.parallel,
            engine=self.engine,
            precision=self.train.precision,
            has_experts=getattr(self.model, "experts", None) is not None,
        )
        if self.seq_len > self.model.max_seq_len:
            rule = f"must not exceed model.max_seq_len ({self.model.max_seq_len})"
            yield Problem("seq_len", self.seq_len, rule, (self.model.max_seq_len,))
        if self.schedule.warmup_steps != "auto" and self.schedule.warmup_steps > self.train.steps:
            rule = f"must not exceed train.steps ({self.train.steps})"
            yield Problem("schedule.warmup_steps", self.schedule.warmup_steps, rule, (self.train.steps,))
        if (
            self.data.kind not in ("synthetic", "images")
            and self.data.tokenizer.kind == "bpe"
            and self.model.vocab_size < 257
        ):
            rule = "must be at least 257: a byte-level tokenizer has a token for each byte and one that ends a document"
            yield Problem("model.vocab_size", self.model.vocab_size, rule, (257,))
        elif self._trained_vocab_size() > self.model.vocab_size:
            rule = f"must be at least data.tokenizer.vocab_size ({self._trained_vocab_size()})"
            yield Problem("model.vocab_size", self.model.vocab_size, rule, (self._trained_vocab_size(),))

    def new_run_problems(self) -> Iterator[Problem]:
        """Yield the problems that are checked for new runs only; runs of earlier versions may have them."""
        size = self._trained_vocab_size()
        if 0 < size < self.model.vocab_size:
            rule = (
                f"differs from model.vocab_size ({self.model.vocab_size}), so some embedding rows would never be "
                "trained; set model.vocab_size, which the tokenizer follows (auto)"
            )
            yield Problem("data.tokenizer.vocab_size", size, rule, ("auto",))

    def _trained_vocab_size(self) -> int:
        """Return the vocabulary size of a tokenizer trained on the data; 0 if none is trained or the model decides."""
        size = self.data.tokenizer.vocab_size
        is_trained = self.data.kind not in ("synthetic", "images") and self.data.tokenizer.kind == "bpe"
        return size if is_trained and size != "auto" else 0

    def _native_problems(self) -> Iterator[Problem]:
        """Yield what the native engine alone does, since it reads or changes the engine's own tensors."""
        if self.engine == "native":
            return
        for key, value, off in (
            ("lora.rank", self.lora.rank, 0),
            ("optim.states", self.optim.states, "fp32"),
            ("checkpoint.async_save", self.checkpoint.async_save, False),
            ("log.fingerprints_every", self.log.fingerprints_every, 0),
            ("resilience.spike", self.resilience.spike, "ignore"),
            ("resilience.compare_replicas_every", self.resilience.compare_replicas_every, 0),
        ):
            if value != off:
                yield Problem(key, value, f"is not supported by engine={self.engine}", (off,))

    def _objective_problems(self) -> Iterator[Problem]:
        """Yield what the objective, and labels, need of data, model and engine."""
        kind, data = self.objective.kind, self.data.kind
        is_labelled = self.model.classifier is not None
        if is_labelled != (data in LABELLED):
            rule = "labels need a model with a classifier (data=classify), and a classifier needs labels"
            yield Problem("data.kind", data, rule, ("classify",) if is_labelled else ("chat", "text"))
        if (kind == "dpo") != (data == "preferences"):
            rule = "objective=dpo and pairs of answers (data=preferences) go together"
            yield Problem(
                "objective.kind", kind, rule, ("dpo",) if data == "preferences" else ("likelihood",)
            )
        if isinstance(self.objective, GRPOConfig):
            yield from self._grpo_problems(self.objective)
        if is_labelled and self.tasks.are_any:
            yield Problem(
                "model.classifier", "given", "predicts labels, which no task asks for (tasks)", (None,)
            )
        if self.tasks.are_any and self.train.precision == "fp8":
            yield Problem(
                "train.precision", "fp8", "does not compute tasks while it trains (tasks)", ("bf16",)
            )
        if is_labelled and kind != "likelihood":
            yield Problem("objective.kind", kind, "is not for classifiers", ("likelihood",))
        if kind != "likelihood" and self.privacy.is_on:
            yield Problem(
                "privacy.noise_multiplier", self.privacy.noise_multiplier, f"not with objective={kind}", (0,)
            )
        if kind != "likelihood" and self.engine != "native":
            yield Problem("engine", self.engine, f"does not train with objective={kind}", ("native",))

    def _grpo_problems(self, how: GRPOConfig) -> Iterator[Problem]:
        """Yield what sampled answers need of data, batch and layout."""
        if self.data.kind != "chat":
            yield Problem("objective.kind", "grpo", "needs prompts with reference answers (data=chat)")
        if self.global_batch_size % how.group_size:
            rule = f"must divide global_batch_size ({self.global_batch_size}), which counts answers"
            legal = nearest_divisors(self.global_batch_size, how.group_size)
            yield Problem("objective.group_size", how.group_size, rule, legal)
        if how.answer_tokens >= self.seq_len:
            rule = f"must be below seq_len ({self.seq_len}), which has room for a prompt with its answer"
            yield Problem("objective.answer_tokens", how.answer_tokens, rule, (self.seq_len // 2,))
        if how.kl and self.checkpoint.adopt is None:
            rule = (
                "needs the weights of another run: checkpoint.adopt, which `megatrain finetune SOURCE` gives"
            )
            yield Problem("objective.kl", how.kl, rule, (0,))
        if self.parallel.compile:
            yield Problem("parallel.compile", True, "is not supported with objective=grpo", (False,))
        if self.train.precision == "fp8":
            yield Problem("train.precision", "fp8", "is not supported with objective=grpo", ("bf16",))

    def _lora_problems(self) -> Iterator[Problem]:
        """Yield what adapters need, beside what they need of the model."""
        if not self.lora.rank:
            return
        if self.checkpoint.adopt is None:
            rule = "adapters need the weights of another run: checkpoint.adopt, which `megatrain finetune SOURCE` gives"
            yield Problem("lora.rank", self.lora.rank, rule, (0,))
        if self.lora.base == "int4":
            yield from self._packed_problems()
        if self.lora.dropout and self.parallel.compile:
            yield Problem("parallel.compile", True, "is not supported with lora.dropout", (False,))
        if self.train.precision == "fp8":
            yield Problem("train.precision", "fp8", "does not train adapters (lora.rank)", ("bf16",))

    def _rounding_problems(self) -> Iterator[Problem]:
        """Yield what can't be combined with rounded weights."""
        if self.train.qat == "none":
            return
        for key, value, off, fits in (
            ("train.precision", self.train.precision, "bf16", self.train.precision != "fp8"),
            ("lora.rank", self.lora.rank, 0, not self.lora.rank),
            ("engine", self.engine, "native", self.engine == "native"),
            ("privacy.noise_multiplier", self.privacy.noise_multiplier, 0, not self.privacy.is_on),
        ):
            if not fits:
                yield Problem(key, value, f"is not supported with train.qat={self.train.qat}", (off,))

    def _packed_problems(self) -> Iterator[Problem]:
        """Yield what a base of four bits does not support: it is whole on each rank."""
        for axis in ("pp", "tp", "cp", "ep"):
            if getattr(self.parallel, axis) > 1:
                rule = "must be 1 with lora.base=int4, which data parallelism alone supports"
                yield Problem(f"parallel.{axis}", getattr(self.parallel, axis), rule, (1,))
        if self.parallel.dp_shard != 1 and self.parallel.zero_stage:
            rule = "must be 0 with lora.base=int4: each rank holds the whole base"
            yield Problem("parallel.zero_stage", self.parallel.zero_stage, rule, (0,))
        if self.parallel.compile or self.privacy.is_on or self.train.qat != "none":
            yield Problem("lora.base", "int4", "is not supported with compile, privacy or qat", ("full",))

    def _layout_problems(self) -> Iterator[Problem]:
        parallel = self.parallel
        if any(True for _ in rule_problems(parallel)):
            parallel = ParallelConfig()
        if parallel.dp_shard == -1:  # unknown until the processes are, but at least what ep needs
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
                "global_batch_size"
                if readers == 1
                else f"a rank's share of the batch, global_batch_size / {readers}"
            )
            legal = nearest_divisors(rows, micro_batch)
            yield Problem("micro_batch_size", micro_batch, f"must divide {share} ({rows})", legal)
            return
        if any(True for _ in rule_problems(self.model)):
            return
        plan = decoder_plan(self.model)
        yield from lora_problems(self.lora, plan)
        yield from layout_problems(
            parallel, plan, self.model.positions_of(self.seq_len), self.global_batch_size, micro_batch
        )
        if self.train.precision == "fp8":
            yield from float8_problems(parallel, plan, self.seq_len, self.train.fp8_scaling)
        if self.train.qat != "none":
            yield from group_problems(parallel, plan, self.train.qat_group)
        yield from state_problems(self.optim, parallel, plan)
