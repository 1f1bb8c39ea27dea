"""Linear layers in fp8 against float64 products of operands quantized by a search among the formats' numbers."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from quantization_check import by_search, tiles
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from megatrain.config.errors import UserError
from megatrain.nn.config import DecoderConfig, ExpertsConfig
from megatrain.nn.contract import Weight
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.layer import Linear, replace_seam
from megatrain.nn.plan import decoder_plan
from megatrain.parallel import float8
from megatrain.parallel.apply import parallelize
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.float8 import (
    Float8,
    KeptCodes,
    Scaling,
    WeightCodes,
    check_float8,
    float8_linear,
    float8_linears,
)
from megatrain_kernels import quantize, scaled_matmul

Gradients = Literal["e5m2", "e4m3"]
SCALINGS: tuple[Scaling, ...] = ("tensor", "row", "block")
TOKENS, IN, OUT = (3, 100), 200, 150  # no whole groups of 128
CFG = DecoderConfig(n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.randn(shape[-1], generator=torch.Generator().manual_seed(9)).exp()).to(dtype)


def layer(weight: Tensor, bias: Tensor | None, scaling: Scaling, gradients: Gradients = "e5m2") -> Linear:
    made = Linear(Weight(tuple(weight.shape), bias=bias is not None)).to(weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    replace_seam(made, "product", partial(float8_linear, options=Float8(scaling, gradients)))
    return made


def rounded(x: np.ndarray, dtype: str, scaling: str) -> np.ndarray:
    """What the quantized x `(rows, cols)` stands for."""
    numbers, scales = by_search(torch.from_numpy(np.ascontiguousarray(x)), dtype, scaling, 128)
    return numbers * scales.astype(np.float64)[tiles(x.shape, scaling, 128)]


def expected(x: np.ndarray, w: np.ndarray, g: np.ndarray, scaling: str, gradients: str) -> list[np.ndarray]:
    """Output and gradients of x `(tokens, in)` and w `(out, in)`, as the table in `float8.py` says."""
    along = {"tensor": "tensor", "row": "row", "block": "group"}[scaling]
    out = rounded(x, "e4m3", along) @ rounded(w, "e4m3", scaling).T
    for_x = rounded(g, gradients, along) @ rounded(w.T, "e4m3", scaling).T
    if scaling == "row":
        return [out, for_x, g.T @ x]
    return [out, for_x, rounded(g.T, gradients, along) @ rounded(x.T, "e4m3", along).T]


def computed(x: Tensor, module: Linear, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    assert out.shape == g.shape
    return [out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), g)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_output_and_gradients(scaling: Scaling, gradients: Gradients, dtype: torch.dtype) -> None:
    x, weight = draw(*TOKENS, IN, seed=1, dtype=dtype), draw(OUT, IN, seed=2, dtype=dtype)
    bias, g = draw(OUT, seed=3, dtype=dtype), draw(*TOKENS, OUT, seed=4, dtype=dtype) * 1e-4
    out, for_x, for_weight, for_bias = computed(x, layer(weight, bias, scaling, gradients), g)
    flat, flat_g = x.flatten(0, 1).double().numpy(), g.flatten(0, 1).double().numpy()
    truths = expected(flat, weight.double().numpy(), flat_g, scaling, gradients)
    truths[0] += bias.double().numpy()
    # Relative to the largest: float64's own roundings, or those of a bf16 result (and of its sum with the bias).
    bound = 1e-13 if dtype == torch.float64 else 2**-7
    for got, truth in zip((out, for_x, for_weight), truths, strict=True):
        assert got.dtype == dtype
        error = np.abs(got.double().numpy().reshape(truth.shape) - truth).max() / np.abs(truth).max()
        assert error <= bound
    torch.testing.assert_close(
        for_bias.double(), g.double().sum((0, 1)), rtol=0, atol=30 * bound * g.abs().max().item()
    )


def anew(x: Tensor, weight: Tensor, g: Tensor, scaling: Scaling, gradients: Gradients) -> list[Tensor]:
    """Output and gradients of x `(tokens, in)` where each operand of each product is quantized for it."""
    along = {"tensor": "tensor", "row": "row", "block": "group"}[scaling]

    def product(left: Tensor, right: Tensor, dtype: str, by_right: str) -> Tensor:
        (a, scale_a), (b, scale_b) = (
            quantize(left, dtype=dtype, scaling=along),
            quantize(right, dtype="e4m3", scaling=by_right),
        )
        return scaled_matmul(a, b.mT, scale_a, scale_b.mT if scale_b.ndim else scale_b, out_dtype=x.dtype)

    out, for_x = product(x, weight, "e4m3", scaling), product(g, weight.mT, gradients, scaling)
    return [out, for_x, g.mT @ x if scaling == "row" else product(g.mT, x.mT, gradients, along)]


@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kept_codes_are_those_of_a_quantization_for_each_product(
    scaling: Scaling, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in two micro-batches, and with other weights in the next step; weights are quantized once a step."""
    calls: list[Tensor] = []
    monkeypatch.setattr(float8, "quantize", lambda x, **how: calls.append(x) or quantize(x, **how))
    kept = KeptCodes()
    module = layer(draw(OUT, IN, seed=2, dtype=torch.bfloat16), None, scaling)
    product = partial(float8_linear, options=Float8(scaling, gradients), codes=WeightCodes(kept, "w"))
    replace_seam(module, "product", product)
    for step in range(2):
        calls.clear()
        with kept:
            for n in range(2):
                x = draw(300, IN, seed=10 + n, dtype=torch.bfloat16)
                g = draw(300, OUT, seed=20 + n, dtype=torch.bfloat16)
                truths = anew(x, module.weight.detach(), g, scaling, gradients)
                for got, truth in zip(computed(x, module, g), truths, strict=True):
                    assert torch.equal(got, truth)
        weights = {(OUT, IN), (IN, OUT)}
        assert sum(tuple(x.shape) in weights for x in calls) == (2 if scaling == "row" else 1), step
        module.weight.data.mul_(-1.5)  # of which a version counter would tell nothing
        x = draw(300, IN, seed=30, dtype=torch.bfloat16)
        between = module(x)  # an evaluation, out of steps
        assert torch.equal(between, anew(x, module.weight.detach(), between, scaling, gradients)[0])


def added(parts: list[list[Tensor]]) -> list[Tensor]:
    """Outputs and x's gradients side by side, weights' gradients summed."""
    outs, for_x, for_weight = zip(*parts, strict=True)
    return [torch.cat(outs), torch.cat(for_x), torch.stack(for_weight).sum(0)]


def by_micro_batches(x: Tensor, weight: Tensor, g: Tensor, scaling: Scaling) -> list[Tensor]:
    module = layer(weight, None, scaling)
    pairs = zip(x.split(1), g.split(1), strict=True)
    return added([computed(part, module, grad) for part, grad in pairs])


def by_outputs(x: Tensor, weight: Tensor, g: Tensor, scaling: Scaling) -> list[Tensor]:
    """As tensor parallelism cuts the first layers."""
    cuts = zip(weight.split(128), g.split(128, -1), strict=True)
    outs, for_x, for_weight = zip(
        *(computed(x, layer(w, None, scaling), part) for w, part in cuts), strict=True
    )
    return [torch.cat(outs, -1), torch.stack(for_x).sum(0), torch.cat(for_weight)]


def by_inputs(x: Tensor, weight: Tensor, g: Tensor, scaling: Scaling) -> list[Tensor]:
    """As it cuts the last ones."""
    cuts = zip(weight.split(128, 1), x.split(128, -1), strict=True)
    outs, for_x, for_weight = zip(
        *(computed(part, layer(w, None, scaling), g) for w, part in cuts), strict=True
    )
    return [torch.stack(outs).sum(0), torch.cat(for_x, -1), torch.cat(for_weight, 1)]


@pytest.mark.parametrize(
    ("scaling", "cut", "same"),
    [
        ("block", by_micro_batches, True),
        ("block", by_outputs, True),
        ("block", by_inputs, True),
        ("row", by_micro_batches, True),
        ("row", by_outputs, False),
        ("row", by_inputs, False),
        ("tensor", by_micro_batches, False),
        ("tensor", by_outputs, False),
        ("tensor", by_inputs, False),
    ],
)
def test_cuts_that_change_nothing_and_those_that_do(
    scaling: Scaling, cut: Callable[..., list[Tensor]], same: bool
) -> None:
    """What `layout.float8_problems` allows and refuses."""
    x, weight, g = draw(2, 128, 256, seed=1), draw(256, 256, seed=2), draw(2, 128, 256, seed=3)
    whole, parts = computed(x, layer(weight, None, scaling), g), cut(x, weight, g, scaling)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(parts, whole, strict=True)]
    assert (max(errors) < 1e-13) == same
    assert same or max(errors) > 1e-4


def test_blocks_linear_layers_and_nothing_else() -> None:
    cfg = DecoderConfig(
        n_layers=2,
        hidden_size=32,
        n_heads=4,
        vocab_size=61,
        tie_embeddings=False,
        experts=ExpertsConfig(n_experts=4, ffn_size=16, n_shared_experts=1, first_k_dense=1),
    )
    model = Decoder(cfg)
    names = [name for name, _ in model.named_parameters()]
    float8_linears(model, decoder_plan(cfg), None, ParallelConfig(), options=Float8("row"), kept=KeptCodes())
    assert [name for name, _ in model.named_parameters()] == names
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    changed = {name for name, module in linears.items() if module.product is not F.linear}
    attention = {f"layers.{n}.attn.w{each}" for n in (0, 1) for each in "qkvo"}
    shared = {f"layers.1.moe.shared.{each}" for each in ("gate", "up", "down")}
    assert changed == attention | shared | {f"layers.0.mlp.{each}" for each in ("gate", "up", "down")}


DATA = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(5))


def gradients(cfg: ParallelConfig) -> dict[str, Tensor]:
    model, plan = Decoder(CFG), decoder_plan(CFG)
    init_weights(model, plan, seed=1)
    parallelize(
        lambda: model, plan, None, cfg, seq_len=16, compute_dtype=torch.float32, float8=Float8("block")
    )
    model(DATA, targets=DATA.roll(-1, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_changes_nothing(kind: str) -> None:
    plain, again = gradients(ParallelConfig()), gradients(ParallelConfig(activation_checkpointing=kind))  # type: ignore[arg-type]
    assert all(torch.equal(again[name], truth) for name, truth in plain.items())


@pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn
def test_blocks_compile_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing and differentiation as in earnest; the graph is then run as it is, which needs no compiler."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain = gradients(ParallelConfig())
    compiled = gradients(ParallelConfig(activation_checkpointing="selective", compile=True))
    for name, truth in plain.items():
        torch.testing.assert_close(compiled[name], truth, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_float8(torch.device("cpu"))
    monkeypatch.setattr(float8, "multiplies_fp8", lambda device: False)
    with pytest.raises(UserError, match=r"compute capability 8\.9 or more.*set train\.precision=bf16"):
        check_float8(torch.device("cuda", 0))
