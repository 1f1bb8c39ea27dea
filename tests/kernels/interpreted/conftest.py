"""Tests in this folder run Triton's kernels on the CPU, in Triton's interpreter, on memory that begins as NaN.

On a machine with a GPU the kernels are compiled, so the folder is left out there unless TRITON_INTERPRET=1 is set.
"""

import os
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

import megatrain_kernels


def _interpreter() -> bool:
    """Has Triton been imported for its interpreter (see tests/conftest.py)?"""
    if not find_spec("triton"):
        return False
    jit = import_module("triton.runtime.interpreter").InterpretedFunction
    return isinstance(import_module("triton.language").sum, jit)


collect_ignore_glob = ["test_*.py"] if not _interpreter() else []
if _interpreter():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # each kernel is decorated when it is imported
        for module in pkgutil.walk_packages(megatrain_kernels.__path__, "megatrain_kernels."):
            import_module(module.name)


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Operations may choose the interpreter; torch.empty gives NaN (integers: the largest), so gaps show."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        torch.use_deterministic_algorithms(True)
        assert torch.empty(1).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)
