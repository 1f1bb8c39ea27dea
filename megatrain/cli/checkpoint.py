"""`megatrain checkpoint`: look into checkpoints, check and compare them, and keep, copy or consolidate them."""

import dataclasses
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.actions import progress_display, run_action, strict_json
from megatrain.cli.options import Parser
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.config.paths import expanded
from megatrain.runtime.urls import is_url

KINDS = ("weights", "optimizer", "average")
DIFFERENT = 1
"""Exit code of a comparison that found a difference, as diff(1) has it."""


def run(argv: list[str]) -> int:
    """Run one action; return the exit code."""
    actions: dict[str, Callable[[list[str]], int]]
    actions = {"ls": _ls, "show": _show, "verify": _verify, "diff": _diff, "prune": _prune}
    actions |= {"copy": _copy, "consolidate": _consolidate, "decrypt": _decrypt}
    return run_action("checkpoint", actions, argv)


def _ls(argv: list[str]) -> int:
    flags = _parsed(argv, "run")
    from megatrain.checkpoint.listing import checkpoint_directory, list_checkpoints
    from megatrain.checkpoint.tier import Tier
    from megatrain.checkpoint.tier_listing import list_tier
    from megatrain.cli.checkpoint_text import list_text

    place = flags.run if isinstance(flags.run, str) else checkpoint_directory(flags.run)
    found = list_tier(Tier(place)) if isinstance(place, str) else list_checkpoints(place)
    if flags.json:
        _print_json([_plain(each) for each in found])
    else:
        print(list_text(found, place))
    return 0


def _show(argv: list[str]) -> int:
    flags = _parsed(argv, "checkpoint")
    from megatrain.checkpoint.inspect import open_checkpoint
    from megatrain.cli.checkpoint_text import describe, show_text

    facts = describe(open_checkpoint(_newest(flags.checkpoint)))
    if flags.json:
        _print_json(facts)
    else:
        print(show_text(facts))
    return 0


def _verify(argv: list[str]) -> int:
    flags = _parsed(argv, "checkpoints", many=True)
    from megatrain.checkpoint.fetching import split_address
    from megatrain.checkpoint.inspect import Verified, verify
    from megatrain.checkpoint.listing import find_checkpoints
    from megatrain.checkpoint.tier import Tier
    from megatrain.checkpoint.tier_upkeep import verify_tier
    from megatrain.cli.checkpoint_text import verify_text

    places = flags.checkpoints
    paths = {
        each: find_checkpoints(each) for each in places if isinstance(each, Path)
    }  # before the first is read
    found: list[Verified] = []
    with progress_display(flags.json) as display:
        for each in places:
            if isinstance(each, Path):
                found += [verify(path, progress=display.phase) for path in paths[each]]
            else:
                run, step = split_address(each)
                found += verify_tier(Tier(run), step, progress=display.phase)
    if flags.json:
        _print_json([_plain(each) | {"state": each.state} for each in found])
    else:
        print(verify_text(found))
    states = {each.state for each in found}
    if "damaged" in states:
        return DamagedCheckpointError.exit_code
    return UserError.exit_code if "unknown" in states else 0


def _diff(argv: list[str]) -> int:
    flags = _parsed(argv, "a", "b", only=True, rtol=True)
    from megatrain.checkpoint.compare import compare
    from megatrain.checkpoint.inspect import open_checkpoint, require_whole
    from megatrain.cli.checkpoint_text import comparison_json, comparison_text

    a, b = _newest(flags.a), _newest(flags.b)
    with progress_display(flags.json) as display:
        for path in (a, b):
            require_whole(path, progress=display.phase)
        found = compare(
            open_checkpoint(a),
            open_checkpoint(b),
            progress=display.phase,
            rtol=flags.rtol,
            only=flags.only or "",
        )
    if flags.json:
        _print_json({"a": str(a), "b": str(b), **comparison_json(found)})
    else:
        print(comparison_text(found, str(a), str(b)))
    return 0 if found.equal else DIFFERENT


def _prune(argv: list[str]) -> int:
    flags = _parsed(argv, "run", prune=True)
    from megatrain.checkpoint.listing import checkpoint_directory
    from megatrain.checkpoint.tier import Tier
    from megatrain.checkpoint.tier_upkeep import prune_tier
    from megatrain.checkpoint.upkeep import prune_checkpoints
    from megatrain.cli.checkpoint_text import removals_text

    place = flags.run if isinstance(flags.run, str) else checkpoint_directory(flags.run)
    with progress_display(flags.json) as display:
        if isinstance(place, str):
            removals = prune_tier(Tier(place), flags.keep, dry_run=flags.dry_run, progress=display.phase)
        else:
            removals = prune_checkpoints(place, flags.keep, dry_run=flags.dry_run, progress=display.phase)
    if flags.json:
        _print_json({"dry_run": flags.dry_run, "removals": [_plain(each) for each in removals]})
    else:
        print(removals_text(removals, place, dry_run=flags.dry_run))
    return 0


def _copy(argv: list[str]) -> int:
    flags = _parsed(argv, "checkpoint", "directory")
    from megatrain.checkpoint.tier_upkeep import copy_anywhere
    from megatrain.checkpoint.upkeep import copy_checkpoint

    source, target = flags.checkpoint, flags.directory
    if isinstance(source, Path):
        source = _newest(source)
    with progress_display(flags.json) as display:
        if isinstance(source, Path) and isinstance(target, Path):
            target = copy_checkpoint(source, target, progress=display.phase)
        else:
            target = copy_anywhere(str(source), str(target), progress=display.phase)
    if flags.json:
        _print_json({"source": str(source), "copy": str(target)})
    else:
        print(f"{target}: a copy of {source}; every hash is right")
    return 0


def _consolidate(argv: list[str]) -> int:
    flags = _parsed(argv, "checkpoint", "out", only=True, shards=True)
    from megatrain.checkpoint.upkeep import consolidate
    from megatrain.observe.figures import byte_size

    if isinstance(flags.out, str):
        raise UserError(f"checkpoint: consolidate writes to a path of this machine, not to {flags.out}")
    source = _newest(flags.checkpoint)
    with progress_display(flags.json) as display:
        done = consolidate(
            source,
            flags.out,
            only=flags.only or "",
            shard_bytes=int(flags.shard_gb * 1e9),
            progress=display.phase,
        )
    if flags.json:
        _print_json({"source": str(source), "out": str(flags.out), **dataclasses.asdict(done)})
    else:
        files = f"{done.files} file{'s' * (done.files != 1)}"
        print(f"{flags.out}: {done.tensors:,} tensors of {source}, {byte_size(done.bytes)} in {files}")
    return 0


def _decrypt(argv: list[str]) -> int:
    flags = _parsed(argv, "source", "directory")
    from megatrain.checkpoint.decrypt import decrypt_checkpoint, decrypt_directory

    if isinstance(flags.directory, str):
        raise UserError(f"checkpoint: decrypt writes to a path of this machine, not to {flags.directory}")
    target = flags.directory
    with progress_display(flags.json) as display:
        if isinstance(flags.source, Path) and any(flags.source.glob("*.enc")):
            decrypt_directory(flags.source, target, progress=display.phase)
        else:
            target = decrypt_checkpoint(_newest(flags.source), target, progress=display.phase)
    if flags.json:
        _print_json({"source": str(flags.source), "copy": str(target)})
    else:
        print(f"{target}: a plain copy of {flags.source}; anyone who can read it can read the weights")
    return 0


# --- command lines and output ---


def _parsed(argv: list[str], *places: str, many: bool = False, **extras: bool) -> Namespace:
    """Parse the words of an action: paths and URLs, `--json`, and the flags of `extras` (only, rtol, prune, shards)."""
    parser = Parser("checkpoint")
    for place in places:
        parser.add_argument(place, type=_place, nargs="+" if many else None)
    parser.add_argument("--json", action="store_true")
    if extras.get("only"):
        parser.add_argument("--only", choices=KINDS)
    if extras.get("rtol"):
        parser.add_argument("--rtol", type=float, default=0.0)
    if extras.get("prune"):
        parser.add_argument("--keep", type=int, required=True)
        parser.add_argument("--dry-run", action="store_true")
    if extras.get("shards"):
        parser.add_argument("--shard-gb", type=float, default=5.0)
    flags = parser.parse_intermixed_args(argv)
    if not 0 <= getattr(flags, "rtol", 0.0) < math.inf:
        raise UserError(f"checkpoint: --rtol {flags.rtol}: must be finite and at least 0")
    if not 0 < getattr(flags, "shard_gb", 1.0) < math.inf:
        raise UserError(f"checkpoint: --shard-gb {flags.shard_gb}: must be finite and above 0")
    return flags


def _place(text: str) -> Path | str:
    """Return a path, or the text of a URL."""
    return text if is_url(text) else Path(expanded(text))


def _newest(place: Path | str) -> Path:
    """Return the checkpoint at `place`, or the newest one of the run there; a URL's is fetched into the cache."""
    from megatrain.checkpoint.fetching import cached_checkpoint
    from megatrain.checkpoint.listing import find_checkpoints

    if isinstance(place, Path):
        return find_checkpoints(place)[-1]
    with progress_display(as_json=False) as display:
        path, warnings = cached_checkpoint(place, progress=display.phase)
    for warning in warnings:
        print(warning, file=sys.stderr)
    return path


def _plain(value: Any) -> dict[str, Any]:
    """Return a dataclass that has a path for JSON."""
    return dataclasses.asdict(value) | {"path": str(value.path)}


def _print_json(value: Any) -> None:
    print(json.dumps(strict_json(value), indent=1, allow_nan=False))
