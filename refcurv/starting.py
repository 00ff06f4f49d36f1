"""While the command line is being imported: an interrupt or an error is no traceback, and not 1.

Importing takes a second, before `cli.main` can look after anything. Of a program that imports
refcurv for itself nothing is changed.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType


def look_after_imports() -> None:
    """As a command: Ctrl-C ends at once, and an error is one line and status 3.

    Proof: tests/test_cli.py::test_what_happens_while_it_is_imported_is_no_traceback
    """
    if os.path.basename(sys.argv[0] if sys.argv else "") in ("refcurv", "-m"):  # noqa: PTH119
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.excepthook = _one_line


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    text = " ".join(f"{kind.__name__}: {error}".split())[:500]
    print(f"refcurv: could not start: {text}", file=sys.stderr, flush=True)
    os._exit(3)
