"""What a compression changed: sizes, speed, and how well text is predicted."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatrain.compress.codes import Codes
from megatrain.compress.methods import Quantization
from megatrain.compress.run import Compressed, Plan
from megatrain.compress.speed import can_compute_in_int8, compute_in_int8, speed
from megatrain.compress.text import HeldOut
from megatrain.train.evaluate import evaluate
from megatrain.train.export import DTYPES
from megatrain.train.inference import TrainedModel

Measure = Callable[[TrainedModel], dict[str, Any]]


def on_held_out(text: HeldOut) -> Measure:
    """Return the measure of a model on the text that its run has held out and that nothing was calibrated with."""

    def measure(trained: TrainedModel) -> dict[str, Any]:
        found = evaluate(trained.parallel, text.measured, text.token_bytes)
        tokens = sum(int((batch.targets >= 0).sum()) for batch in text.measured)
        perplexity = math.exp(found.loss) if found.loss < 700 else math.inf
        return {
            "tokens": tokens,
            "loss": found.loss,
            "perplexity": perplexity,
            "bits_per_byte": found.bits_per_byte,
        }

    return measure


def facts_of(trained: TrainedModel, measure: Measure | None) -> dict[str, Any]:
    """Return what is compared of a model before and after: its parameters, speed and text."""
    model = trained.parallel.models[0]
    facts: dict[str, Any] = {"parameters": sum(each.numel() for each in model.parameters()), **speed(trained)}
    if measure is not None:
        facts["text"] = measure(trained)
    return facts


def sizes(compressed: Compressed, plan: Plan, parameters_before: int) -> dict[str, Any]:
    """Return the bytes of the weights by arithmetic: before, all in the type of what is not quantized, and after."""
    model, itemsize = compressed.trained.parallel.models[0], DTYPES[plan.dtype].itemsize
    named = dict(model.named_parameters())
    rest = sum(each.numel() for name, each in named.items() if name not in compressed.codes)
    after = rest * itemsize + sum(codes.nbytes for codes in compressed.codes.values())
    before = parameters_before * itemsize
    found = {"before": before, "after": after, "ratio": before / after}
    if compressed.codes:
        bits = 8 * sum(codes.nbytes for codes in compressed.codes.values())
        found["bits_per_quantized_weight"] = bits / _numel(list(compressed.codes.values()))
    return found


def _numel(codes: Sequence[Codes]) -> int:
    return sum(each.values.numel() for each in codes)


def on_disk(target: Path) -> int:
    """Return the bytes of the files with weights of a written model."""
    if target.is_file():
        return target.stat().st_size
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


def zeros(compressed: Compressed, plan: Plan) -> float:
    """Return the share of zeros among the weights that were compressed."""
    weights = [compressed.trained.parallel.models[0].get_parameter(name) for name in plan.names]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def int8_speed(compressed: Compressed, plan: Plan) -> dict[str, float] | None:
    """Return the speed with torchao's int8 layers, into which the model is changed; None without int8 or torchao."""
    method = plan.method
    if not isinstance(method, Quantization) or method.number != "int8" or not can_compute_in_int8():
        return None
    model = compressed.trained.parallel.models[0]
    compute_in_int8(model, quantizes_inputs=method.quantizes_inputs)
    return speed(compressed.trained)
