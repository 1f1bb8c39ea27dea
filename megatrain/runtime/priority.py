"""Priority of threads that work beside training."""

import os
import sys
import threading

NICENESS = 5
"""Priority of a thread beside training below that of training, where both want the same cores."""


def lower_priority() -> None:
    """Let training go before this thread, and those that it starts. Only Linux has a priority for each thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))
