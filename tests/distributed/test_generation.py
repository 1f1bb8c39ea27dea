"""A run, or a Hugging Face directory, generates the same in tensor-parallel and pipeline processes as in one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import RUNS
from numerics.test_export import exported, make_run
from resharding import joined_processes
from torch import distributed as dist

from megatrain.evaluate.answers import Task, answer
from megatrain.models.generate import Generation, Request
from megatrain.models.sampling import Sampling
from megatrain.models.speculate import LookUp
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.parallel.shards import local_tensor
from megatrain.runtime.processes import Processes
from megatrain.runtime.workers import WorkerPool
from megatrain.train.inference import load_trained
from megatrain.train.scoring import Score, Scorer

SCORED = [([1, 2, 3], [4, 5]), ([6], [7]), ([1] * 9, [2, 3, 4]), ([8, 9], [1])]
PROMPTS = [[3, 14, 15, 9, 2, 3, 14], [7], [9, 9, 4]]


def results(directory: Path, layout: ParallelConfig) -> tuple[list[list[int]], list[Score], int]:
    """Greedy and sampled tokens, two scores, and how many numbers this process holds of the weights."""
    processes = joined_processes() if dist.is_initialized() else Processes()
    trained = load_trained(directory, processes, layout, average=None)
    generation = Generation(trained.packed(), context=12, n_blocks=9, drafter=LookUp())
    ways = [Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, seed=5)]
    numbers = [
        generation.add(Request(prompt=prompt, max_new_tokens=8, sampling=how))
        for prompt in PROMPTS
        for how in ways
    ]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while generation.is_busy:
        for each in generation.step():
            assert each.token is not None
            found[each.request].append(each.token)
    scores = Scorer(trained).scores([([1, 2, 3], [4, 5]), ([6], [7])])
    held = sum(local_tensor(each.detach()).numel() for each in trained.parallel.parameters().values())
    return list(found.values()), scores, held


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("uneven_latent", {"tp": 2, "pp": 2}),
        *[
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name, layout in [
                ("tied", {"tp": 2}),
                ("latent", {"pp": 2}),
                ("gpt2", {"tp": 2, "pp": 2}),
                ("uneven", {"tp": 3}),
                ("experts", {"tp": 2}),
                ("tied", {"pp": 4}),
            ]
        ],
    ],
    ids=str,
)
def test_shards_generate_what_the_whole_model_does(
    workers: WorkerPool, tmp_path: Path, name: str, layout: dict[str, int]
) -> None:
    model = replace(RUNS[name].model, init_std=0.05)
    run = make_run(tmp_path / "run", model, precision="fp64")
    truth, scores, whole = results(run, ParallelConfig())
    parallel = ParallelConfig(**layout)
    for texts, found, held in workers.run(results, world_size(parallel), run, parallel):
        assert texts == truth
        for score, expected in zip(found, scores, strict=True):
            assert score.nats == pytest.approx(expected.nats, abs=1e-9)
        assert held < 0.8 * whole


def answers(directory: Path, layout: ParallelConfig) -> tuple[list[Score], list[str], bool]:
    """Scores and generated answers of several texts, and whether this process has seen all of them."""
    processes = joined_processes() if dist.is_initialized() else Processes()
    trained = load_trained(directory, processes, layout, average=None)
    scorer, seen = Scorer(trained, processes), list[Task]()

    def generate(tasks: Sequence[Task]) -> list[str]:
        seen.extend(tasks)
        return answer(trained, tasks, tokens=5, stop=(), max_batch=2)

    tasks = [Task(text, ("",)) for text in ("square of", "line", "the number 12", "is", "the line of the")]
    texts = scorer.copies.share(tasks, generate)
    return scorer.scores([*SCORED, ([5], [])]), texts, len(seen) == len(tasks)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_replicate": 2, "tp": 2},
        pytest.param({"dp_replicate": 7}, marks=pytest.mark.slow),
        pytest.param({"dp_replicate": 2, "pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_copies_share_what_is_evaluated(workers: WorkerPool, tmp_path: Path, layout: dict[str, int]) -> None:
    run = make_run(tmp_path / "run", replace(RUNS["tied"].model, init_std=0.05), precision="fp64")
    expected, truth, has_all = answers(run, ParallelConfig())
    assert has_all
    parallel = ParallelConfig(**layout, zero_stage=0)
    for scores, texts, has_all in workers.run(answers, world_size(parallel), run, parallel):
        assert texts == truth
        assert not has_all
        assert [each.is_greedy for each in scores] == [each.is_greedy for each in expected]
        assert [each.nats for each in scores] == pytest.approx([each.nats for each in expected], abs=1e-9)


@pytest.mark.slow
def test_shards_of_a_hugging_face_directory(workers: WorkerPool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", RUNS["uneven_latent"].model)
    exported(run, tmp_path / "exported")
    truth, scores, _ = results(tmp_path / "exported", ParallelConfig())
    parallel = ParallelConfig(tp=2, pp=2)
    for texts, found, _ in workers.run(results, 4, tmp_path / "exported", parallel):
        assert texts == truth
        assert [each.nats for each in found] == pytest.approx([each.nats for each in scores], rel=1e-4)
