"""What the project wants to reach on an H200, beside what was measured."""

from typing import Any

Row = dict[str, Any]
LONG = "llama3_8b_16k"
"""Causal, head size 128, 16k tokens."""


def is_ours(row: Row) -> bool:
    """Return whether a row is the project's own, not a public implementation's."""
    return str(row.get("implementation", "megatrain")).startswith("megatrain")


def _aim(text: str, values: list[float], wanted: float, *, least: bool = True) -> list[Row]:
    """Compare the worst of `values` with `wanted`, which all must reach (unless `least`: not exceed); none: no row."""
    if not values:
        return []
    worst = min(values) if least else max(values)
    return [{"aim": text, "measured": worst, "met": worst >= wanted if least else worst <= wanted}]


def _best(rows: list[Row], key: str) -> list[float]:
    """Return the best of our backends for each case."""
    found: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if is_ours(row) and row.get(key) is not None:
            case = (row["operation"], row["case"], row["passes"])
            found[case] = max(found.get(case, 0.0), row[key])
    return list(found.values())


def _to_flash(rows: list[Row]) -> list[float]:
    """Return how many times as fast as torch's flash backend our best is, for each case and pass that both have."""
    flash = {(r["case"], r["passes"]): r["ms"] for r in rows if r["implementation"] == "torch flash"}
    ours: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["case"], row["passes"])
        if is_ours(row) and key in flash:
            ours[key] = min(ours.get(key, float("inf")), row["ms"])
    return [flash[key] / ms for key, ms in ours.items()]


def _unfused(rows: list[Row], key: str) -> list[float]:
    """Divide the fused loss's time or memory by that of a product and a loss, case by case, both passes."""
    both = [row for row in rows if row["operation"] == "linear_cross_entropy" and row["passes"] == "both"]
    other = {row["case"]: row[key] for row in both if row["implementation"] == "torch eager" and row.get(key)}
    return [
        row[key] / other[row["case"]]
        for row in both
        if row["implementation"] == "megatrain auto" and row.get(key) and row["case"] in other
    ]


def aims(speeds: list[Row], training: list[Row]) -> list[Row]:
    """Return one row for each aim that there are figures for; the worst case counts."""
    attention = [row for row in speeds if row["operation"] == "attention"]
    long = [row for row in attention if row["case"] == LONG]
    memory = [row for row in speeds if row["flops"] == 0 and row["passes"] != "both"]
    found = []
    for passes, tflops in (("forward", 600), ("backward", 450)):
        text = f"attention {passes}, 16k tokens, head size 128, causal: {tflops} TFLOP/s"
        found += _aim(text, _best([r for r in long if r["passes"] == passes], "tflops"), tflops)
    found += _aim("attention: at least as fast as torch's flash backend (ratio)", _to_flash(attention), 1.0)
    found += _aim(
        "operations without products: 85 % of the copy bandwidth (share)", _best(memory, "share"), 0.85
    )
    text = "linear layer and cross entropy, fused: no slower than unfused (its time over theirs)"
    found += _aim(text, _unfused(speeds, "ms"), 1.0, least=False)
    text = "linear layer and cross entropy, fused: a tenth of the memory (its peak over theirs)"
    found += _aim(text, _unfused(speeds, "peak_bytes"), 0.1, least=False)
    for model, share in (("llama3_8b", 0.55), ("gpt2_124m", 0.45)):
        rows = [row for row in training if (row["model"], row["precision"]) == (model, "bf16")]
        values = [row["mfu_full"] for row in rows if row["mfu_full"] is not None]
        text = f"training {model} in bf16: {share:.0%} MFU, attention counted in full"
        found += _aim(text, values and [max(values)], share)
    return found
