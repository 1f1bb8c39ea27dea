"""How a process that a launcher has started ends when it has failed: with its own words last, and at once."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

from megatrain.runtime.processes import is_started

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable: the file whose message torchrun shows at the very end, below its own traceback."""


def run_to_the_end(main: Callable[[], int]) -> int:
    """Return what `main` returns; but end a process that has failed among others here.

    The threads of collectives that never end would hold up the interpreter's end, or abort it.
    """
    if not is_started():
        return main()
    try:
        code = main()
    except Exception as error:
        traceback.print_exc()
        tell_launcher(f"{type(error).__name__}: {error}")
        code = 1
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # it is gone
                stream.flush()
        os._exit(code)
    return code


def tell_launcher(text: str) -> None:
    """Give torchrun the message of this process, which has failed."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message}, file)
