"""``python -m distclip``: the command line, where the ``distclip`` script is not on PATH."""

import sys

from distclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
