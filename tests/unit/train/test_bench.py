"""What `bench` says around its figures: the estimate against what a run holds, and warnings that apply or do not."""

import dataclasses

import pytest
import torch

from megatrain.cli.compose import compose
from megatrain.config.errors import UserError
from megatrain.observe.profile import OPTIMIZER, OUTSIDE, Breakdown
from megatrain.parallel.shards import local_tensor
from megatrain.runtime.device import Peak
from megatrain.runtime.processes import Processes
from megatrain.train.bench import Request, bench
from megatrain.train.bench_facts import debug_flags
from megatrain.train.bench_notes import Circumstances, notes
from megatrain.train.build import build_state
from megatrain.train.config import Config
from megatrain.train.estimate import GIB, describe, estimate, require_room

QUIET = Circumstances(
    times=[1.0, 1.01, 1.02, 1.03, 1.04],
    profile=Breakdown(1.0, [("linear products", 0.8), (OUTSIDE, 0.1), (OPTIMIZER, 0.1)], [], []),
    on_cpu=True,
    threads=2,
    processes=1,
    cores=2,
    others=0.1,
    flags=[],
    fits_without_checkpointing=True,
    preset_seq_len=None,
)


def small(*overrides: str) -> Config:
    return compose(
        ["data=synthetic", "model=gpt2_124m", "model.n_layers=2", "micro_batch_size=1", *overrides]
    )


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_what_a_run_holds(optimizer: str, precision: str) -> None:
    model = [
        "model=llama3_debug",
        "data=synthetic",
        "micro_batch_size=1",
        "global_batch_size=1",
        "seq_len=64",
    ]
    cfg = compose([*model, f"optim={optimizer}", f"train.precision={precision}"])
    state = build_state(cfg, torch.device("cpu"))
    held = sum(local_tensor(t).nbytes for t in state.tensors().values())
    held += sum(p.nbytes for p in state.weights.parameters.values())  # gradients, as large as the weights
    if precision == "bf16":
        held += sum(p.nbytes for p in state.model.parameters())
    found = estimate(cfg, peak=None, memory=GIB, on_cpu=False)
    assert found.state_gib * GIB == pytest.approx(held, rel=0.01)


def test_a_step_takes_its_flops_over_the_peak_and_a_long_one_names_a_shorter_one() -> None:
    cfg = small("global_batch_size=512", "seq_len=1024")
    found = estimate(cfg, peak=Peak(1e11, "measured"), memory=64 * GIB, on_cpu=True)
    assert found.step_s is not None
    assert found.step_s[0] < found.tflop * 1e12 / 1e11 / 0.5 < found.step_s[1]
    first, shorter, memory = describe(found, cfg, steps=10)
    assert "512 micro-batches of 1 x 1024 tokens" in first
    assert "global_batch_size=1," in shorter
    assert "of 64.0 GiB" in memory


def test_what_cannot_fit_is_refused_with_what_to_do() -> None:
    found = estimate(small("seq_len=64"), peak=None, memory=GIB, on_cpu=True)
    with pytest.raises(UserError, match=r"parallel\.dp_shard.*--force"):
        require_room(found)
    require_room(dataclasses.replace(found, memory_gib=64.0))


@pytest.mark.parametrize("force", [False, True])
def test_weights_that_cannot_fit_are_refused_before_anything_is_measured(force: bool) -> None:
    """As `train` refuses them: weights and gradients are known exactly, so `--force` does not help."""
    cfg = compose(["data=synthetic", "model=llama3_405b", "train.precision=fp32", "micro_batch_size=1"])

    def never(*args: object) -> None:
        raise AssertionError(args)

    with pytest.raises(UserError, match=r"weights and gradients take [\d,]+\.\d GiB"):
        bench(cfg, Processes(), Request(steps=1, force=force), progress=never, say=never)


def test_nothing_is_said_of_a_sound_measurement() -> None:
    assert notes(small(), QUIET) == []
    wide = small("train.precision=fp8", "model.hidden_size=4096", "model.n_heads=32")
    assert notes(wide, dataclasses.replace(QUIET, on_cpu=False)) == []


@pytest.mark.parametrize(
    ("change", "overrides", "said"),
    [
        ({"threads": 1}, [], "OMP_NUM_THREADS=2"),
        ({"processes": 2}, [], "2 processes of 2 threads share 2 cores"),
        ({"others": 1.2}, [], "1.2 cores busy"),
        ({"on_cpu": False}, ["train.precision=fp8"], "this one is 768"),
        ({"flags": ["CUDA_LAUNCH_BLOCKING=1"]}, [], "CUDA_LAUNCH_BLOCKING=1"),
        ({"times": [1.0]}, [], "a median of 1"),
        ({"times": [1.0, 1.0, 1.1, 1.1, 1.5]}, [], "1000 to 1500 ms"),
        ({"profile": Breakdown(1.0, [(OUTSIDE, 0.5)], [], [])}, [], "hidden size of 768"),
        ({"profile": Breakdown(1.0, [(OPTIMIZER, 0.5)], [], [])}, [], "larger global_batch_size"),
        ({}, ["parallel.activation_checkpointing=full"], "activation_checkpointing=full recomputes"),
        ({"preset_seq_len": 1024}, ["seq_len=128"], "the preset's 1024"),
    ],
    ids=str,
)
def test_a_measurement_that_misleads_is_told_why(
    change: dict[str, object], overrides: list[str], said: str
) -> None:
    (note,) = notes(small(*overrides), dataclasses.replace(QUIET, **change))  # type: ignore[arg-type]
    assert said in note


def test_checkpointing_that_saves_the_memory_is_not_blamed() -> None:
    cfg = small("parallel.activation_checkpointing=full")
    assert notes(cfg, dataclasses.replace(QUIET, fits_without_checkpointing=False)) == []


def test_debug_settings_are_found() -> None:
    assert debug_flags({"CUDA_LAUNCH_BLOCKING": "1", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}) == [
        "CUDA_LAUNCH_BLOCKING=1"
    ]
