"""The parallel layout: degrees of the mesh's axes, and how each technique works."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, config

PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v"
]
MULTI_STAGE = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Schedules in which a rank holds several stages."""
V_SHAPED = ("zbv", "dualpipe_v")
"""Of these, the ones in which the first rank holds the first and the last stage."""
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Schedules that compute the gradients of weights separately from those of inputs (arXiv 2401.10241)."""


@config
class ParallelConfig:
    """Degrees of the mesh's axes; their product is the number of processes.

    DDP is dp_replicate, FSDP is dp_shard, HSDP is both; ZeRO stages 0 to 3 are zero_stage.
    """

    pp: int = 1
    """Pipeline-parallel degree: the layers are split into stages over so many ranks."""
    dp_replicate: int = 1
    """Data-parallel replicas (DDP; with dp_shard > 1 HSDP): ranks that see different data and hold the same state."""
    dp_shard: int = 1
    """Sharded data-parallel degree (FSDP, ZeRO): ranks that see different data and shard parameters, gradients and
    optimizer state as `zero_stage` says; -1: all processes that the other axes leave."""
    cp: int = 1
    """Context-parallel degree: each sequence is sharded over so many ranks."""
    tp: int = 1
    """Tensor-parallel degree: matrices, and between them the sequence (sequence parallelism), are sharded over so many
    ranks."""
    ep: int = 1
    """Expert-parallel degree: whole experts are distributed over so many neighbours among the dp_shard · cp · tp ranks,
    and tokens travel to them; needs no processes of its own. 1: every rank has all experts, and tp shards each."""
    zero_stage: int = 3
    """What dp_shard shards: 0 nothing, 1 optimizer state and master weights, 2 gradients as well, 3 parameters as well
    (ZeRO, arXiv 1910.02054; 3 is FSDP's full sharding)."""
    pp_schedule: PipelineSchedule = "1f1b"
    """Pipeline schedule: the order of the micro-batches' forward and backward passes."""
    stages_per_rank: int = 2
    """Pipeline stages of each rank in the interleaved schedules; the V-shaped ones always have two."""
    pp_split: tuple[int, ...] = ()
    """First layer of each pipeline stage but the first; empty: stages of about equal cost."""
    cp_kind: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """Context-parallel attention: all-gather of keys and values; ring attention (arXiv 2310.01889); or Ulysses, which
    exchanges heads for positions (arXiv 2309.14509)."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations recomputed in the backward pass. none: none; full: all of each block's; selective: all but the
    outputs of linear layers and fused attention."""
    compile: bool = False
    """torch.compile each block."""

    @property
    def stages(self) -> int:
        """Number of pipeline stages of the whole model."""
        if self.pp_schedule in V_SHAPED:
            return 2 * self.pp
        return self.pp * (self.stages_per_rank if self.pp_schedule in MULTI_STAGE else 1)

    def problems(self) -> Iterator[Problem]:
        axes = ("pp", "dp_replicate", "cp", "tp", "ep", "stages_per_rank")
        yield from at_least(self, 1, *axes)
        if self.dp_shard != -1:
            yield from at_least(self, 1, "dp_shard")
        if self.zero_stage not in range(4):
            yield Problem(
                "zero_stage", self.zero_stage, "must be 0, 1, 2 or 3", (0 if self.zero_stage < 0 else 3,)
            )
