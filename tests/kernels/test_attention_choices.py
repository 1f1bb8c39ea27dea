"""What attention takes on a GPU that is not here: tables that are shipped, and the user's own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import attention_choices
from megatrain_kernels.flash_attention import choices, op
from megatrain_kernels.flash_attention.reference import Rule

pytest.importorskip("triton")
from benchmarks import attention_blocks
from megatrain_kernels.flash_attention import triton_blocks
from megatrain_kernels.flash_attention.triton_blocks import Use, chosen, config, remember, space

ROOT = Path(__file__).parents[2]
CAUSAL = Rule(True, 0.125, None, None, 0)
HOPPER = Use((9, 0), "key", 128, "documents", True, 1)


def tensor_on_gpu(seq: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What a choice asks of a tensor."""
    device = SimpleNamespace(index=0)
    return SimpleNamespace(is_cuda=True, device=device, shape=(1, seq, 8, dim), dtype=dtype, numel=lambda: 1)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own table, which does not exist yet."""
    path = tmp_path / "deep" / "blocks.json"
    monkeypatch.setenv("MEGATRAIN_TUNED", str(path))
    monkeypatch.setattr(triton_blocks, "_remembered", {})
    triton_blocks._own.cache_clear()
    yield path
    triton_blocks._own.cache_clear()


def test_the_shipped_tables_are_what_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    builds = sorted((ROOT / "benchmarks/results/attention_builds").glob("triton*.json"))
    shipped = json.loads(attention_blocks.TABLE.read_text())["rows"]
    made = [{**row, "capability": list(row["capability"])} for row in attention_blocks.from_builds(builds)]
    compiled = [row for row in shipped if row["how"] == "compiled"]
    assert [{**row, "blocks": tuple(row["blocks"])} for row in compiled] == made
    for device in json.loads(attention_choices.TABLE.read_text())["devices"]:
        result = json.loads((ROOT / device["source"]).read_text())
        assert device["cases"] == attention_choices.cases_of(result)


def test_shipped_blocks_may_be_chosen() -> None:
    rows = triton_blocks._shipped()
    assert rows
    for use, sizes in rows:
        assert sizes in space(use.kind, use.width, 2)


def test_a_use_takes_its_row_and_an_unknown_gpu_the_smallest(table: Path) -> None:
    assert chosen(HOPPER, 2) == dict(triton_blocks._shipped())[HOPPER]
    assert chosen(HOPPER._replace(size_class=2), 2) == chosen(HOPPER, 2)
    assert chosen(HOPPER._replace(capability=(12, 0)), 2) == space("key", 128, 2)[-1]
    assert chosen(HOPPER, 4) == space("key", 128, 4)[-1]
    assert chosen(HOPPER._replace(mask="softcap"), 2) in dict(triton_blocks._shipped()).values()
    ampere = HOPPER._replace(capability=(8, 0), mask="window", grouped=False)
    assert chosen(ampere, 2) != space("key", 128, 2)[-1]


def test_what_was_timed_comes_first_and_is_kept(table: Path) -> None:
    best, other = space("key", 128, 2)[-1], space("forward", 64, 2)[1]
    remember(HOPPER, config(best, True))
    remember(HOPPER._replace(kind="forward", width=64), config(other, True))
    triton_blocks._own.cache_clear()
    assert chosen(HOPPER, 2) == best
    assert chosen(HOPPER._replace(kind="forward", width=64), 2) == other
    assert chosen(HOPPER._replace(mask="causal"), 2) != best
    assert len(json.loads(table.read_text())["rows"]) == 2
    assert [path.name for path in table.parent.iterdir()] == [table.name]


@pytest.mark.parametrize("text", ["", "{", '{"rows": [{"kind": "key"}]}', '{"rows": 3}', "[]"])
def test_a_damaged_table_is_not_used(table: Path, text: str) -> None:
    table.parent.mkdir()
    table.write_text(text)
    assert chosen(HOPPER, 2) == dict(triton_blocks._shipped())[HOPPER]


def test_a_table_that_cannot_be_written_stops_nothing(table: Path) -> None:
    table.parent.write_text("a file where a directory should be")
    remember(HOPPER, config(space("key", 128, 2)[0], True))


def test_blocks_of_an_older_version_are_not_taken(table: Path) -> None:
    table.parent.mkdir()
    row = {**HOPPER._asdict(), "blocks": [512, 512, 8, 9]}
    table.write_text(json.dumps({"rows": [row]}))
    assert chosen(HOPPER, 2) in space("key", 128, 2)


MS = {"torch": 3.0, "triton": 4.0, "triton_fused": 2.0, "triton_hopper": 1.0}


@pytest.mark.parametrize(
    ("ms", "capability", "dim", "expected"),
    [
        (MS, (9, 0), 128, "triton_hopper"),
        (MS, (9, 0), 96, "triton_fused"),  # no head of that size
        (MS | {"torch": 0.5}, (9, 0), 128, "torch"),
        ({"torch": 3.0, "triton": 4.0}, (9, 0), 128, "torch"),
    ],
)
def test_the_fastest_that_takes_the_call(
    monkeypatch: pytest.MonkeyPatch,
    ms: dict[str, float],
    capability: tuple[int, int],
    dim: int,
    expected: str,
) -> None:
    monkeypatch.setattr(choices, "cuda_capability", lambda index: capability)
    monkeypatch.setattr(op, "cuda_capability", lambda index: capability)
    monkeypatch.setattr(choices, "measured", lambda *kind: [(1024, {"torch": 0.1}), (16384, ms)])
    q = tensor_on_gpu(16384, dim)
    call = (q, q, q, None, CAUSAL, True)
    found = "torch" if op._torch_is_faster(*call) else op._variant(*call)
    assert found == expected


def test_determinism_leaves_out_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "cuda_capability", lambda index: (9, 0))
    monkeypatch.setattr(choices, "measured", lambda *kind: [(16384, MS)])
    q = tensor_on_gpu(16384, 128)
    assert choices.fastest(q, q, q, None, CAUSAL)[0] == "triton_hopper"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choices.fastest(q, q, q, None, CAUSAL) == ["torch", "triton"]


def test_an_h100_takes_torch_where_it_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured: cuDNN's attention without masks; with documents nothing was measured, and Triton is taken."""
    monkeypatch.setattr(choices, "cuda_capability", lambda index: (9, 0))
    q = tensor_on_gpu(16384, 128)
    assert op._torch_is_faster(q, q, q, None, CAUSAL, True)
    docs = torch.zeros(1, 16384, dtype=torch.int64)
    assert not op._torch_is_faster(q, q, q, docs, CAUSAL, True)
    assert op._variant(q, q, q, docs, CAUSAL, True) == "triton"
