"""`python -m refcurv`."""

import sys

from refcurv.cli import main

sys.exit(main())
