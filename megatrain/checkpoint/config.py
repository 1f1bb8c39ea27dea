"""How often checkpoints are written, how many are kept, and how strictly they are checked."""

import re
from collections.abc import Iterator
from typing import Literal

from megatrain.config.paths import PathText
from megatrain.config.ranges import Count
from megatrain.config.schema import Problem, config


@config
class CheckpointConfig:
    every: Count | Literal["auto"] = 100
    """Steps between checkpoints. The last step is always saved; 0: only that one. auto: first after 10 steps, then so
    often that the least time is lost, from what a save and a step take and how often runs fail."""
    keep: Count = 3
    """Number of most recent checkpoints to keep; 0: all."""
    keep_every: Count = 0
    """Also keep, for ever, those of steps that are multiples of this; 0: none."""
    keep_best: Count = 0
    """Also keep so many with the lowest validation loss, of those saved at a step with a validation."""
    async_save: bool = False
    """Copy the tensors to host memory, and write them while training goes on. Takes host memory for another copy of
    what each rank saves. The last save of a run waits."""
    when_busy: Literal["wait", "skip"] = "wait"
    """If the asynchronous save before has not ended when the next is due: wait for it, or skip the next one."""
    on_error: Literal["stop", "warn"] = "stop"
    """When a checkpoint can't be saved (an asynchronous one is tried twice). stop: end the run; warn: say so and train
    on. If the last save of a run fails, so does the run."""
    durable: PathText | None = None
    """URL (s3://bucket/runs, or any that fsspec knows) or directory to which each committed checkpoint is uploaded in
    the background, under the run's name, with the run's records. A start on an empty disk resumes from there. Pruned by
    the same `keep`, `keep_every` and `keep_best`. Credentials come from the environment. null: none."""
    adopt: PathText | None = None
    """Start from the weights of another run: its directory, or one of its checkpoints. Optimizer and data start anew; a
    run that has checkpoints of its own goes on from these."""
    encryption: Literal["none", "aes-256-gcm"] = "none"
    """Encrypt every file of a checkpoint but its manifest. The key comes from the environment alone: MEGATRAIN_KEY (64
    hexadecimal digits), or MEGATRAIN_KEY_FILE (path of a file with some). Reading needs no setting, only the key."""
    verify: bool = True
    """Check the SHA-256 of every file before loading a checkpoint (file sizes are always checked)."""

    def problems(self) -> Iterator[Problem]:
        if self.durable is not None and re.match(r"[^/]+://[^/]*:[^/]*@", self.durable):
            hidden = re.sub(r"://[^/]*@", "://***@", self.durable)
            rule = "must not hold credentials, which every log would show; give them in the environment"
            yield Problem("durable", hidden, rule)
