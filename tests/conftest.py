"""Where there is no GPU, Triton is imported for its interpreter, before anything else imports it.

Triton decides once, when it is imported, whether its own functions are compiled or interpreted. The variable is set
for that moment only: child processes do not inherit it, and the suite's other tests take the paths they always take.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import torch

if find_spec("triton") and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import_module("triton.language")
