"""Where there is no GPU, Triton is imported for its interpreter, before anything else imports it.

Triton decides once, when it is imported, whether its own functions are compiled or interpreted. The variable is set
for that moment only: child processes do not inherit it, and the suite's other tests take the paths they always take.

A shell starts background jobs with interrupts ignored, and children inherit that: the tests that interrupt a run get
the usual disposition back.
"""

import os
import signal
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import torch

if find_spec("triton") and not torch.cuda.is_available():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import_module("triton.language")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
