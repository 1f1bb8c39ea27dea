"""Rounding, GPTQ and AWQ against their formulas written out, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatrain.compress.awq import EXPONENTS, Fold, awq, fold_scales, folds, search_scales
from megatrain.compress.calibration import Moments, walk
from megatrain.compress.codes import LARGEST, Codes, Grid, round_to_nearest, squared_error
from megatrain.compress.gptq import damped, fitted_scales, gptq
from megatrain.data.loader import Batch
from megatrain.models.config import ModelConfig
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import get_spec
from megatrain.nn.config import MLAConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, size: int) -> Tensor:
    """Correlated inputs, some of which are large."""
    mixed = drawn(tokens, size, seed=1) @ drawn(size, size, seed=2) / size**0.5
    return mixed * drawn(size, seed=3).exp()


@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("number", ["int8", "int4", "e4m3"])
def test_rounding_takes_the_nearest_code(number: str, group: int | None) -> None:
    weight = drawn(6, 64).float()
    found = round_to_nearest(weight, Grid(number, group, torch.float32))  # type: ignore[arg-type]
    largest = LARGEST[number]  # type: ignore[index]
    for row, start in itertools.product(range(6), range(0, 64, group or 64)):
        part = weight[row, start : start + (group or 64)]
        scale = float(found.scales[row, start // (group or 64)])
        assert scale == pytest.approx(float(part.abs().max()) / largest, rel=1e-6)
        if number == "e4m3":
            legal = torch.arange(-127, 128).to(torch.int8).view(torch.float8_e4m3fn).float()
            legal = legal[legal.isfinite()]
        else:
            legal = torch.arange(-largest, largest + 1)
        nearest = (part[:, None] / scale - legal).abs().min(1).values
        codes = found.values[row, start : start + (group or 64)].float()
        assert torch.allclose((part / scale - codes).abs(), nearest, atol=1e-4)
        assert torch.allclose(found.numbers()[row, start : start + (group or 64)], codes * scale)


def test_codes_are_chosen_for_the_scale_as_it_is_stored() -> None:
    weight = drawn(8, 32).float()
    found = round_to_nearest(weight, Grid("int8", None, torch.bfloat16))
    assert torch.equal(found.scales, found.scales.to(torch.bfloat16).float())
    assert torch.equal(found.values, (weight / found.scales).clamp(-127, 127).round().to(torch.int8))


def test_zeros_stay_zeros() -> None:
    for number in ("int8", "int4", "e4m3"):
        found = round_to_nearest(torch.zeros(2, 32), Grid(number))  # type: ignore[arg-type]
        assert torch.equal(found.numbers(), torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("number", "group", "bytes_"), [("int8", None, 12 * 256 + 12 * 2), ("int4", 64, 1536 + 96)]
)
def test_size_is_that_of_codes_and_scales(number: str, group: int | None, bytes_: int) -> None:
    assert round_to_nearest(drawn(12, 256).float(), Grid(number, group)).nbytes == bytes_  # type: ignore[arg-type]


def optimal_brain_quantization(weight: Tensor, gram: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return the codes of OBQ (arXiv 2208.11580, equations 2 and 3) in the order of the inputs, without any tricks."""
    left, inverse = weight.clone(), torch.linalg.inv(damped(gram))
    codes = torch.zeros_like(weight)
    size = weight.shape[1] // scales.shape[1]
    for q in range(weight.shape[1]):
        scale = scales[:, q // size].double()
        codes[:, q] = (left[:, q] / scale).clamp(-LARGEST[grid.number], LARGEST[grid.number]).round()
        error = (left[:, q] - codes[:, q] * scale) / inverse[q, q]
        left -= error[:, None] * inverse[q]
        inverse = inverse - inverse[:, q : q + 1] @ inverse[q : q + 1] / inverse[q, q]
    return codes


@pytest.mark.parametrize(("size", "group"), [(48, None), (96, 32), (160, 32), (256, 128), (288, 96)])
def test_gptq_is_optimal_brain_quantization(size: int, group: int | None) -> None:
    """Also where groups and the blocks in which errors are gathered begin at different inputs (96 and 128)."""
    weight, x = drawn(20, size) * 0.1, inputs(400, size)
    gram, grid = x.T @ x, Grid("int4", group)
    found = gptq(weight, gram, grid)
    fallen_back = (found.scales == grid.scales(weight)).all(1) & (
        found.values == grid.round(weight, found.scales)
    ).all(1)
    assert fallen_back.sum() <= 2
    expected = optimal_brain_quantization(weight, gram, found.scales, grid)
    assert torch.equal(found.values[~fallen_back].double(), expected[~fallen_back])


@pytest.mark.parametrize("seed", range(5))
def test_gptq_is_never_worse_than_rounding_to_nearest(seed: int) -> None:
    """For each output, also with few inputs, where the Hessian is singular."""
    weight, grid = drawn(30, 64, seed=seed), Grid("int4", 32)
    for tokens in (1, 7, 300):
        x = inputs(tokens, 64)
        gram = x.T @ x
        errors = [
            ((codes.numbers().double() - weight) @ x.T).square().sum(1)
            for codes in (gptq(weight, gram, grid), round_to_nearest(weight, grid))
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-9)).all()
    assert errors[0].sum() < 0.8 * errors[1].sum()


def test_gptq_without_any_inputs_rounds_to_nearest() -> None:
    """As the experts that no calibration token met."""
    weight, grid = drawn(5, 32), Grid("int4", 32)
    found = gptq(weight, torch.zeros(32, 32, dtype=torch.float64), grid)
    assert torch.isfinite(found.numbers()).all()
    assert (found.numbers() - weight).abs().max() < 0.6 * found.scales.max()


def test_error_is_that_of_the_outputs() -> None:
    x, difference = inputs(50, 16), drawn(3, 16)
    assert torch.allclose(squared_error(difference, x.T @ x), (difference @ x.T).square().sum(1))


def test_fitted_scales_are_the_best_of_those_tried() -> None:
    weight, x, grid = drawn(4, 64), inputs(100, 64), Grid("int4", 32)
    found = fitted_scales(weight, x.T @ x, grid)
    for row, group in itertools.product(range(4), range(2)):
        part, seen = weight[row : row + 1, group * 32 : group * 32 + 32], x[:, group * 32 : group * 32 + 32]
        errors = {}
        for step in range(18):
            scale = grid.stored(grid.scales(part) * (1 - step / 50))
            wrong = grid.round(part, scale).double() * scale - part
            errors[float(scale)] = float((wrong @ seen.T).square().sum())
        assert float(found[row, group]) == min(errors, key=errors.__getitem__)


def test_awq_takes_the_best_exponent() -> None:
    weight, x, grid = drawn(8, 32), inputs(200, 32), Grid("int4", 32)
    moments = Moments(x.T @ x, x.abs().sum(0), torch.tensor(200.0))
    found = search_scales([weight], moments, grid, Fold(("down",), "up"))
    errors = []
    for exponent in EXPONENTS:
        scale = x.abs().mean(0) ** exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = round_to_nearest(weight * scale, grid).numbers().double()
        errors.append((float(((x / scale) @ rounded.T - x @ weight.T).square().sum()), scale))
    least, scale = min(errors, key=lambda each: each[0])
    assert torch.allclose(found, scale)
    assert least < 0.9 * errors[0][0]  # of exponent 0, which is rounding to nearest


TINY = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "ffn_size": 96, "vocab_size": 50, "max_seq_len": 32}
MODELS: dict[str, ModelConfig] = {
    "llama, grouped keys": Llama3Config(**TINY, n_kv_heads=2),  # type: ignore[arg-type]
    "qwen3": Qwen3Config(**TINY, head_dim=32),  # type: ignore[arg-type]
    "gpt2": GPT2Config(**TINY),  # type: ignore[arg-type]
    "latent attention": DeepseekV3Config(
        **TINY,  # type: ignore[arg-type]
        experts=None,
        mla=MLAConfig(
            q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
        ),
    ),
}


def random_model(cfg: ModelConfig) -> Decoder:
    spec = get_spec(cfg.kind)
    model = spec.build(cfg).double()
    init_weights(model, spec.plan(cfg), seed=0)
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):  # norms and biases, too
            parameter.add_(0.2 * drawn(*parameter.shape, seed=n + 10))
    return model


def some_text(cfg: ModelConfig, rows: int = 4, length: int = 24) -> list[Batch]:
    tokens = torch.randint(cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(length).repeat(rows, 1)
    return [
        Batch(each, each, place, None)
        for each, place in zip(tokens.split(2), positions.split(2), strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_awq_scaling_changes_no_output(name: str) -> None:
    cfg = MODELS[name]
    model, batches = random_model(cfg), some_text(cfg)
    before = [model(batch.tokens) for batch in batches]
    changed = 0
    for layer, block, moments in walk(model, batches):
        named = dict(block.named_parameters())
        for fold in folds(cfg, layer):
            sums = moments[f"layers.{layer}.{fold.consumers[0]}.weight"]
            weights = [named[f"{each}.weight"] for each in fold.consumers]
            scale = search_scales(weights, sums, Grid("int4", 32), fold)
            changed += int((scale != 1).any())
            fold_scales(named, fold, scale)
    assert changed >= cfg.n_layers
    for batch, logits in zip(batches, before, strict=True):
        assert torch.allclose(model(batch.tokens), logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_awq_is_better_than_rounding_to_nearest(name: str) -> None:
    """In the outputs of the first block, on the calibration text."""
    cfg = replace(MODELS[name], n_layers=1)
    outputs = []
    for method in ("exact", "nearest", "awq"):
        model, batches = random_model(cfg), some_text(cfg, rows=32)
        for layer, block, moments in walk(model, batches):
            named = dict(block.named_parameters())
            own = {key.removeprefix(f"layers.{layer}."): each for key, each in moments.items()}
            codes: dict[str, Codes] = {}
            if method == "awq":
                codes = awq(cfg, layer, named, own, Grid("int4", 32))
            if method == "nearest":
                codes = {key: round_to_nearest(named[key], Grid("int4", 32)) for key in own}
            for key, each in codes.items():
                named[key].copy_(each.numbers())
        outputs.append(torch.cat([model(batch.tokens) for batch in batches]))
    exact, nearest, fitted = outputs
    assert (fitted - exact).square().mean() < 0.9 * (nearest - exact).square().mean()
