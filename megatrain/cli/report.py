"""`megatrain report`: where the time of a run went, and one HTML page with its curves, samples, events and config."""

import webbrowser
from pathlib import Path

from megatrain.cli.options import Parser


def run(argv: list[str]) -> int:
    """Write the page and say where it is; open it if asked to. Return the exit code."""
    parser = Parser("report")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--open", action="store_true")
    options = parser.parse_intermixed_args(argv)
    from megatrain.observe.goodput import time_spent
    from megatrain.observe.report.page import report  # imports numpy, so only once the command line is valid

    for each in options.runs:
        for line in time_spent(Path(each), several=len(options.runs) > 1):
            print(line)
    page = report([Path(each) for each in options.runs], options.out)
    print(page)
    if options.open and not webbrowser.open(page.absolute().as_uri()):
        print("No browser was found here; open the file in one.")
    return 0
