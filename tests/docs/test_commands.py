"""Every command that the documentation shows is run, or as much of it as one machine without a cluster can.

All fenced `bash` and `console` blocks are collected. Each command is first composed as it is shown, then it runs for
real, in a folder of its own, made small by overrides that are appended. What cannot run here has a reason beside it
(`NOT_RUN`), and is checked as far as it goes: a layout of several processes is composed, torchrun's own parser reads
torchrun's arguments, and of a launch the script is written.
"""

import ast
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatrain.cli import serve
from megatrain.cli.compose import Source, compose
from megatrain.cli.main import main
from megatrain.cli.options import parse_options
from megatrain.cli.verbs import find_verb
from megatrain.config.docs import describe
from megatrain.data.tokenizer import train_bpe
from megatrain.parallel.layout import fill, world_size
from megatrain.train.config import Config

ROOT = Path(__file__).parents[2]
CORPORA = ROOT / "tests" / "corpora"
"""Files in the formats that people have, made by the programs that people use (make.py)."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = (
    "model.n_layers=2", "model.hidden_size=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16",
    "model.ffn_size=64", "model.vocab_size=300", "seq_len=32", "global_batch_size=2", "micro_batch_size=2",
    "train.steps=2", "train.eval_tokens=64", "train.sample_tokens=4", "train.precision=fp32", "schedule.warmup_steps=0",
    "data.prefetch=0", "log.wandb=off", "log.display=plain",
)  # fmt: skip
NOT_RUN = {
    "source": "it changes the shell; the Makefile and the installation make the file",
    "launch": "it needs a cluster; tests/clusters has one, here the script is written (--dry-run)",
    "make": "installing and testing take minutes and stand in .ci/run; make reads the target with -n",
    "python -m benchmarks": "it measures for a minute; tests/unit/benchmarks runs it, here the module is found",
    "verify": "it trains for a minute; tests/distributed/test_verify.py runs it, here it is composed",
    "serve": "it runs until a signal; tests/e2e/test_serve.py starts it, here its arguments are read",
    "several processes": "tests/e2e/test_layouts.py starts layouts; here they are composed",
    "--multirun": "tests/e2e/test_multirun.py runs sweeps, a new process each; here all are composed",
}
"""Why a command is only checked in part."""


@dataclass(frozen=True)
class Shown:
    """One command as a reader sees it: on which page and line, and for a console what it prints."""

    page: Path
    line: int
    command: str
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(language: str) -> Iterator[tuple[Path, int, str, str]]:
    """Yield page, line, title and text of every fenced block of `language`."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(
            rf'^```{language}(?: title="([^"\n]*)")?\n(.*?)^```', text, re.MULTILINE | re.DOTALL
        ):
            yield page, text[: found.start()].count("\n") + 2, found[1] or "", found[2]


def commands() -> list[Shown]:
    """Return every command of the `bash` blocks once, continued lines joined and comments taken off."""
    found: list[Shown] = []
    for page, line, title, text in blocks("bash"):
        if not title:
            joined = text.replace("\\\n", " ").splitlines()
            found += [Shown(page, line, each.split("  #")[0].strip()) for each in joined if each.strip()]
    return list({shown.command: shown for shown in reversed(found)}.values())[::-1]


def consoles() -> list[Shown]:
    """Return every command of the `console` blocks with the lines below it."""
    found = []
    for page, line, _, text in blocks("console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, *output = part.rstrip().splitlines()
            found.append(Shown(page, line, command, tuple(output)))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the pages speak of: a text, a corpus, a tokenizer, runs, an exported model."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [f"Line {n}: the square of {n} is {n * n}." for n in range(300)]
    (folder / "my.txt").write_text("\n".join(lines))
    (folder / "corpus").mkdir()
    rows = "".join(f'{{"text": "{line}", "content": "{line}"}}\n' for line in lines)
    (folder / "corpus" / "part.jsonl").write_text(rows)
    shutil.copytree(CORPORA, folder, dirs_exist_ok=True)
    (program,) = [text for page, _, title, text in blocks("python") if title == "numbers.py"]
    with chdir(folder):
        exec(program, {})
    shown = {title: text for language in ("json", "python") for _, _, title, text in blocks(language)}
    for name in ("tickets.jsonl", "preferences.jsonl", "reward.py"):
        (folder / name).write_text(shown[name])
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("\n".join(lines))
    (folder / "prompts.jsonl").write_text('{"prompt": "Line", "seed": 3}\n')
    (folder / "reviews.jsonl").write_text(
        '{"prompt": "a", "answer": " b"}\n{"prompt": "b", "answer": " c"}\n'
    )
    (folder / "answers.jsonl").write_text('{"prompt": "Line", "reference": ["7", "8"]}\n')
    (folder / "tokenizer").mkdir()
    train_bpe(iter(lines), vocab_size=270).save_pretrained(folder / "tokenizer")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setenv("MEGATRAIN_CACHE", str(folder / "cache"))
        kept = ["run.name=mine", "checkpoint.durable=store"]
        assert main(["train", "data.path=my.txt", *kept, *small("data.path=my.txt")]) == 0
        assert main(["export", "runs/mine", "meta-llama-3.2-1b"]) == 0
        train_bpe(iter(lines), vocab_size=260).save_pretrained(folder / "meta-llama-3.2-1b")
        shutil.copytree("runs/mine", "runs/default")
        yield folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `prepared` for one command, which is the working directory."""
    for each in prepared.iterdir():
        if each.name != "cache":
            (shutil.copytree if each.is_dir() else shutil.copy)(each, tmp_path / each.name)
    with chdir(tmp_path):
        yield tmp_path


def small(*words: str) -> list[str]:
    """Return the overrides that make a run small, for a command line of `words`."""
    text = " ".join(words)
    is_text = not any(word in text for word in ("data=synthetic", "experiment=smoke"))
    own = ["data.tokenizer.kind=bytes"] if is_text and "data.tokenizer" not in text else []
    reads = "data.path" in text or not is_text
    return [*SMALL, *own, *([] if reads else ["data.path=my.txt"])]


def composed(words: list[str], verb: str = "train") -> Config:
    """Return the config of `words`, exactly as they are shown."""
    options = parse_options(verb, words)
    return compose(options.overrides, Source(starts_from_base=options.starts_from_base))


@pytest.mark.parametrize("shown", commands(), ids=str)
def test_command(shown: Shown, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(shown.command.replace("$HEAD", "localhost"))
    while "=" in words[0]:  # an environment variable
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "megatrain":
        check_megatrain(rest)
    elif program == "torchrun":
        check_torchrun(rest)
    elif program == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *rest], check=True, capture_output=True)
    elif program in NOT_RUN:
        assert Path(rest[0]).exists()
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None
    else:
        assert program in ("ls", "tail", "grep", "sed"), f"{shown}: say how to check {program}"
        done = subprocess.run(words, check=False, capture_output=True)
        assert done.returncode == (1 if "failure" in words else 0)  # grep: a good run has none


def check_megatrain(words: list[str]) -> None:
    """Run one `megatrain` command line, or check it as far as it goes."""
    verb, rest = words[0], words[1:]
    known = find_verb(verb)
    assert known is not None, f"there is no verb {verb}"
    if verb == "serve":
        assert Path(serve.parse(rest).run).is_dir()
    elif "--help" in rest or "--cfg" in rest or not known.takes_config or names_no_config(rest):
        assert main(words) == 0
    elif verb == "launch":
        assert main([*words, "--dry-run"]) == 0
    elif verb == "finetune":
        composed(rest, verb)
        own = [word for word in SMALL if not word.startswith(("model.", "seq_len="))]
        assert main([*words, *own, "seq_len=128", "train.eval_tokens=256"]) == 0
    elif "-m" in rest or "--multirun" in rest or verb in NOT_RUN:
        assert main([*words, "--cfg", "job"]) == 0
    else:
        actions = [name for name, _ in known.actions]
        cfg = composed([w for w in rest if not w.startswith("--") and not w.isdigit() and w not in actions])
        if cfg.parallel.dp_shard == -1 or world_size(cfg.parallel) == 1:
            shown = [re.sub(r"^\d+$", "1", word) for word in words]  # bench --steps 1
            assert main([*shown, *small(*rest)]) == 0


def names_no_config(words: list[str]) -> bool:
    """Return whether an action of `data` looks at the caches instead."""
    return words[:1] in (["ls"], ["prune"]) or words[:2] == ["verify", "--all"]


def check_torchrun(words: list[str]) -> None:
    """Read torchrun's arguments with its parser, and compose the layout for the processes that it would start."""
    options = get_args_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "megatrain")
    verb, *rest = options.training_script_args
    if verb == "doctor":
        assert rest == ["--cluster"]
        return
    assert verb == "train"
    processes = int(options.nnodes) * int(options.nproc_per_node)
    assert options.rdzv_backend == "c10d"
    assert world_size(fill(composed(rest).parallel, processes)) == processes


@pytest.mark.parametrize("shown", consoles(), ids=str)
def test_console(shown: Shown, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(shown.command)
    assert program == "megatrain"
    main(words)
    printed = "".join(capsys.readouterr())
    for line in shown.output:
        assert line == "..." or line in printed, f"{shown}: {line!r} is not what it prints:\n{printed}"


def test_python_blocks_are_python() -> None:
    for page, line, _, text in blocks("python"):
        ast.parse(text, filename=f"{page}:{line}")


def test_there_are_commands_on_every_page_that_tells_how() -> None:
    pages = {shown.page.name for shown in commands()}
    wanted = {"README.md", "first-run.md", "data.md", "choosing-a-layout.md", "machines.md", "checkpoints.md"}
    assert wanted <= pages
    assert len(commands()) > 40


KEY = re.compile(r"`(?:megatrain \w+ )?'?((?:%s)\.[a-z0-9_.]+)" % "|".join(  # noqa: UP031 - braces are part of it
    ("run", "model", "data", "optim", "schedule", "parallel", "train", "log", "checkpoint", "moe")
))  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_keys_verbs_and_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    keys = {key.path for key in describe(Config)}
    groups = {path.rpartition(".")[0] for path in keys}
    for found in KEY.findall(text):
        named = found.rstrip(".")
        is_file = named.endswith((".py", ".yaml", ".jsonl", ".json", ".sbatch"))
        assert is_file or named in keys | groups, f"{named} is no config key"
    for verb in re.findall(r"`megatrain ([a-z]+)[ `]", text):
        assert find_verb(verb), f"there is no verb {verb}"
    for path in re.findall(r"`((?:megatrain|kernels|conf|tests|benchmarks|docs)/[\w/.\-]+)`", text):
        assert (ROOT / path).exists(), f"{path} does not exist"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    """mkdocs checks the links of the site; these pages are outside it."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


def test_a_wrong_command_is_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="no verb"):
        check_megatrain(["trian"])
    with pytest.raises(Exception, match="no such key"):
        check_megatrain(["train", "train.stepz=3"])
    with pytest.raises(AssertionError):
        check_torchrun(
            [
                "--nnodes=1",
                "--nproc-per-node=3",
                "--rdzv-backend=c10d",
                "-m",
                "megatrain",
                "train",
                "parallel.tp=2",
            ]
        )
