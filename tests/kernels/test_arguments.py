"""Every operation called with every argument wrong in every way: one sentence says so, before any kernel starts."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from kernels_check import CALLS, changed_calls, refusal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatrain_kernels import grouped_gemm, moe_gate, permute, unpermute, unsort
from megatrain_kernels.grouped_mm.permute import Permutation

FIRST = {call.kernel.name: call for call in reversed(CALLS.values())}
SENTENCE = re.compile("must |do not fit|needs a matrix")
"""Some word of what the rule is."""
ANY_ROWS = {f"0: {how}" for how in ("a dimension more", "a dimension less", "longer along 0")}
ALONE = {"0: a wider type", "0: another device"}
"""Changes of an operation's only tensor, or of the only one that the type matters of."""
LEGAL: dict[str, set[str]] = {
    "swiglu": set(),
    "geglu": set(),
    "scaled_matmul": set(),
    "attention": {"2: longer along 3"},  # values may have another size than keys
    "cross_entropy": {"0: longer along 1", "0: a wider type"},
    "linear_cross_entropy": {"1: longer along 0"},
    "grouped_gemm": {"1: longer along 1"},
    "orthogonalize": {*ANY_ROWS, "0: longer along 1", "0: longer along 2", *ALONE},
    "rms_norm": {"1: a wider type"},
    "rms_norm plain": {*ANY_ROWS, "0: a wider type"},
    "layer_norm plain": ANY_ROWS,
    "layer_norm one_row": ANY_ROWS,
    "quantize": {"0: a dimension more", "0: longer along 0", *ALONE},
    "dequantize e4m3_tensor": {*ANY_ROWS, "0: longer along 1"},
    "dequantize": {"0: longer along 1"},  # a row, group or block may be longer
    "dequantize e4m3_block": {"0: longer along 0"},
    "rotary": {"0: longer along 2", "1: longer along 2"},
    "moe_gate": {"0: longer along 0"},
    "moe_gate softmax": {"0: longer along 1", *ALONE},
    "moe_gate groups": ALONE,
    "moe_gate bias": {"0: a wider type", "1: a wider type"},  # which only takes part in the choice
    "scaled_matmul by_tensor": {"0: longer along 0", "1: longer along 1"},
    "scaled_matmul by_block": {"1: longer along 1"},
    "attention documents": {"doc_ids: longer along 1", "doc_ids: a wider type"},
}
"""Changes that leave a legal call: of an operation, or of one of its calls.

Of an operation without an entry, what is accepted must equal the definition.
"""
for _name in CALLS:
    if _name.startswith("attention") and _name != "attention documents":
        LEGAL.setdefault(_name, set()).add("0: longer along 1")  # there may be more queries than keys
    if _name.startswith("attention") and CALLS[_name].args[1].shape[2] == 1:
        LEGAL.setdefault(_name, set()).add("0: longer along 2")  # one key head divides any number
    if _name.startswith("quantize") and "block" not in _name:
        LEGAL.setdefault(_name, set()).add("0: a dimension less")
    if _name.startswith("quantize") and "int4" not in _name:
        LEGAL.setdefault(_name, set()).add("0: longer along 1")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_refused(name: str, backend: str) -> None:
    call = CALLS[name]
    legal = LEGAL.get(call.kernel.name, set()) | LEGAL.get(name, set())
    for how, changed in changed_calls(call):
        said = refusal(changed, backend)
        if how in legal or (said is None and call.kernel.name not in LEGAL):
            for mine, true in zip(changed.run(backend), changed.run("reference"), strict=True):
                if mine.device.type != "meta":
                    torch.testing.assert_close(mine.double(), true.double(), rtol=1e-3, atol=1e-3)
        else:
            assert SENTENCE.search(said or "accepted"), how


def permuted() -> tuple[Tensor, Permutation, Tensor]:
    rows, permutation = permute(torch.ones(4, 6), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]), 3)
    return rows, permutation, torch.ones(4, 2)


TOKENS, INDICES = torch.ones(4, 6), torch.zeros(4, 2, dtype=torch.int64)
ROWS, PERMUTATION, WEIGHTS = permuted()
REFUSED: list[tuple[Any, tuple[Any, ...], str]] = [
    (permute, (TOKENS[0], INDICES, 3), r"tokens must be \(tokens, size\)"),
    (permute, (TOKENS[:3], INDICES, 3), r"got tokens \(3, 6\) .* indices \(4, 2\)"),
    (permute, (TOKENS, INDICES[:, 0], 3), r"indices \(tokens, k\)"),
    (permute, (TOKENS, INDICES.int(), 3), "indices must be int64"),
    (permute, (TOKENS.long(), INDICES, 3), "floating"),
    (permute, (TOKENS, INDICES.to("meta"), 3), "one device"),
    (permute, (TOKENS, INDICES, 0), "n_experts=0"),
    (unsort, (ROWS[:7], PERMUTATION), r"here \(8, size\); got rows \(7, 6\)"),
    (unsort, (ROWS[0], PERMUTATION), "rows must be"),
    (unpermute, (ROWS[:7], PERMUTATION, WEIGHTS), r"here \(8, size\); got rows \(7, 6\)"),
    (unpermute, (ROWS, PERMUTATION, WEIGHTS[:3]), r"weights must be \(tokens, k\), here \(4, 2\)"),
    (unpermute, (ROWS, PERMUTATION, WEIGHTS.long()), "floating"),
    (unpermute, (ROWS.to("meta"), PERMUTATION, WEIGHTS), "one device"),
    (grouped_gemm, (torch.ones(25, 40), torch.ones(4, 24, 32), torch.tensor([5, 5, 5, 10])), r"\(25, 40\)"),
    (grouped_gemm, (torch.ones(9, 8), torch.ones(2, 5, 8), torch.tensor([4, 3])), "add up to the 9 tokens"),
]


@pytest.mark.parametrize(("function", "args", "says"), REFUSED)
def test_more_that_is_refused(function: Any, args: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        function(*args)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k=0: must be 1 to 8"),
        ({"top_k": 5, "n_groups": 4, "top_groups": 2}, "top_k=5: must be 1 to 4"),
        ({"top_k": 1, "n_groups": 3}, "n_groups=3"),
        ({"top_k": 1, "n_groups": 8}, "groups of 2 or more"),
        ({"top_k": 1, "n_groups": 4, "top_groups": 5}, "top_groups=5"),
    ],
)
def test_options_of_the_gate(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        moe_gate(torch.zeros(2, 8), **options)


def test_checks_wait_for_no_data() -> None:
    meta = torch.ones(4, 6, device="meta"), torch.ones(2, 5, 7, device="meta")
    with pytest.raises(ValueError, match="weights"):
        grouped_gemm(*meta, torch.ones(2, dtype=torch.int64, device="meta"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("name", FIRST)
def test_calls_are_traced_whole(name: str) -> None:
    """Neither the checks nor the choice of a path break the graph."""
    call = FIRST[name]
    torch._dynamo.reset()
    compiled = torch.compile(partial(call.kernel.function, **call.options), fullgraph=True, backend="eager")
    made = compiled(*call.args)
    for mine, true in zip(made if isinstance(made, tuple) else (made,), call.run(), strict=True):
        torch.testing.assert_close(mine.float(), true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FIRST)
def test_shapes_are_known_without_data(name: str) -> None:
    call = FIRST[name]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in call.args]
        made = call.kernel.function(*fake, **call.options)
    for mine, true in zip(made if isinstance(made, tuple) else (made,), call.run(), strict=True):
        assert (mine.shape, mine.dtype) == (true.shape, true.dtype)
