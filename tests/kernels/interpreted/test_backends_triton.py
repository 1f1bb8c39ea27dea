"""Every operation obeys a wish for Triton, and refuses what does not fit before a kernel starts."""

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
