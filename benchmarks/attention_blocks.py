"""Fill the table of block sizes that is shipped for attention, from builds or from a GPU's timings.

    python -m benchmarks.attention_blocks --builds benchmarks/results/attention_builds/*.json
    python -m benchmarks.attention_blocks --timed DIR/attention_blocks.json --device "NVIDIA H100 80GB HBM3"

From builds, the first blocks are taken that spill nothing, in every version of Triton that was tried, where no mask is
needed. Timings, which `megatrain bench --tune` and `python -m benchmarks.gpu` make, come before builds.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatrain_kernels.flash_attention.triton_blocks import Sizes, Use, space

SHAPES = {
    "gpt2_124m": (12, 12, 64),
    "llama3_1b": (32, 8, 64),
    "llama3_8b": (32, 8, 128),
    "heads_of_128": (16, 16, 128),
}
"""Heads, key heads and head size."""
TABLE = Path(__file__).parents[1] / "kernels/megatrain_kernels/flash_attention/blocks.json"
Row = dict[str, Any]


def from_builds(paths: list[Path]) -> list[Row]:
    """Return the blocks of each use that compile best."""
    spills: dict[Use, dict[Sizes, int]] = defaultdict(dict)
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            heads, kv_heads, dim = SHAPES[row["shape"]]
            if row["kind"].startswith("hopper"):
                continue
            capability = divmod(row.get("capability", 90), 10)
            use = Use(capability, row["kind"], dim, row["mask"], heads > kv_heads, 1)
            sizes = row["block_m"], row["block_n"], row["warps"], row["stages"]
            bad = (
                row["loop_spills"]
                + 1000 * row["serialized"]
                + 1000 * (capability[0] >= 9) * (row["products"] == 0)
            )
            spills[use][sizes] = max(bad, spills[use].get(sizes, 0))
    found = []
    for use, tried in sorted(spills.items()):
        order = [sizes for sizes in space(use.kind, use.width, 2) if sizes in tried]
        found.append({**use._asdict(), "blocks": min(order, key=tried.__getitem__), "how": "compiled"})
    return found


def _fits(row: Row) -> bool:
    """Return whether a row names a use, and blocks that it may have."""
    try:
        use = Use(tuple(row["capability"]), *(row[name] for name in Use._fields[1:]))
        return tuple(row["blocks"]) in space(use.kind, use.width, 2)
    except (KeyError, TypeError):
        return False


def main() -> None:
    """Replace the table's rows of one kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--builds", nargs="+", type=Path)
    parser.add_argument("--timed", type=Path)
    parser.add_argument("--device", help="the GPU that --timed is of")
    options = parser.parse_args()
    if not options.builds and not options.timed:
        parser.error("give --builds or --timed")
    if options.timed and not options.device:
        parser.error("--timed needs --device, which its rows name")
    for path in (*(options.builds or ()), *([options.timed] if options.timed else ())):
        if not path.is_file():
            parser.error(f"{path}: there is no such file")
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    if options.builds:
        rows = [row for row in rows if row["how"] != "compiled"] + from_builds(options.builds)
    if options.timed:
        how = f"timed on {options.device}"
        read = json.loads(options.timed.read_text())["rows"]
        wrong = [row for row in read if not _fits(row)]
        if wrong or not read:
            parser.error(
                f"{options.timed}: {wrong[0] if wrong else 'no rows'}: not what megatrain bench --tune writes"
            )
        timed = [{**row, "how": how} for row in read]
        rows = timed + [row for row in rows if row["how"] != how]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    TABLE.write_text(f'{{"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
