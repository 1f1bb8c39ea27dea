"""`python -m megatrain` is the command `megatrain`."""

import sys

from megatrain.cli.main import main
from megatrain.runtime.ending import run_to_the_end

if __name__ == "__main__":
    sys.exit(run_to_the_end(main))
