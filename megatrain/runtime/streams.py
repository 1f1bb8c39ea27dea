"""Standard streams that a shell, a scheduler or a container left closed, or in an encoding that lacks characters."""

import io
import os
import sys


def repair_streams() -> None:
    """Make the three standard streams usable: closed ones lead nowhere, and a missing character is shown as `?`.

    A closed descriptor would be given to the next file that is opened, and whatever a library prints would end up in
    that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            opened = io.FileIO(number, "w" if number else "r", closefd=False)
            buffered = io.BufferedWriter(opened) if number else io.BufferedReader(opened)
            setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def output_is_broken() -> bool:
    """Return whether nothing can be printed any more, as on a full disk; ends the line that was printed last."""
    try:
        os.write(1, b"\n")  # what the failed print left in the buffers may be lost, so a flush would not tell
    except OSError:
        return True
    return False


def abandon_output() -> None:
    """Let standard output lead nowhere: what is left in its buffer would fail again when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
