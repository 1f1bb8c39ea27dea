"""Inputs of GeGLU that are tested, timed and planned with: those of SwiGLU."""

from megatrain_kernels.swiglu.cases import CASES, cost, make_inputs

__all__ = ["CASES", "cost", "make_inputs"]
