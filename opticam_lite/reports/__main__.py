"""`python -m opticam_lite.reports`, which is what `make report` calls."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
