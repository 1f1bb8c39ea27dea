"""Which path runs: by argument and by `preferring`, for every operation alike. Triton's is in `interpreted/`."""

import pytest
from kernels_check import CALLS, DEFINITION_IS_FASTEST, path_taken

from megatrain_kernels.kernel import KERNELS, UnsupportedError, preferring

FIRST = {call.kernel.name: call for call in reversed(CALLS.values())}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_obeys(name: str, backend: str) -> None:
    call = FIRST[name]
    expected = "reference" if name in DEFINITION_IS_FASTEST else backend
    assert path_taken(call.kernel, lambda: call.run(backend)) == expected
    with preferring(backend):
        assert path_taken(call.kernel, call.run) == expected
    assert path_taken(call.kernel, call.run) == ("reference" if name in DEFINITION_IS_FASTEST else "torch")


@pytest.mark.parametrize("name", KERNELS)
def test_an_unknown_backend_is_refused(name: str) -> None:
    *names, last = KERNELS[name].backends
    says = f"backend='fast': must be auto, {', '.join(names)} or {last} for {name}"
    with pytest.raises(ValueError, match=says):
        FIRST[name].run("fast")
    with preferring("fast"), pytest.raises(ValueError, match=says):
        FIRST[name].run()


@pytest.mark.parametrize("name", KERNELS)
def test_triton_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"needs {KERNELS[name].device_needed}; got cpu"):
        FIRST[name].run("triton")
