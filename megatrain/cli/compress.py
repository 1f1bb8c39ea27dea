"""`megatrain compress`: a smaller model from a run, or from a Hugging Face directory."""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.cli.actions import progress_display, run_here, strict_json
from megatrain.cli.options import Parser
from megatrain.compress.methods import METHODS, Pruning, Quantization, Sparsity
from megatrain.config.errors import UserError
from megatrain.config.nearest import nearest
from megatrain.config.paths import expanded
from megatrain.runtime.packages import require_package
from megatrain.runtime.processes import Processes

if TYPE_CHECKING:
    from megatrain.compress.report import Measure
    from megatrain.compress.run import Compressed, Plan
    from megatrain.compress.text import HeldOut
    from megatrain.train.inference import TrainedModel

Progress = Callable[[str, float], None]
BELONGS = {
    "group": (Quantization, "a quantization to int4"),
    "head": (Quantization, "a quantization"),
    "sparsity": (Sparsity, "magnitude or wanda"),
    "heads": (Pruning, "--method prune"),
    "ffn": (Pruning, "--method prune"),
}
"""Flag -> methods that it belongs to."""


def run(argv: list[str]) -> int:
    """Compress, write, measure and print a table; return the exit code."""
    options = _parser().parse_intermixed_args(argv)
    _check(options)
    _require_new(options)
    with progress_display(False) as display:
        found = _compress(options, display.phase)
    text = json.dumps(strict_json(found), indent=1, ensure_ascii=False, allow_nan=False)
    print(as_table(found), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json == "-":
        print(text)
    elif options.json is not None:
        path = Path(expanded(options.json))
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"compress: --json {path}: {error.strerror}") from None
    return 0


def _parser() -> Parser:
    parser = Parser("compress")
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--method", required=True)
    parser.add_argument("--group", type=int)
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--ffn", type=int)
    parser.add_argument("--head", action="store_true", default=None)
    parser.add_argument("--calibration", metavar="PATH")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--format", default="hf", choices=("hf", "gguf"))
    parser.add_argument("--dtype", default="fp16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--text", action="append", default=[], metavar="PATH")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--average", action=argparse.BooleanOptionalAction)
    return parser


def _check(options: Namespace) -> None:
    """Refuse what is wrong whatever the model is.

    Raises:
        UserError: there is no such method, a flag is another method's, or a number is out of its range.
    """
    if options.method not in METHODS:
        near = nearest(options.method, METHODS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"compress: there is no method '{options.method}'.{hint} Methods: {', '.join(METHODS)}."
        )
    method = METHODS[options.method]
    for flag, (family, said) in BELONGS.items():
        fits = isinstance(method, family)
        if flag == "group":
            fits = isinstance(method, Quantization) and method.is_grouped
        if flag == "sparsity":
            fits = isinstance(method, Sparsity) and not method.is_two_of_four
        if getattr(options, flag) is not None and not fits:
            raise UserError(f"compress: --{flag} belongs to {said}, not to --method {options.method}")
    if options.calibration is not None and not method.needs_text:
        raise UserError(f"compress: --calibration: --method {options.method} needs no text")
    if options.samples < 1:
        raise UserError(f"compress: --samples {options.samples}: must be at least 1")


def _compress(options: Namespace, progress: Progress) -> dict[str, Any]:
    from megatrain.compress.report import facts_of, int8_speed, on_disk, sizes, zeros
    from megatrain.compress.run import compress

    source, method = run_here(options.run), METHODS[options.method]
    plan = _plan(options, source)
    trained = _load(source, options)
    text = _own_text(trained, options, progress)
    batches = _calibration(options, trained, text) if method.needs_text else []
    measure = _measure(options, text, progress)
    progress("measuring before", 0.0)
    before = facts_of(trained, measure)
    progress("compressing", 0.0)
    done = compress(trained, plan, batches, progress)
    found: dict[str, Any] = {
        "model": options.run,
        "step": trained.step,
        "out": options.out,
        "method": options.method,
    }
    found |= _settings(plan, options, len(batches))
    found["bytes"] = sizes(done, plan, before["parameters"])
    with _new_output(options) as partial:
        found["bytes"]["tensors"] = _write(partial, done, options)
        found["bytes"]["on_disk"] = on_disk(partial)
        progress("measuring after", 0.0)
        found |= {"before": before, "after": facts_of(done.trained, measure)}
        if isinstance(method, Sparsity):
            found["zeros"] = zeros(done, plan)
        fast = int8_speed(done, plan)
        if fast is not None:
            found["after_in_int8"] = fast
    return found


def _require_new(options: Namespace) -> None:
    """Refuse an output that exists, and a format whose package is missing.

    Raises:
        UserError: it does, or is.
    """
    if options.format == "gguf":
        require_package("gguf", "compress --format gguf")
        from megatrain.compress.new_file import require_new_file

        require_new_file(Path(expanded(options.out)))
        return
    from megatrain.train.hf_files import require_new

    require_new(Path(expanded(options.out)))


def _new_output(options: Namespace) -> AbstractContextManager[Path]:
    """Return what makes the new file or directory."""
    from megatrain.compress.new_file import new_file
    from megatrain.train.hf_files import new_directory

    target = Path(expanded(options.out))
    return new_file(target) if options.format == "gguf" else new_directory(target)


def _write(place: Path, done: "Compressed", options: Namespace) -> int:
    """Write the model; return the bytes of its tensors."""
    from megatrain.compress.write_gguf import write_gguf
    from megatrain.compress.write_hf import write_hf

    method = METHODS[options.method]
    if options.format == "gguf":
        return write_gguf(place, done.trained, done.codes, Path(options.out).stem)
    quantization = method if isinstance(method, Quantization) else None
    return write_hf(place, done.trained, done.codes, quantization, options.dtype)


def _plan(options: Namespace, source: Path) -> "Plan":
    """Check everything against the model's config, before its weights are read."""
    from megatrain.compress.run import make_plan
    from megatrain.compress.write_gguf import require_gguf
    from megatrain.compress.write_hf import require_expressible
    from megatrain.parallel.config import ParallelConfig
    from megatrain.train.inference import config_for_inference

    cfg = config_for_inference(source, ParallelConfig(), options.average)
    if cfg.lora.rank:
        raise UserError(
            f"compress: {options.run} trains adapters. Merge them first: megatrain export {options.run} DIRECTORY "
            "--merge"
        )
    method = METHODS[options.method]
    plan = make_plan(
        cfg.model,
        method,
        group=options.group,
        head=bool(options.head),
        dtype=options.dtype,
        sparsity=0.5 if options.sparsity is None else options.sparsity,
        heads=options.heads,
        ffn=options.ffn,
    )
    if options.format == "gguf":
        group = None if plan.grid is None else plan.grid.group
        require_gguf(plan.model, plan.names, method, group=group, dtype=options.dtype)
    else:
        require_expressible(plan.model, plan.names, method if isinstance(method, Quantization) else None)
    return plan


def _load(source: Path, options: Namespace) -> "TrainedModel":
    from megatrain.train.inference import load_trained

    return load_trained(source, Processes(), average=options.average)


def _own_text(trained: "TrainedModel", options: Namespace, progress: Progress) -> "HeldOut | None":
    from megatrain.compress.text import held_out

    needs_own = METHODS[options.method].needs_text and options.calibration is None
    return (
        held_out(trained, samples=options.samples, progress=progress)
        if needs_own or not options.text
        else None
    )


def _calibration(options: Namespace, trained: "TrainedModel", text: "HeldOut | None") -> list[Any]:
    from megatrain.compress.text import text_of

    if options.calibration is not None:
        return text_of(expanded(options.calibration), trained, samples=options.samples)
    if text is None or not text.calibration:
        raise UserError(
            f"compress: --method {options.method} needs calibration text, and {options.run} has none of its own: add "
            "--calibration PATH, with text like that on which the model will be used"
        )
    return text.calibration


def _measure(options: Namespace, text: "HeldOut | None", progress: Progress) -> "Measure | None":
    """Return what measures the model on the text of `--text`, or on what the run has held out, if there is any."""
    from megatrain.compress.report import on_held_out
    from megatrain.evaluate.perplexity import perplexity
    from megatrain.train.scoring import Scorer

    if not options.text:
        return on_held_out(text) if text is not None and text.measured else None
    paths = [expanded(each) for each in options.text]

    def measure(trained: "TrainedModel") -> dict[str, Any]:
        return perplexity(Scorer(trained), paths, field="text", stride=trained.context, progress=progress)

    return measure


def _settings(plan: "Plan", options: Namespace, n_batches: int) -> dict[str, Any]:
    """Return the settings of the method, as they were used."""
    found: dict[str, Any] = {"dtype": options.dtype}
    if plan.grid is not None:
        found["group"] = plan.grid.group
    if isinstance(plan.method, Sparsity):
        found["sparsity"] = 0.5 if plan.method.is_two_of_four else plan.sparsity
    if isinstance(plan.method, Pruning):
        found |= {"heads": plan.model.n_heads, "ffn": plan.model.ffn_size}
    if n_batches:
        found["calibration"] = options.calibration or "the run's own text"
    return found


def as_table(found: dict[str, Any]) -> str:
    """Return the report as text: each figure before, after, and by how much it changed."""
    step = "" if found["step"] is None else f", step {found['step']}"
    settings = [f"{name} {found[name]}" for name in ("group", "sparsity", "heads", "ffn") if found.get(name)]
    lines = [f"{found['model']}{step} -> {found['out']}: {', '.join([found['method'], *settings])}"]
    before, after, size = found["before"], found["after"], found["bytes"]
    lines.append(f"  {'':<26}{'before':>14}{'after':>14}{'change':>10}")
    rows: list[tuple[str, float, float]] = [
        ("parameters", before["parameters"], after["parameters"]),
        (f"bytes ({found['dtype']})", size["before"], size["after"]),
    ]
    rows += [
        (name.replace("_", " "), before["text"][name], after["text"][name])
        for name in ("perplexity", "bits_per_byte")
        if before.get("text", {}).get(name) is not None
    ]
    rows += [
        (label, before[key], after[key])
        for label, key in (
            ("scored tokens/s", "scored_tokens_per_sec"),
            ("generated tokens/s", "generated_tokens_per_sec"),
        )
    ]
    lines += [f"  {name:<26}{_number(a):>14}{_number(b):>14}{b / a - 1:>+10.2%}" for name, a, b in rows]
    lines.append(
        f"  on disk: {size['on_disk']:,} bytes of weights, {size['ratio']:.2f} times fewer than in {found['dtype']}"
    )
    if "bits_per_quantized_weight" in size:
        lines.append(
            f"  a quantized weight takes {size['bits_per_quantized_weight']:.3f} bits, scales included"
        )
    if "zeros" in found:
        lines.append(f"  {found['zeros']:.2%} of the weights of the blocks are zero")
    if "after_in_int8" in found:
        fast = found["after_in_int8"]
        lines.append(
            f"  with torchao's int8 layers: {fast['scored_tokens_per_sec']:,.0f} scored and "
            f"{fast['generated_tokens_per_sec']:,.0f} generated tokens/s"
        )
    if "text" not in before:
        lines.append("  no text to measure with: add --text PATH")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 1000 else f"{value:,.0f}"
