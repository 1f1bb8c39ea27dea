"""Disturb small runs, and report by kind: `python -m tests.faults --seed 1 --count 300`."""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.campaign import Result, campaign
from faults.kinds import KINDS


def main() -> int:
    """Run the campaign; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="megatrain-faults-"))
    print(f"seed {options.seed}, {options.count} faults, in {folder}", flush=True)
    found: list[Result] = []
    for result in campaign(folder, seed=options.seed, count=options.count, kinds=options.kind):
        found.append(result)
        verdict = f"WRONG: {result.wrong}" if result.wrong else "good"
        line = f"{len(found):4d} {result.kind:12s} {result.layout:24s} {result.seconds:6.1f} s {result.codes}"
        print(f"{line} {verdict}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(_summary(found, options.seed, options.count), indent=1) + "\n")
    wrong = [each for each in found if each.wrong]
    print(f"{len(found)} faults, {len(wrong)} wrong")
    return 1 if wrong else 0


def _summary(found: list[Result], seed: int, count: int) -> dict[str, object]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"good": 0, "wrong": 0})
    for each in found:
        kinds[each.kind]["wrong" if each.wrong else "good"] += 1
    return {
        "command": f"python -m tests.faults --seed {seed} --count {count}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "faults": len(found),
        "kinds": kinds,
        "layouts": sorted({each.layout for each in found}),
        "seconds": round(sum(each.seconds for each in found), 1),
        "wrong": [asdict(each) for each in found if each.wrong],
    }


if __name__ == "__main__":
    sys.exit(main())
