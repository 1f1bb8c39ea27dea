"""What the project wants to reach on an H200, beside what was measured.

Only the project's own kernels count. "megatrain auto" is a choice among these and PyTorch's: it stands beside them and
meets no aim. The worst case counts, and an aim without figures is listed as not measured.
"""

from collections.abc import Callable, Iterable
from typing import Any

from megatrain_kernels.kernel import KERNELS

Row = dict[str, Any]
LONG = "llama3_8b_16k"
"""Causal, head size 128, 16k tokens."""
AUTO = "megatrain auto"
LLAMA_VOCAB = 128256
Key = tuple[str, str, str]
"""Operation, case and passes."""


def is_ours(row: Row) -> bool:
    """Return whether a row is the project's, by its own kernels or by its choice among others'."""
    return str(row.get("implementation", "megatrain")).startswith("megatrain")


def is_own(row: Row) -> bool:
    """Return whether a row is of a kernel of the project."""
    return is_ours(row) and row.get("implementation") != AUTO


def _aim(text: str, values: Iterable[float], wanted: float, *, least: bool = True) -> Row:
    """Compare the worst of `values` with `wanted`, which all must reach (unless `least`: not exceed)."""
    found = list(values)
    if not found:
        return {"aim": text, "wanted": wanted, "measured": None, "met": None, "cases": 0}
    worst = min(found) if least else max(found)
    met = worst >= wanted if least else worst <= wanted
    return {"aim": text, "wanted": wanted, "measured": worst, "met": met, "cases": len(found)}


def _own(rows: list[Row], key: str, better: Callable[..., float]) -> dict[Key, float]:
    """Return the figure of the best of our own kernels for each case that has it."""
    found: dict[Key, float] = {}
    for row in rows:
        if is_own(row) and row.get(key) is not None:
            case = (row["operation"], row["case"], row["passes"])
            found[case] = better(found[case], row[key]) if case in found else row[key]
    return found


def _of(rows: list[Row], implementation: str, key: str) -> dict[Key, float]:
    """Return another implementation's figure for each case that has it."""
    return {
        (row["operation"], row["case"], row["passes"]): row[key]
        for row in rows
        if row["implementation"] == implementation and row.get(key)
    }


def _over(ours: dict[Key, float], theirs: dict[Key, float]) -> list[float]:
    """Divide ours by theirs, where both have a case."""
    return [value / theirs[key] for key, value in ours.items() if key in theirs]


def _cases(operation: str, wanted: Callable[[Any], bool]) -> set[str]:
    return {case.name for case in KERNELS[operation].suite.cases if wanted(case)}


def _single(rows: list[Row]) -> list[Row]:
    """Return the rows of the passes forward and backward, without those of both together."""
    return [row for row in rows if row["passes"] != "both"]


def _named(rows: list[Row], cases: set[str]) -> list[Row]:
    return [row for row in rows if row["case"] in cases]


def _attention(rows: list[Row]) -> list[Row]:
    rows = _single([row for row in rows if row["operation"] == "attention"])
    found = []
    for passes, tflops in (("forward", 640), ("backward", 540)):
        long = [row for row in _named(rows, {LONG}) if row["passes"] == passes]
        text = f"attention {passes}, 16k tokens, head size 128, causal: {tflops} TFLOP/s"
        found.append(_aim(text, _own(long, "tflops", max).values(), tflops))
    narrow = _named(rows, _cases("attention", lambda case: case.sizes["head_dim"] == 64))
    ratios = _over(_of(narrow, "torch cuDNN", "ms"), _own(narrow, "ms", min))
    found.append(_aim("attention, head size 64: within 5 % of cuDNN (times as fast)", ratios, 0.95))
    whole = {(passes): value for (_, _, passes), value in _own(_named(rows, {LONG}), "tflops", max).items()}
    for option, word in (("documents", "documents"), ("window", "windows")):
        masked = _named(rows, _cases("attention", lambda case, name=option: name in case.options))
        shares = [
            value / whole[key[2]] for key, value in _own(masked, "tflops", max).items() if key[2] in whole
        ]
        text = f"attention with {word}: 90 % of the TFLOP/s of the same work unmasked (share)"
        found.append(_aim(text, shares, 0.9))
    ratios = _over(_of(rows, "torch flash", "ms"), _own(rows, "ms", min))
    found.append(_aim("attention: never slower than torch's flash backend (times as fast)", ratios, 1.0))
    return found


def _grouped(rows: list[Row]) -> list[Row]:
    rows = _single([row for row in rows if row["operation"] == "grouped_gemm"])
    uneven = _cases("grouped_gemm", lambda case: bool(case.options.get("skew")))
    found = []
    for cases, word, share in (
        (_cases("grouped_gemm", lambda _: True) - uneven, "even", 0.9),
        (uneven, "uneven", 0.8),
    ):
        chosen = _named(rows, cases)
        shares = _over(_of(chosen, "one dense product", "ms"), _own(chosen, "ms", min))
        text = (
            f"grouped product, {word} groups: {100 * share:.0f} % of a dense product of the same size (share)"
        )
        found.append(_aim(text, shares, share))
    return found


def _fused_loss(rows: list[Row]) -> list[Row]:
    rows = [row for row in rows if row["operation"] == "linear_cross_entropy" and row["passes"] == "both"]
    found = []
    for peer in ("torch eager", "torch.compile", "Liger"):
        text = f"linear layer and cross entropy, fused: no slower than {peer} (its time over theirs)"
        found.append(_aim(text, _over(_own(rows, "ms", min), _of(rows, peer, "ms")), 1.0, least=False))
    llama = _named(rows, _cases("linear_cross_entropy", lambda case: case.sizes["vocab"] == LLAMA_VOCAB))
    ratios = _over(_own(llama, "peak_bytes", min), _of(llama, "torch eager", "peak_bytes"))
    text = "linear layer and cross entropy, fused, Llama's vocabulary: a tenth of the memory (its peak over theirs)"
    return [*found, _aim(text, ratios, 0.1, least=False)]


def _training(rows: list[Row]) -> list[Row]:
    """Judge training on packed documents by the FLOPs that their masks leave; compiled or not is ours to choose."""
    packed = [row for row in rows if row.get("documents") and "tokens_per_sec" in row]
    found = []
    for model, share in (("gpt2_124m", 0.5), ("llama3_8b", 0.6), ("llama3_1b", 0.6)):
        values = [
            row["mfu_needed"]
            for row in packed
            if (row["model"], row["precision"]) == (model, "bf16") and row["mfu_needed"] is not None
        ]
        text = f"training {model} in bf16 on packed documents: {100 * share:.0f} % MFU of the FLOPs that masks leave"
        found.append(_aim(text, [max(values)] if values else [], share))
    rates = {
        precision: max(
            (
                (row["tokens_per_sec"], row["layers"])
                for row in packed
                if (row["model"], row["precision"]) == ("llama3_8b", precision)
            ),
            default=None,
        )
        for precision in ("bf16", "fp8")
    }
    bf16, fp8 = rates["bf16"], rates["fp8"]
    comparable = bf16 is not None and fp8 is not None and bf16[1] == fp8[1]  # of as many layers
    text = "training llama3_8b in fp8 on packed documents: 1.3 times the tokens/s of bf16"
    found.append(_aim(text, [fp8[0] / bf16[0]] if comparable and bf16 and fp8 else [], 1.3))
    for name, limit in (("cold", 20.0), ("warm", 5.0)):
        seconds = [row[f"{name}_s"] for row in rows if row.get("measure") == "first_step"]
        text = f"first step of GPT-2 124M, caches {name}: within {limit:.0f} s"
        found.append(_aim(text, seconds, limit, least=False))
    return found


def aims(speeds: list[Row], training: list[Row]) -> list[Row]:
    """Return one row for each aim; the worst case counts."""
    memory = _single([row for row in speeds if row["flops"] == 0])
    steps = [row for row in speeds if row["operation"] == "orthogonalize" and row["passes"] == "forward"]
    halves = _over(_own(steps, "ms", min), _of(steps, "torch eager", "ms"))
    return [
        *_attention(speeds),
        _aim(
            "operations without products: 85 % of the copy bandwidth (share)",
            _own(memory, "share", max).values(),
            0.85,
        ),
        *_grouped(speeds),
        *_fused_loss(speeds),
        _aim(
            "Newton-Schulz: half the time of the plain products (its time over theirs)",
            halves,
            0.5,
            least=False,
        ),
        *_training(training),
    ]


def choices(speeds: list[Row]) -> list[Row]:
    """Return what "auto" took in each case and its time, beside our own kernel's: shown, and counted nowhere."""
    own = _own(speeds, "ms", min)
    return [
        {
            **{key: row[key] for key in ("operation", "case", "passes", "ms")},
            "took": row.get("took"),
            "own_ms": own.get((row["operation"], row["case"], row["passes"])),
        }
        for row in speeds
        if row["implementation"] == AUTO
    ]
