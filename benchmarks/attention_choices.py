"""Write what a GPU's measurement says of attention into the table that "auto" chooses by.

    python -m benchmarks.attention_choices benchmarks/results/h100-2026-11-27/gpu.json

The device's former rows are replaced. A path counts where it ran both passes of a case; torch's is its fastest backend.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatrain_kernels.flash_attention.cases import CASES
from megatrain_kernels.flash_attention.choices import mask_of
from megatrain_kernels.flash_attention.reference import Rule

TABLE = Path(__file__).parents[1] / "kernels/megatrain_kernels/flash_attention/choices.json"
PATHS = {
    "torch cuDNN": "torch", "torch flash": "torch", "megatrain triton": "triton",
    "megatrain triton_fused": "triton_fused", "megatrain triton_hopper": "triton_hopper",
}  # fmt: skip
CAPABILITIES = {"A100": [8, 0], "H100": [9, 0], "H200": [9, 0], "B200": [10, 0]}


def cases_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each case that two paths or more were timed on."""
    known = {case.name: case for case in CASES}
    times: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        path = PATHS.get(row.get("implementation", ""))
        timed = row.get("part") == "speed" and row["error"] is None and row.get("passes") == "both"
        if (
            row.get("operation") == "attention"
            and timed
            and path
            and "q_offset" not in known[row["case"]].options
        ):
            of_case = times.setdefault(row["case"], {})
            of_case[path] = min(row["ms"], of_case.get(path, float("inf")))
    found = []
    for name, ms in times.items():
        sizes, options = known[name].sizes, dict(known[name].options)
        documents = bool(options.pop("documents", 0))
        rule = Rule(
            **{"causal": True, "scale": 1.0, "window": None, "softcap": None, "q_offset": 0} | options
        )
        kind = {"mask": mask_of(documents, rule)} | {
            key: sizes[key] for key in ("head_dim", "v_dim", "k_seq")
        }
        if len(ms) > 1:
            found.append(
                {"case": name, **kind, "ms": {path: round(each, 4) for path, each in sorted(ms.items())}}
            )
    return found


def main() -> None:
    """Replace the device's rows in the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="gpu.json of `python -m benchmarks.gpu`")
    path = parser.parse_args().result
    if not path.is_file():
        parser.error(f"{path}: there is no such file")
    result = json.loads(path.read_text())
    device = result["machine"]["device"]
    capability = next((value for name, value in CAPABILITIES.items() if name in device), None)
    if capability is None:
        parser.error(f"{path}: {device}: not one of {', '.join(CAPABILITIES)}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"devices": []}
    others = [each for each in table["devices"] if each["device"] != device]
    about = {
        "device": device,
        "capability": capability,
        "date": result["date"][:10],
        "source": path.as_posix(),
    }
    versions = {name: result["machine"][name] for name in ("torch", "triton")}
    table["devices"] = [*others, {**about, **versions, "cases": cases_of(result)}]
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
