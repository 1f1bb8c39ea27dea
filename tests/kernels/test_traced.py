"""While torch.compile traces, operations bound by memory are their definitions, and the others stay operators."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx import GraphModule

from megatrain_kernels import attention, rms_norm
from megatrain_kernels.kernel import KERNELS, Case, Kernel, select, watching

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn

FUSED = {"rms_norm", "layer_norm", "swiglu", "geglu", "bias_gelu", "rotary"}
CASES = [(KERNELS[name], case) for name in sorted(FUSED) for case in KERNELS[name].suite.small]


def operators(function: Callable[..., Any], *args: Any) -> set[str]:
    """Names of the operators and autograd functions of this project in the one graph of `function`."""
    found: set[str] = set()

    def read(graph: GraphModule, _: Any) -> GraphModule:
        names = (str(node.target) for node in graph.graph.nodes)
        found.update(name for name in names if "megatrain" in name or "autograd_function" in name)
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=read)(*args)
    return found


def gradients(function: Callable[..., Any], args: tuple[Any, ...], kernel: Kernel) -> list[Tensor]:
    """Results, and gradients of a sum in which no two of their elements count alike."""
    given = (args[i] for i in kernel.suite.gradients if i < len(args))
    wanted = [x.requires_grad_() for x in given if x is not None]
    made = function(*args)
    made = made if isinstance(made, tuple) else (made,)
    weights = (torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in made)
    return [
        *made,
        *torch.autograd.grad(sum((x * w).sum() for x, w in zip(made, weights, strict=True)), wanted),
    ]


def check(kernel: Kernel, case: Case, dtype: torch.dtype, compiler: str) -> None:
    args, options = kernel.suite.make_inputs(case, dtype=dtype, device="cpu")
    function = partial(kernel.function, **options)
    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend=compiler)
    mine, true = (gradients(f, args, kernel) for f in (traced, function))
    for a, b in zip(mine, true, strict=True):
        # Sums over up to some hundred rows in another order, relative to the largest of the tensor.
        bound = 200 * torch.finfo(b.dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_which_are_fused() -> None:
    assert {name for name, kernel in KERNELS.items() if kernel.compiled == "reference"} == FUSED


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_no_operator_stands_in_the_way(name: str, backend: str) -> None:
    kernel = KERNELS[name]
    args, options = kernel.suite.make_inputs(kernel.suite.small[0], dtype=torch.float32, device="cpu")
    assert not operators(partial(kernel.function, backend=backend, **options), *args)


@pytest.mark.parametrize("name", sorted(FUSED))
def test_the_definition_is_traced_although_triton_runs(name: str) -> None:
    kernel = replace(KERNELS[name], runs_on=lambda x: True)

    def takes_definition(x: Tensor) -> Tensor:
        return x.new_full((), float(select(kernel, "auto", x) == "reference"))

    x = torch.ones(2, 8)
    torch._dynamo.reset()
    assert torch.compile(takes_definition, fullgraph=True, backend="eager")(x) == 1
    assert takes_definition(x) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kernel", "case"), CASES, ids=lambda x: getattr(x, "name", None))
def test_numbers_are_the_same(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    check(kernel, case, dtype, "aot_eager")


@pytest.mark.slow  # C++ is compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(FUSED))
def test_generated_code_has_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    check(KERNELS[name], KERNELS[name].suite.small[0], dtype, "inductor")


@pytest.mark.parametrize("name", sorted(FUSED))
def test_half_precision_keeps_its_type(name: str) -> None:
    kernel = KERNELS[name]
    args, options = kernel.suite.make_inputs(kernel.suite.small[0], dtype=torch.bfloat16, device="cpu")
    made = torch.compile(partial(kernel.function, **options), fullgraph=True, backend="eager")(*args)
    assert all(x.dtype == torch.bfloat16 for x in (made if isinstance(made, tuple) else (made,)))


@pytest.mark.parametrize("on", [True, False])
def test_attention_is_one_graph_under_autocast(on: bool) -> None:
    def attend(q: Tensor, doc_ids: Tensor) -> Tensor:
        out = attention(q, q, q, doc_ids=doc_ids, softcap=2.0)
        assert isinstance(out, Tensor)
        return out

    q, doc_ids = (
        torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(1)),
        torch.arange(6)[None] // 4,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        assert operators(attend, q, doc_ids) == {"megatrain.attention.default"}
        made = torch.compile(attend, fullgraph=True, backend="eager")(q, doc_ids)
    assert made.dtype == (torch.bfloat16 if on else torch.float32)


def test_a_change_of_autocast_is_seen() -> None:
    q = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    attend: Any = torch.compile(partial(attention, softcap=2.0), fullgraph=True, backend="eager")
    types = []
    for on in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            types.append(attend(q, q, q).dtype)
    assert types == [torch.float32, torch.bfloat16, torch.float32]


def test_queries_that_a_compiler_cannot_trace_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 cannot trace `is_autocast_available`; a function that no version can stands in for it."""
    available = torch.amp.is_autocast_available
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(available))
    q = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(1))
    assert operators(lambda x: attention(x, x, x, softcap=2.0), q) == {"megatrain.attention.default"}


def test_watching_compiles_nothing_anew() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    norm = torch.compile(partial(rms_norm, eps=1e-5), backend=counter)
    x, weight = torch.ones(4, 8), torch.ones(8)
    with watching() as paths:
        norm(x, weight)
    norm(x, weight)
    assert counter.frame_count == 1
    assert paths == {}
