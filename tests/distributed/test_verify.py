"""`megatrain verify`: its exit codes, what it reports, and that it can't be reassured by what says nothing."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import CFG, STEPS, STORE, single

from megatrain.cli.main import main
from megatrain.parallel.config import ParallelConfig
from megatrain.runtime.workers import WorkerError, WorkerPool
from megatrain.train import verify
from megatrain.train.faults import FAULTS
from megatrain.train.parity import DisagreementError, Trace, merged, relative_errors, trace
from megatrain.train.verify import BOUND, compare

EQUAL = (BOUND,) * 4
SMALL = ["model=llama3_debug", "model.n_layers=4", "seq_len=32", "global_batch_size=8"]


@pytest.fixture(scope="module")
def ranks(workers: WorkerPool) -> list[Trace]:
    """Both ranks of a layout."""
    cfg = replace(CFG, parallel=ParallelConfig(dp_replicate=2), train=replace(CFG.train, ema_decay=0.9))
    return workers.run(trace, 2, cfg, STORE, STEPS)


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists()  # verify writes nothing that it was not told to


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code and what was printed."""
    code = main(["verify", *SMALL, *words])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err  # no progress where there is no terminal
    return code, printed.out


def test_a_layout_that_was_asked_for_is_tried_in_both_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(
        capsys, "parallel.dp_shard=2", "train.precision=bf16", "--layouts", "mine", "--json", "r.json"
    )
    rows = [line for line in printed.splitlines() if line.startswith("dp_shard=2")]
    assert [(row.split()[1], row.split()[-1]) for row in rows] == [("fp64", "equal"), ("bf16", "alike")]
    assert re.search(r"^1 layout: 1 equal\. \d+ s\.$", printed, re.M)
    assert code == 0
    result = json.loads(Path("r.json").read_text())
    assert result["exit_code"] == 0
    assert [(each["layout"], each["precision"], each["outcome"]) for each in result["results"]] == [
        ("dp_shard=2", "fp64", "equal"),
        ("dp_shard=2", "bf16", "equal"),
    ]
    plain, lower = (each["errors"] for each in result["results"])
    assert plain["gradient"][1] <= 1e-9 < lower["gradient"][1]


def test_a_layout_of_too_many_processes_is_named_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["parallel.dp_shard=4", "--processes", "2", "--layouts", "mine", "train.precision=fp64"]
    code, printed = run(capsys, *words, "--json", "-")
    result = json.loads(printed)  # the table is elsewhere
    assert code == result["exit_code"] == 1
    tried = {each["layout"]: each for each in result["results"]}
    assert tried["dp_shard=4"]["outcome"] == "not tried"
    assert "4 processes" in tried["dp_shard=4"]["reason"]
    assert tried["dp_shard=2"]["outcome"] == "equal"
    assert "dp_shard=4" in tried["dp_shard=2"]["note"]


def test_faults_are_caught_and_a_checker_that_is_too_weak_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["parallel.dp_shard=2", "--layouts", "mine", "--fault", "doubled_tokens"]
    code, printed = run(capsys, *words)
    assert re.search(r"^  doubled_tokens .* caught: worst in ", printed, re.M)
    assert "1 of 1 planted faults caught" in printed
    assert code == 0
    monkeypatch.setattr(verify.Verdict, "bounds", (math.inf,) * 4)
    monkeypatch.setattr(verify.Errors, "within", lambda self, bounds: True)
    code, printed = run(capsys, *words)
    assert re.search(r"^  doubled_tokens .* MISSED$", printed, re.M)
    assert "0 of 1 planted faults caught" in printed
    assert code == 1


def test_one_layout_that_misses_a_fault_is_enough_for_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a fault does nothing: it says that it reaches this layout, but there is no stage to move."""
    monkeypatch.setitem(
        FAULTS, "wrong_stage_order", replace(FAULTS["wrong_stage_order"], reaches=has_pipeline)
    )
    Path("two.txt").write_text(
        "parallel.pp=2 parallel.pp_schedule=interleaved_1f1b\nparallel.pp=2 # no stage to move\n"
    )
    code, printed = run(capsys, "--layouts", "two.txt", "--fault", "wrong_stage_order")
    assert len(re.findall(r"^  wrong_stage_order .* caught", printed, re.M)) == 1
    assert len(re.findall(r"^  wrong_stage_order .* MISSED", printed, re.M)) == 1
    assert "wrong_stage_order: caught in 1 of the 2 layouts" in printed
    assert code == 1


def has_pipeline(model: Any, layout: ParallelConfig) -> bool:
    return layout.pp > 1


def test_a_layout_that_differs_or_fails_ends_with_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on."""

    def run_or_fail(self: WorkerPool, function: Any, size: int, cfg: Any, *args: Any) -> Any:
        if cfg.parallel.tp > 1:
            raise WorkerError("one of 2 processes: Traceback\n  some line\nRuntimeError: as planted")
        return original(self, function, size, cfg, *args[:-1], "doubled_tokens")

    original = WorkerPool.run
    monkeypatch.setattr(WorkerPool, "run", run_or_fail)
    Path("two.txt").write_text("parallel.tp=2\nparallel.dp_shard=2\n")
    code, printed = run(capsys, "--layouts", "two.txt", "train.precision=fp64")
    assert re.search(r"^tp=2 .* FAILED: RuntimeError: as planted$", printed, re.M)
    assert re.search(r"^dp_shard=2 .* WRONG: worst in the gradient of ", printed, re.M)
    assert "2 layouts: 0 equal, 1 WRONG (dp_shard=2), 1 FAILED (tp=2)" in printed
    assert code == 1


def test_a_run_that_diverges_alone_is_no_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*args: Any) -> Trace:
        found = trace(*args)
        return replace(found, losses=[*found.losses[:-1], math.nan])

    monkeypatch.setattr(verify, "trace", diverging)
    assert main(["verify", *SMALL, "parallel.tp=2", "--layouts", "mine", "optim.lr=0.5"]) == 2
    assert "diverges in one process at optim.lr=0.5" in capsys.readouterr().err


def test_a_fault_is_seen_in_a_lower_precision_too(workers: WorkerPool) -> None:
    cfg = replace(CFG, train=replace(CFG.train, precision="bf16"), micro_batch_size=2)
    bounds = verify.rounding_bounds(trace(cfg, STORE, STEPS), single("untied"), "bf16")
    for fault, seen in ((None, False), ("doubled_tokens", True)):
        found = workers.run(trace, 2, replace(cfg, parallel=ParallelConfig(dp_shard=2)), STORE, STEPS, fault)
        assert compare(merged(found), single("untied")).within(bounds) != seen


def test_values_that_are_not_numbers_are_wrong(ranks: list[Trace]) -> None:
    """Comparisons with them are all false, also those that ask for the largest error."""
    truth = single("untied")
    good = merged(ranks)
    assert compare(good, replace(truth, averages=good.averages)).within(EQUAL)
    for kind in ("gradients", "final", "averages"):
        arrays = {name: array.copy() for name, array in getattr(good, kind).items()}
        arrays[list(arrays)[-1]].flat[0] = np.nan
        assert not compare(replace(good, **{kind: arrays}), good).within(EQUAL), kind
        del arrays[list(arrays)[-1]]
        assert not compare(replace(good, **{kind: arrays}), good).within(EQUAL), f"{kind}, one missing"
    assert not compare(replace(good, losses=[good.losses[0], math.nan, good.losses[2]]), good).within(EQUAL)
    assert relative_errors({"a": np.array([math.nan])}, {"a": np.array([1.0])}) == {"a": math.inf}


@pytest.mark.parametrize("kind", ["initial", "gradients", "final", "averages"])
def test_a_copy_on_another_rank_that_differs_is_seen(ranks: list[Trace], kind: str) -> None:
    first, second = ranks
    assert second.final == {}
    assert second.copies.keys() == {
        f"{kind} {name}" for kind in ("initial", "gradients", "final", "averages") for name in first.final
    }
    changed = second.copies | {f"{kind} embed.weight": "another"}
    with pytest.raises(DisagreementError, match=f"the copies of embed.weight differ in their {kind} values"):
        merged([first, replace(second, copies=changed)])


def fail_on_rank_one(rank_of_failure: int) -> None:
    import os

    if int(os.environ["RANK"]) == rank_of_failure:
        raise ValueError("as asked")


def test_a_failed_rank_is_reported_and_the_pool_goes_on(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="as asked"):
        workers.run(fail_on_rank_one, 2, 1)
    assert workers.run(fail_on_rank_one, 2, -1) == [None, None]
