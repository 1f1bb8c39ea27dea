"""The command as a user meets it: exit codes, messages, help, start-up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workplace import TINY

from megatrain.cli.main import main
from megatrain.cli.verbs import VERBS
from megatrain.config.text import from_yaml
from megatrain.train.config import Config

HEAVY = ("torch", "numpy", "pydantic", "rich", "wandb", "triton", "transformers")


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "megatrain", *words]
    return subprocess.run(
        call, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


def test_cfg_job_prints_a_config_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "train.seed=5", "optim.lr=2e-4", "--resolve"]) == 0
    cfg = from_yaml(Config, capsys.readouterr().out)
    assert (cfg.train.seed, cfg.optim.lr) == (5, 2e-4)


def test_cfg_schema_prints_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "schema"]) == 0
    assert "train" in yaml.safe_load(capsys.readouterr().out)["properties"]


def test_multirun_with_cfg_prints_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "--cfg", "job", "train.seed=0,1", "optim=adamw,sgd"]) == 0
    jobs = [from_yaml(Config, text) for text in capsys.readouterr().out.split("---\n")]
    assert [(cfg.train.seed, cfg.optim.kind) for cfg in jobs] == [
        (0, "adamw"),
        (0, "sgd"),
        (1, "adamw"),
        (1, "sgd"),
    ]


def test_mistakes_exit_2_without_traceback_or_traces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatrain", "train", "train.stepz=3", "model=llama9", "model.n_heads=-7", "+foo=1"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 5)
    assert lines[0] == "megatrain: the config has 4 problems:"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "Did you mean train?"),
        (["data.path=x"], "the verb comes first, as in `megatrain train data.path=x`"),
        (["--shell-completion", "tcsh"], "bash|zsh|fish"),
        (["train", "--cgf", "job"], "train: unrecognized arguments: --cgf; see `megatrain train --help`"),
        (["train", "--cfg", "hydra"], "invalid choice: 'hydra'"),
        (["doctor", "now"], "doctor: unrecognized arguments: now"),
        (["train", "--config-dir", "/nowhere/at/all"], "no such directory"),
        (["train", "--help", "model=nonsense"], "model=nonsense: is not an option of the group model"),
    ],
)
def test_wrong_words_exit_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_command_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb.name} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_verb_help_has_three_examples(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = verb.name  # type: ignore[attr-defined]
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(rf"^  megatrain {name}\b", out.partition("Examples:")[2], re.MULTILINE)) == 3


def group_names(text: str) -> set[str]:
    """The first words of the lines below `Config groups`."""
    return set(
        re.findall(r"^  (\w+) ", text.partition("Config groups")[2].partition("\n\n")[0], re.MULTILINE)
    )


def test_train_help_lists_groups_options_and_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [base_gpt2]\n")
    assert main(["train", "-h", "--config-dir", str(tmp_path)]) == 0
    short = capsys.readouterr().out
    groups = {
        "checkpoint",
        "data",
        "deepspeed",
        "experiment",
        "log",
        "model",
        "lora",
        "privacy",
        "moe",
        "objective",
        "optim",
        "parallel",
        "recipe",
        "resilience",
        "schedule",
        "tasks",
        "train",
    }
    assert group_names(short) == groups
    assert " mine" in short
    assert "train.z_loss" not in short
    assert main(["train", "--help", "--all"]) == 0
    assert "train.z_loss = 0.0" in capsys.readouterr().out


def test_help_shows_the_values_that_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    bare = capsys.readouterr().out
    assert all(
        f"\n  {line} " in bare for line in ("optim.lr = 0.014", "train.steps = 2000", "global_batch_size = 4")
    )
    assert main(["train", "model=llama3_8b", "seq_len=64", "--help", "--all"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {line} " in out for line in ("optim.lr = 0.0003", "seq_len = 64", "model.n_layers = 32"))
    assert "None" not in out
    assert main(["train", "data=text", "--help"]) == 0
    assert "data.path: must be given" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_the_terminal(columns: int) -> None:
    out = command("train", "--help", "--all", COLUMNS=str(columns)).stdout
    to_be_copied = ("usage:", "  megatrain ")  # these stay whole
    prose = [line for line in out.splitlines() if not line.startswith(to_be_copied)]
    assert max(len(line) for line in prose if " " in line.strip()) <= columns


def test_help_speaks_only_of_what_the_verb_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, takes_keys in (("train", True), ("bench", True), ("generate", False), ("doctor", False)):
        assert main([verb, "--help"]) == 0
        assert ("--all" in capsys.readouterr().out) == takes_keys


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"megatrain \d+\.\d+\.\d+, torch \S+, Python 3\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [["train", "--cfg", "job"], ["train", "--help"], ["--complete", "megatrain train mo"]]
)
def test_nothing_heavy_is_imported_before_a_run(words: list[str]) -> None:
    code = f"""
import sys
from megatrain.cli.main import main
main({words!r})
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_imports_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    """Each would delay the first step."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    unused = (
        *("wandb", "pydantic", "transformers", "tensorboard", "rich", "tiktoken", "tokenizers", "pyarrow"),
        *(
            "sqlite3",
            "pandas",
            "scipy",
            "matplotlib",
            "torchvision",
            "torch.utils.tensorboard",
            "torch._inductor.compile_fx",
        ),
    )
    words = [
        "train",
        *TINY,
        f"data.path={text}",
        "train.steps=2",
        "schedule.warmup_steps=0",
        f"run.dir={tmp_path}/runs",
    ]
    code = f"""
import sys
from megatrain.cli.main import main
assert main({words!r}) == 0
print([name for name in {unused!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True,
        env=os.environ | {"MEGATRAIN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_error() -> None:
    call = f"{sys.executable} -m megatrain train --help --all | head -1"
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("usage: megatrain train")
    assert done.stderr == ""


def main_in_which(candidates: str) -> subprocess.CompletedProcess[str]:
    """The command, with the function that answers `--complete` replaced by an expression."""
    code = f"""
import signal, sys
import megatrain.cli.main as command
command.candidates = lambda line: {candidates}
sys.exit(command.main(["--complete", "x"]))
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_unexpected_errors_keep_their_traceback() -> None:
    done = main_in_which("1 / 0")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_exits_130() -> None:
    done = main_in_which("signal.raise_signal(signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "megatrain: interrupted\n")
