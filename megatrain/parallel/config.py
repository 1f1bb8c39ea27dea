"""How the work is cut over devices, and what is recomputed or compiled."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, config

PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v"
]
MULTI_STAGE = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Schedules in which a rank has several stages."""
V_SHAPED = ("zbv", "dualpipe_v")
"""Of these the first rank has the first and the last stage."""
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipe_v")
"""Schedules that compute weights' gradients apart from inputs' (arXiv 2401.10241)."""


@config
class ParallelConfig:
    """Degrees of the mesh's axes and what belongs to each. Their product is the number of processes."""

    pp: int = 1
    """Pipeline stages' ranks: each has a part of the layers."""
    dp_replicate: int = 1
    """Copies of the model that see different data; gradients are summed over them."""
    dp_shard: int = 1
    """Ranks that see different data and share parameters, gradients or optimizer states as `zero_stage` says; -1:
    what the other axes leave of the processes."""
    cp: int = 1
    """Ranks over which a sequence is cut."""
    tp: int = 1
    """Ranks over which matrices are cut, and between them the sequence (sequence parallelism)."""
    ep: int = 1
    """Ranks over which whole experts are spread, and to which tokens travel: neighbours among the dp_shard · cp · tp
    ranks, so no processes of their own. 1: all ranks have all experts, and tp cuts each."""
    zero_stage: int = 3
    """What is cut over dp_shard: 0 nothing, 1 optimizer states and masters, 2 gradients as well, 3 parameters as well
    (ZeRO, arXiv 1910.02054)."""
    pp_schedule: PipelineSchedule = "1f1b"
    """Order of micro-batches in the pipeline."""
    stages_per_rank: int = 2
    """Stages of each rank in the interleaved schedules; the V-shaped ones always have two."""
    pp_split: tuple[int, ...] = ()
    """First layer of each stage but the first, set by hand; empty: stages of about equal cost."""
    cp_kind: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """How queries meet the keys of other ranks: all keys are gathered; keys go round; or heads are exchanged for
    positions (arXiv 2309.14509)."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations made again in the backward pass: none; full: each block's; selective: all but the outputs of
    linear layers and fused attention."""
    compile: bool = False
    """torch.compile each block."""

    @property
    def stages(self) -> int:
        """Pipeline stages of the whole model."""
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
