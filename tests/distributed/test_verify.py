"""`megatrain verify`: planted faults are caught, and every family shrinks to a config that all layouts fit."""

from dataclasses import replace

import pytest
from layouts import CFG, STEPS, STORE, single

from megatrain.models.config import ModelConfig
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.runtime.workers import WorkerError, WorkerPool
from megatrain.train.parity import FAULTS, merged, trace
from megatrain.train.verify import compare, layouts, shrink


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_caught(workers: WorkerPool, fault: str | None) -> None:
    cfg = replace(CFG, parallel=ParallelConfig(dp_shard=2))
    found = merged(workers.run(trace, 2, cfg, STORE, STEPS, fault))
    assert compare("dp_shard=2", found, single("untied")).good == (fault is None)


@pytest.mark.parametrize("model", [GPT2Config(), Llama3Config(), MixtralConfig(), DeepseekV3Config()])
def test_a_shrunk_config_fits_every_layout(model: ModelConfig) -> None:
    cfg = replace(CFG, model=model)
    tried = layouts(cfg)
    assert any(layout.ep > 1 for layout in tried) == (model.experts is not None)
    for layout in tried:
        each = replace(shrink(cfg), parallel=layout)
        assert not list(each.problems()), layout


def fail_on_rank_one(rank_of_failure: int) -> None:
    import os

    if int(os.environ["RANK"]) == rank_of_failure:
        raise ValueError("as asked")


def test_a_failed_rank_is_reported_and_the_pool_goes_on(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="as asked"):
        workers.run(fail_on_rank_one, 2, 1)
    assert workers.run(fail_on_rank_one, 2, -1) == [None, None]
