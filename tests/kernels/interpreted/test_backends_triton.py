"""Every operation obeys a wish for Triton, and refuses what does not fit before a kernel starts."""

from functools import partial
from typing import Any

import pytest
import torch
from kernels_check import CALLS, changed_calls, path_taken, refusal

from megatrain_kernels.kernel import KERNELS, preferring

FIRST = {call.kernel.name: call for call in reversed(CALLS.values())}


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_obeys(name: str) -> None:
    call = FIRST[name]
    assert path_taken(call.kernel, lambda: call.run("triton")) == "triton"
    with preferring("triton"):
        assert path_taken(call.kernel, call.run) == "triton"
    assert path_taken(call.kernel, call.run) != "triton"  # "auto" never interprets


@pytest.mark.filterwarnings("ignore")  # the compiler probes tensors in ways that warn
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.compiled == "reference"])
def test_a_wish_for_triton_is_obeyed_in_a_compiled_graph(name: str) -> None:
    call, targets = FIRST[name], []

    def read(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    made = torch.compile(
        partial(call.kernel.function, backend="triton", **call.options), fullgraph=True, backend=read
    )(*call.args)
    assert any("megatrain" in target for target in targets)
    for mine, true in zip(made if isinstance(made, tuple) else (made,), call.run("reference"), strict=True):
        torch.testing.assert_close(mine.float(), true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_starts_no_kernel(name: str) -> None:
    """The definition refuses it, or Triton computes what the definition does: no memory is read or written beyond."""
    for how, changed in changed_calls(CALLS[name]):
        if "another device" in how:
            continue
        said = refusal(changed, "reference")
        if said is not None:
            assert refusal(changed, "triton") == said, how
        elif not (refusal(changed, "triton") or "").startswith("backend='triton' needs"):
            for mine, true in zip(changed.run("triton"), changed.run("reference"), strict=True):
                torch.testing.assert_close(mine.double(), true.double(), rtol=1e-2, atol=1e-2)
