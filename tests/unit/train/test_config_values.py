"""Values drawn from the config's schema: refused before anything is written, or a run that trains.

Every key of every optimizer, schedule, model family and section is drawn, by its type and range, so a key that is added
later is covered too. `make values EXAMPLES=5000` runs many.
"""

import base64
import contextlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from megatrain.config.errors import UserError
from megatrain.config.load import config_classes, dump, hints, kind_of, load, members
from megatrain.config.ranges import FLOAT32_MAX, FLOAT32_TINY, MAX_INT, MAX_SIZE, Range, ranges
from megatrain.data.prepare import prepare
from megatrain.data.tokenizer import train_bpe
from megatrain.models.flops import n_params
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.device import memory_bytes
from megatrain.runtime.processes import Processes
from megatrain.train.auto import require_memory, resolve_auto
from megatrain.train.build import build_eval_batches, build_loader, build_state, with_layout
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.failures import DivergedError
from megatrain.train.files import read_config, run_directory
from megatrain.train.main import run
from megatrain.train.restore import restore_model
from megatrain.train.step import train_step

EXAMPLES = int(os.environ.get("VALUES_EXAMPLES", "25"))
STEPS = 5
MOST_PARAMETERS = 10_000_000
"""A larger model is legal too, but only loaded: its steps would take long."""
CPU = torch.device("cpu")

TINY: dict[str, Any] = {
    "n_layers": 2, "hidden_size": 16, "n_heads": 2, "ffn_size": 24, "vocab_size": 264, "max_seq_len": 64,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_experts": 4, "top_k": 2, "n_groups": 2, "top_groups": 2, "first_k_dense": 1, "n_shared_experts": 1,
    "seq_len": 16, "global_batch_size": 4, "steps": STEPS, "eval_every": 2, "eval_tokens": 64, "every": 3,
    "precision": "fp32", "sample_tokens": 0, "display": "off", "wandb": "off", "val_fraction": 0.25,
}  # fmt: skip
"""Values of a run that takes a moment, by the last part of the key."""

LIMITED: dict[str, Any] = {
    "global_batch_size": Range(at_most=8),
    "n_layers": Range(at_most=4),
    "eval_tokens": Range(at_most=4096),
    "wandb": ("off",),
    "display": ("off", "plain"),
    "compile": (False,),
    "engine": (
        "native",
    ),  # the others leave state in the process; tests/distributed/test_engines.py runs them
    "tensorboard": (False,),
}
"""Keys whose other legal values only take long, or other machines: the ones that are drawn."""

TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "~",
    "~nobody/x",
    "a/b",
    "/proc/nowhere/at/all",  # no user can make it
    "x" * 300,
    "\udcff",
    "null",
    "ü",
    "1e3",
)


def numbers(allowed: Range, default: object) -> Iterator[float]:
    """Yield the ends of a range, what lies beside them, and the numbers that computers have trouble with."""
    for end in (allowed.at_least, allowed.above, allowed.at_most, allowed.below):
        if end is not None:
            yield from (end, end - 1, end + 1, math.nextafter(end, math.inf), math.nextafter(end, -math.inf))
            yield from (end - 1e-4, end + 1e-4)
    yield from (0, 1, -1, 2, 3, 5, 7, 0.0, -0.0, 0.5, 1.0, 1.5, math.nan, math.inf, -math.inf)
    yield from (FLOAT32_TINY, 1e-45, 5e-324, 1e-30, 1e-7, 1e4, 1e30, FLOAT32_MAX, 3.5e38, 1e308)
    yield from (MAX_SIZE, MAX_SIZE + 1, 2**32, 2**53 + 1, MAX_INT, MAX_INT + 1, 10**30, -(10**400))
    if isinstance(default, int | float):
        yield from (default, default * 2, default / 2, -default)


def candidates(cls: type, name: str, hint: Any) -> list[Any]:
    """Return the values to draw from for one key: legal and illegal ones."""
    default = next(field.default for field in fields(cls) if field.name == name)
    found: list[Any] = [dump(default) if is_dataclass(default) else default]
    for member in members(hint):
        if get_origin(member) is Literal:
            found += 8 * get_args(member)
        elif member is bool:
            found += [True, False] * 4
        elif member in (int, float):
            some = numbers(ranges(cls)[name], default)
            found += [int(n) if member is int and n == n // 1 and abs(n) < 2**53 else n for n in some]
        elif member is str:
            found += TEXTS
        elif get_origin(member) is tuple:
            found += [["*"], ["train.seed"], [1], [0], [1, 1], [-1], [MAX_SIZE + 1], ["\udcff"]]
    found += [None, True, False, "auto", [], {}]
    return [value for value in found if takes_a_moment(name, value)]


def takes_a_moment(name: str, value: object) -> bool:
    """Whether a run with this value of a key is short, or none, because it is illegal."""
    limit = LIMITED.get(name)
    if isinstance(limit, Range):
        return not isinstance(value, int | float) or value in limit
    return limit is None or value in (None, "", "auto", [], {}) or value in limit


def leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Yield the path of every leaf below a config class, with the class that has it; a union's `kind` is none."""
    for name, hint in hints(cls).items():  # type: ignore[arg-type]
        classes = config_classes(hint)
        for inner in classes:
            yield from leaves(inner, (*path, name))
        if not classes or NoneType in members(hint):
            yield (*path, name), cls


def tiny(cls: type) -> dict[str, Any]:
    """Return the plain data of a section with the sizes of `TINY`."""
    return shrunk(dump(cls()))


def shrunk(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: shrunk(value) if isinstance(value, dict) else value if value is None else TINY.get(key, value)
        for key, value in data.items()
    }


def case(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a tiny config of drawn kinds, and one to three of its keys with drawn values."""
    rng = random.Random(seed)
    data, paths = tiny(Config), []
    for name, hint in hints(Config).items():  # type: ignore[arg-type]
        if classes := config_classes(hint):
            cls = rng.choice(classes)
            data[name] = tiny(cls)
            paths += [(path, owner) for path, owner in leaves(cls, (name,)) if path[1:] != ("kind",)]
        elif name != "schema_version":
            paths.append(((name,), Config))
    data["data"]["kind"] = rng.choice(("text", "text", "synthetic"))
    data["data"]["tokenizer"]["kind"] = rng.choice(("bpe", "bytes", "huggingface", "tiktoken"))
    drawn: dict[str, Any] = {}
    for path, cls in rng.sample(paths, rng.choice((1, 1, 2, 3))):
        section = data
        for part, owner in zip(path[:-1], sections(data, path), strict=True):
            if not isinstance(section.get(part), dict):
                section[part] = tiny(owner)
            section = section[part]
        section[path[-1]] = rng.choice(candidates(cls, path[-1], hints(cls)[path[-1]]))  # type: ignore[arg-type]
        drawn[".".join(path)] = section[path[-1]]
    return data, drawn


def sections(data: dict[str, Any], path: tuple[str, ...]) -> list[type]:
    """Return the config class of each section on the way to a leaf."""
    cls, found = Config, []
    for part in path[:-1]:
        classes = config_classes(hints(cls)[part])  # type: ignore[arg-type]
        kind = data.get(part, {}).get("kind") if cls is Config else None
        cls = next((each for each in classes if len(classes) > 1 and kind_of(each) == kind), classes[0])
        found.append(cls)
    return found


def needs_command(drawn: dict[str, Any]) -> bool:
    """Whether a drawn key is of a part that only the full command has, and its value is not a common one."""
    parts = ("run.", "log.", "checkpoint.", "train.")
    return any(key.startswith(parts) and value not in (None, True, False) for key, value in drawn.items())


def is_ordinary(value: object) -> bool:
    """Whether a number is of a size that people use: others may diverge, or move no weight."""
    return not isinstance(value, int | float) or value == 0 or 1e-5 <= abs(value) <= 100


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and tokenizer files, and one cache for all runs."""
    folder = tmp_path_factory.mktemp("values")
    rows = ({"text": f"line {n}: the quick brown fox jumps over the lazy dog"} for n in range(40))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_bpe(iter(["the quick brown fox"]), vocab_size=260).save(folder / "hf")
    ranks = (b"%s %d\n" % (base64.b64encode(bytes([n])), n) for n in range(256))
    (folder / "ranks.tiktoken").write_bytes(b"".join(ranks))
    return folder


@contextlib.contextmanager
def empty_folder(shared: Path) -> Iterator[Path]:
    """Work in an empty folder, with a home in it."""
    folder, before = Path(tempfile.mkdtemp()), Path.cwd()
    variables = {"MEGATRAIN_CACHE": str(shared / "cache"), "HOME": str(folder)}
    try:
        os.chdir(folder)
        with mock.patch.dict(os.environ, variables):
            yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def completed(data: dict[str, Any], drawn: dict[str, Any], shared: Path) -> dict[str, Any]:
    """Fill in what a run needs besides the drawn values: files, and an end."""
    section = data["data"] if isinstance(data["data"], dict) else {}
    if section.get("kind") == "text" and section.get("path") is None:  # the standard library would take long
        section["path"] = str(shared / "text.jsonl")
    tokenizer = section.get("tokenizer")
    if isinstance(tokenizer, dict) and "data.tokenizer.path" not in drawn:
        files = {"huggingface": "hf", "tiktoken": "ranks.tiktoken"}
        if str(tokenizer.get("kind")) in files:
            tokenizer["path"] = str(shared / files[tokenizer["kind"]])
    if isinstance(data["optim"], dict) and "optim.weight_decay" not in drawn:
        data["optim"]["weight_decay"] = 0.0  # it would change weights that learn nothing
    if "train.steps" in drawn and "train.stop_at" not in drawn:
        data["train"]["stop_at"] = STEPS
    elif "train.steps" in drawn:  # one of the two must end the run
        data["train"]["steps"] = STEPS
    return data


def trained(cfg: Config) -> tuple[list[float], bool]:
    """Run `cfg` to its end as the command does; return the losses, and whether any weight changed."""
    limited = cfg.train.time_budget is not None  # and the process is older than this run
    assert run(cfg, Processes(), StopSignals()).exit_code in ((0, 75) if limited else (0,))
    directory = run_directory(cfg)
    written = read_config(directory)  # without `auto`
    assert (written.optim, written.model) == (cfg.optim, cfg.model)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row[key] for row in rows for key in ("train/loss", "eval/loss") if key in row]
    first = build_state(written, CPU).weights.parameters
    last = dict(restore_model(directory, CPU)[0].named_parameters())
    return losses, any(not torch.equal(weight.float(), last[name].float()) for name, weight in first.items())


def stepped(cfg: Config) -> tuple[list[float], bool]:
    """Do as `trained`, without the run directory and all that is written there."""
    memory = memory_bytes(CPU)
    cfg = with_layout(cfg, 1)
    require_memory(cfg, memory)
    cfg = resolve_auto(cfg, memory=memory)
    data = prepare(cfg.data, progress=lambda name, fraction: None, vocab_size=cfg.model.vocab_size)
    loader = build_loader(cfg, data.train, None)
    state = build_state(cfg, CPU)
    before = {name: weight.detach().clone() for name, weight in state.weights.parameters.items()}
    losses = []
    batches = loader.batches(0)
    for step in range(min(STEPS, cfg.train.steps)):
        lr = cfg.optim.lr * cfg.schedule.factor(step, cfg.train.steps)
        loss, norm, _ = train_step(state, next(batches), cfg, lr=lr, wants_stop=lambda: False).read()
        losses += [loss, norm]
    batches.close()
    if held_out := build_eval_batches(cfg, data.val):
        losses.append(evaluate(state.parallel, held_out[:1], data.token_bytes).loss)
    if not all(map(math.isfinite, losses)):
        raise DivergedError
    return losses, any(not torch.equal(state.weights.parameters[name], old) for name, old in before.items())


@pytest.mark.timeout(0 if EXAMPLES > 1000 else 300)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="VALUES_EXAMPLES" not in os.environ,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(seed=st.integers(0, 2**64 - 1))
def test_a_config_is_refused_or_trains(shared: Path, seed: int) -> None:
    data, drawn = case(seed)
    kinds = [data[section]["kind"] for section in ("model", "optim", "schedule")]
    print(seed, drawn, *kinds, flush=True)
    data = completed(data, drawn, shared)
    refusal: UserError | None = None
    with empty_folder(shared) as folder:
        try:
            cfg = load(Config, data)
            if n_params(cfg.model) > MOST_PARAMETERS:
                event("loaded")
                return
            losses, changed = (trained if needs_command(drawn) else stepped)(cfg)
        except DivergedError:
            losses, changed = [math.nan], True
        except UserError as error:
            refusal, written = error, [*folder.iterdir()]
    if refusal is not None:
        event("refused")
        assert (refusal.exit_code, written) == (2, []), refusal
        assert "None" not in str(refusal)
        return
    event("trained" if math.isfinite(losses[-1]) else "diverged")
    if all(map(is_ordinary, drawn.values())):
        assert all(map(math.isfinite, losses)), (drawn, losses)
        assert changed or cfg.optim.lr == 0, drawn
