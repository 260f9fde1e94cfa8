"""``python -m crossx``: the command line."""

import sys

from crossx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
