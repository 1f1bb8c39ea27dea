"""Parallel layout config: the degrees of the mesh axes and the options of each technique."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.ranges import MAX_SIZE, Range, Size
from megatrain.config.schema import Problem, config

PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v"
]
MULTI_STAGE = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Pipeline schedules in which a rank holds several stages."""
V_SHAPED = ("zbv", "dualpipe_v")
"""V-shaped pipeline schedules: the first rank holds both the first and the last stage."""
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Pipeline schedules that compute weight gradients separately from input gradients (arXiv 2401.10241)."""


@config
class ParallelConfig:
    """Parallelism degrees and options; the product of all degrees but `ep` is the number of processes.

    DDP is dp_replicate, FSDP is dp_shard, HSDP is both; ZeRO stages 0 to 3 are zero_stage.
    """

    pp: Size = 1
    """Pipeline-parallel degree: the layers are split into stages over this many ranks."""
    dp_replicate: Size = 1
    """Replicated data-parallel degree (DDP; HSDP with dp_shard > 1): ranks that read different data and hold the same
    state."""
    dp_shard: Annotated[int, Range(at_least=-1, at_most=MAX_SIZE)] = 1
    """Sharded data-parallel degree (FSDP, ZeRO): ranks that read different data and shard parameters, gradients and
    optimizer state according to `zero_stage`; -1: all processes that the other axes leave."""
    cp: Size = 1
    """Context-parallel degree: each sequence is sharded over this many ranks."""
    tp: Size = 1
    """Tensor-parallel degree: weight matrices, and the sequence between them (sequence parallelism), are sharded over
    this many ranks."""
    ep: Size = 1
    """Expert-parallel degree: experts are distributed over this many adjacent ranks of the dp_shard · cp · tp ranks,
    and tokens are sent to them; it adds no processes. 1: every rank has all experts, each sharded by tp."""
    zero_stage: Annotated[int, Range(at_least=0, at_most=3)] = 3
    """ZeRO stage (arXiv 1910.02054), what dp_shard shards. 0: nothing (DDP); 1: optimizer state and master weights;
    2: gradients too; 3: parameters too (FSDP, full sharding)."""
    pp_schedule: PipelineSchedule = "1f1b"
    """Pipeline schedule: the order of the forward and backward passes of the micro-batches."""
    stages_per_rank: Size = 2
    """Pipeline stages per rank in the interleaved schedules; the V-shaped ones (zbv, dualpipe_v) always have two."""
    pp_split: tuple[Size, ...] = ()
    """Index of the first layer of each pipeline stage after the first; empty: stages of about equal cost."""
    cp_kind: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """Context-parallel attention. all_gather: gathers keys and values; ring: ring attention (arXiv 2310.01889);
    ulysses: all-to-all between positions and heads (DeepSpeed-Ulysses, arXiv 2309.14509)."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing: which activations of each block are recomputed in the backward pass. none: none; full:
    all; selective: all but the outputs of linear layers and fused attention."""
    compile: bool = False
    """Apply torch.compile to each block."""

    @property
    def stages(self) -> int:
        """Number of pipeline stages of the full model."""
        if self.pp_schedule in V_SHAPED:
            return 2 * self.pp
        return self.pp * (self.stages_per_rank if self.pp_schedule in MULTI_STAGE else 1)

    def problems(self) -> Iterator[Problem]:
        if self.dp_shard == 0:
            yield Problem("dp_shard", 0, "must be -1 or at least 1", (1, -1))
