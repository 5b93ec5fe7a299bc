"""`python -m tests.bench NAME=value …`, which is `make bench`."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
