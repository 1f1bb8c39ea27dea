"""`megatrain data`: prepare the tokens of a config, look at them, check them, and keep the caches in order."""

import dataclasses
import json
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.cli.actions import progress_display, run_action
from megatrain.cli.options import Options, Parser, parse_options
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded

if TYPE_CHECKING:
    from megatrain.data.cache import Cache
    from megatrain.data.prepare import Prepared
    from megatrain.observe.display import Display
    from megatrain.train.config import Config

SAMPLE_TOKENS = 60
"""Tokens of each document that `show --documents` decodes."""


def run(argv: list[str]) -> int:
    """Run one action on the data of a config, or on the caches; return the exit code."""
    actions: dict[str, Callable[[list[str]], int]]
    actions = {"prepare": _prepare, "show": _show, "verify": _verify, "ls": _ls, "prune": _prune}
    return run_action("data", actions, argv)


# --- actions ---


def _prepare(argv: list[str]) -> int:
    flags, words = _flags(argv, "--json")
    cfg, options = _config(words)
    if options.cfg:
        return _print_config(cfg, options)
    with progress_display(flags.json) as display:
        prepared = _prepared(cfg, display)
    if flags.json:
        contents = None if prepared.contents is None else prepared.contents.as_json()
        directory = None if prepared.directory is None else str(prepared.directory)
        print(
            json.dumps(
                {"directory": directory, "fingerprint": prepared.fingerprint, "contents": contents}, indent=1
            )
        )
        return 0
    from megatrain.data.clean.report import report_lines
    from megatrain.train.words import what_was_read

    print(what_was_read(prepared.contents))
    if prepared.contents is not None and prepared.contents.cleaning:
        print("\n".join(report_lines(prepared.contents.cleaning)))
    if prepared.directory is not None:
        print(f"The tokens are in {prepared.directory}.")
    return 0


def _show(argv: list[str]) -> int:
    flags, words = _flags(argv, "--json", "--sample", documents="0")
    if not flags.documents.isdecimal():
        raise UserError(f"data: --documents {flags.documents}: must be an integer of at least 0")
    directory, cfg = _directory(words, as_json=flags.json)
    if flags.sample and cfg is None:
        raise UserError(
            "data: --sample shows what a run trains on, so it needs the run's overrides, not a cache's name"
        )
    from megatrain.cli.data_text import summary_text
    from megatrain.data.summary import document_texts, first_sample, summarize
    from megatrain.observe.figures import visible

    summary = summarize(directory)
    documents = document_texts(directory, int(flags.documents), most_tokens=SAMPLE_TOKENS)
    sample = (
        []
        if cfg is None or not flags.sample
        else first_sample(directory, seq_len=cfg.seq_len, seed=cfg.train.seed)
    )
    if flags.json:
        print(
            json.dumps({**dataclasses.asdict(summary), "beginnings": documents, "sample": sample}, indent=1)
        )
        return 0
    print(summary_text(summary))
    for number, tokens, text in documents:
        more = " ..." if tokens > SAMPLE_TOKENS else ""
        print(f"\nDocument {number:,}, {tokens:,} tokens:\n{visible(text)}{more}")
    if sample:
        print(f"\nThe first sample of the run ({len(sample)} document{'s' * (len(sample) > 1)}):")
        print("\n--- another document ---\n".join(map(visible, sample)))
    return 0


def _verify(argv: list[str]) -> int:
    flags, words = _flags(argv, "--json", "--all")
    from megatrain.data.cache import list_caches, put_aside
    from megatrain.data.verify import verify

    if flags.all:
        root, names = _root(words)
        if names:
            raise UserError(f"data: --all checks all caches; leave out {' '.join(names)}")
        directories = [cache.directory for cache in list_caches(root) if cache.state != "unfinished"]
    else:
        directories = [_directory(words, as_json=flags.json)[0]]
    found = {}
    with progress_display(flags.json) as display:
        for directory in directories:
            found[directory] = verify(
                directory, progress=partial(display.phase, f"checking {directory.name}")
            )
    for directory, damages in found.items():
        if damages:
            put_aside(directory)
    if flags.json:
        print(
            json.dumps(
                {str(d): [dataclasses.asdict(x) for x in damages] for d, damages in found.items()}, indent=1
            )
        )
    else:
        for directory, damages in found.items():
            print(f"{directory}: {'damaged' if damages else 'whole'}")
            for damage in damages:
                place = "" if damage.offset is None else f", byte {damage.offset:,}"
                print(f"  {damage.file}{place}: {damage.what}")
        if any(found.values()):
            print(
                "What is damaged is not read any more, and built again when needed; `megatrain data prune` removes it."
            )
        elif not found:
            print("There are no token caches.")
    return 2 if any(found.values()) else 0


def _ls(argv: list[str]) -> int:
    flags, words = _flags(argv, "--json")
    root = _root_alone(words)
    from megatrain.cli.data_text import caches_text
    from megatrain.data.cache import list_caches

    caches = list_caches(root)
    if flags.json:
        print(json.dumps([_plain(cache) for cache in caches], indent=1))
    else:
        print(caches_text(caches, root, now=time.time()))
    return 0


def _prune(argv: list[str]) -> int:
    flags, words = _flags(argv, "--json", "--dry-run", unused_days=None)
    days = None if flags.unused_days is None else _days(flags.unused_days)
    root = _root_alone(words)
    from megatrain.cli.data_text import removals_text
    from megatrain.data.cache import prune

    removals = prune(root, unused_days=days, dry_run=flags.dry_run)
    if flags.json:
        rows = [{**_plain(r.cache), "reason": r.reason, "kept": r.failure} for r in removals]
        print(json.dumps({"dry_run": flags.dry_run, "removals": rows}, indent=1))
    else:
        print(removals_text(removals, root, dry_run=flags.dry_run))
    return 0


# --- command lines ---


def _flags(argv: list[str], *switches: str, **values: str | None) -> tuple[Namespace, list[str]]:
    """Return the flags of an action, some without and some with a value (here its default), and the other words."""
    parser = Parser("data")
    for name in switches:
        parser.add_argument(name, action="store_true")
    for name, default in values.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    return parser.parse_known_args(argv)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not 0 <= days < float("inf"):
        raise UserError(f"data: --unused-days {text}: must be a number of at least 0")
    return days


def _config(words: list[str]) -> tuple["Config", Options]:
    """Compose the config that the words describe."""
    from megatrain.cli.compose import Source, compose

    options = parse_options("data", words)
    if options.multirun:
        raise UserError("data: takes one config at a time; leave out --multirun")
    return compose(options.overrides, Source(options.config_dir, options.config_name)), options


def _print_config(cfg: "Config", options: Options) -> int:
    from megatrain.config.docs import json_schema
    from megatrain.config.text import to_yaml
    from megatrain.train.config import Config

    print(to_yaml(cfg) if options.cfg == "job" else json.dumps(json_schema(Config), indent=2), end="")
    return 0


def _root(words: list[str]) -> tuple[Path, list[str]]:
    """Return the directory of the caches, which `data.cache_dir=DIR` may name, and the other words."""
    from megatrain.data.store import cache_root

    key = "data.cache_dir="
    chosen = [word.removeprefix(key) for word in words if word.startswith(key)]
    root = cache_root(expanded(chosen[-1]) if chosen and chosen[-1] not in ("", "null") else None)
    return root, [word for word in words if not word.startswith(key)]


def _root_alone(words: list[str]) -> Path:
    root, rest = _root(words)
    if rest:
        raise UserError(f"data: takes data.cache_dir=DIR and flags here, not {' '.join(rest)}")
    return root


def _directory(words: list[str], *, as_json: bool) -> tuple[Path, "Config | None"]:
    """Return the cache that the words name, or that of the config they describe, which is built if need be."""
    names = [word for word in words if "=" not in word and not word.startswith(("-", "~"))]
    root, rest = _root(words)
    if names and rest == names[:1]:
        from megatrain.data.cache import find_cache

        return find_cache(root, names[0]), None
    if names and not any(word.startswith("-") for word in words):
        raise UserError(
            f"data: give the name of one cache ({names[0]}), or overrides, not both: {' '.join(rest)}"
        )
    cfg, options = _config(words)
    if options.cfg:
        raise UserError("data: --cfg prints a config; write `megatrain data prepare --cfg job ...`")
    if cfg.data.kind == "synthetic":
        raise UserError(
            "data=synthetic: random tokens are made as they are read; there is no cache to look at"
        )
    with progress_display(as_json) as display:
        directory = _prepared(cfg, display).directory
    assert directory is not None
    return directory, cfg


def _prepared(cfg: "Config", display: "Display") -> "Prepared":
    from megatrain.data.prepare import prepare
    from megatrain.train.auto import resolve_data

    return prepare(resolve_data(cfg), progress=display.phase, vocab_size=cfg.model.vocab_size)


def _plain(cache: "Cache") -> dict[str, Any]:
    """Return a cache for JSON, with times as ISO 8601."""
    row = dataclasses.asdict(cache) | {"directory": str(cache.directory)}
    return row | {
        key: datetime.fromtimestamp(row[key], UTC).isoformat(timespec="seconds")
        for key in ("created", "last_used")
    }
