"""`python -m megatrain` is the command `megatrain`."""

import sys

from megatrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
