"""How long work says how far it is; times and sizes in words."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with (done, all) as work proceeds."""


def doing(progress: Progress, what: str) -> None:
    """Say what is being done, where the progress shows it (`refcurv.terminal.progress_bar`)."""
    show = getattr(progress, "doing", None)
    if show is not None:
        show(what)


def uncounted(progress: Progress, what: str) -> None:
    """Say that what follows is not counted: it takes as long as it takes.

    Args: what, what was done and what follows: "3 layers compared; the search for causes".

    Proof: tests/test_cli.py::test_a_search_is_not_counted
    """
    show = getattr(progress, "uncounted", None)
    if show is not None:
        show(what)


def goes_on(progress: Progress, what: str) -> None:
    """Say from what work goes on that an earlier run left, where the progress shows it.

    Proof: tests/test_cli.py::test_what_goes_on_says_so
    """
    show = getattr(progress, "goes_on", None)
    if show is not None:
        show(what)


def gone_on(progress: Progress, what: str) -> Progress:
    """The progress of work whose first call says where it begins, in pieces called `what`.

    If that is not at zero, it goes on from there.
    """
    begun = False

    def told(done: int, total: int) -> None:
        nonlocal begun
        if done and not begun:
            goes_on(progress, f"{what} {done:,} of {total:,}")
        begun = True
        progress(done, total)

    return told


def silent(done: int, total: int) -> None:
    """The progress of what nobody watches."""


def counter(progress: Progress, total: int, begin: int = 0) -> Callable[[], None]:
    """What to call once per finished piece, so that `progress` counts from `begin` to `total`."""
    finished = begin

    def done() -> None:
        nonlocal finished
        finished += 1
        progress(finished, total)

    return done


def span(seconds: float) -> str:
    """A time in words of two digits."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_two(seconds / size)} {name}"
    return f"{_two(seconds)} s"


def _two(x: float) -> str:
    """At least two digits."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def size(count: float) -> str:
    """Bytes with a decimal unit: "512 B", "3.9 MB".

    Proof: tests/test_report.py::test_bytes_have_a_unit
    """
    units = ["TB", "GB", "MB", "kB", "B"]
    while len(units) > 1 and count >= 999.95:
        count /= 1000
        units.pop()
    return f"{count:,.{0 if units[-1] == 'B' else 1}f} {units[-1]}"
