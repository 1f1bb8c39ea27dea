"""The EleutherAI harness finds the same through the adapter as on the exported model in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from numerics.test_export import exported, make_run
from numerics.test_huggingface_parity import MODELS

from megatrain.cli.main import main

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
fewshot_split: test
"""
TASKS = {
    "choosing": """
task: choosing
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "reading": """
task: reading
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
task: writing
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: chrf}, {metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = ["the", "square", "of", "the number", "number of", "a square"]
    rows = [
        {
            "prompt": f"{words[n % 6]} {words[(n + 2) % 6]}",
            "choices": [f" {words[(n + 3) % 6]}", f" {words[(n + 1) % 6]}"],
            "answer": n % 2,
            "text": " ".join(words[(n * 5 + k) % 6] for k in range(n % 4 + 9)),
        }
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        common = COMMON.format(rows=tmp_path / "rows.jsonl")
        (tmp_path / f"{name}.yaml").write_text(common + text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return tmp_path


def figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_results_are_those_of_the_exported_model(folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    run = make_run(folder / "run", MODELS["qwen3"])
    exported(run, folder / "exported")
    words = ["--tasks", ",".join(TASKS), "--task-dir", str(folder), "--no-average", "--json", "ours.json"]
    assert main(["evaluate", "run", *words]) == 0
    ours = figures(json.loads(Path("ours.json").read_text())["tasks"])
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder / "exported"),
            "device": "cpu",
            "dtype": "float32",
            "max_length": 16,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = figures(expected["results"])
    assert len(theirs) >= 7
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "run", MODELS["qwen3"])
    assert main(["evaluate", "run", "--tasks", "choosing,chosing", "--task-dir", str(folder)]) == 2
    assert "no task chosing" in capsys.readouterr().err
