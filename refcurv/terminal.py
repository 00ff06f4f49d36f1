"""What a person or a log sees: one line for an error or a warning, progress, and broken streams."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from refcurv.law.checks import LONGEST
from refcurv.law.words import number_of
from refcurv.progress import span

_MOST = LONGEST + 100
"""Letters of one line: an error, behind who says it, or a warning of any length."""

_COLUMNS = 80
"""Of a line on a terminal."""

_ROWS = 24
"""Of a terminal that does not say how many it has."""

_FLOATS = "(overflow|underflow|invalid value|divide by zero) encountered in"
"""What NumPy says of floats. Whoever reads a number that is not finite says so in one line."""

_SECONDS = 60
"""Between two lines of progress in a log."""


@contextmanager
def streams() -> Iterator[None]:
    """Any text can be printed, a warning is one line, and what was printed is out at the end.

    A reader that leaves, as in `| head`, ends nothing but the printing. Raises OSError where what
    was printed cannot be written.

    Proof: tests/test_cli.py::test_no_text_is_too_strange_to_print,
        ::test_a_reader_that_leaves_ends_nothing_but_the_printing
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")
    out, sys.stdout = sys.stdout, None if sys.stdout is None else _Patient(sys.stdout)
    _clock.begin()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _FLOATS, RuntimeWarning)
            warnings.showwarning = _warn
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    _flush()
                raise
            _flush()
    finally:
        sys.stdout = out
        _clock.end()


class _Patient(io.TextIOBase):
    """A stream that takes everything when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As much as is read."""
        with suppress(BrokenPipeError), _named():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """What is buffered of what is read."""
        try:
            self._stream.flush()
        except BrokenPipeError:  # what is left in the buffer must go somewhere
            _drop(self._stream)

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding


def say(message: str) -> None:
    """One line on stderr, in the place of a bar that stands there.

    Proof: tests/test_cli.py::test_a_message_has_a_line_of_its_own
    """
    if sys.stderr is None:
        return
    try:
        for bar in list(_bars):
            bar.clear()
        line = f"refcurv: {_line(message)}"
        print(_wrapped(line) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, or there is no room
        _drop(sys.stderr)


@contextmanager
def interrupts() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the command, whatever Python does; a second one at once.

    The first lets what is at work end and a collection keep its sums; where that takes a while, a
    line says so. The second waits for nothing.
    An interrupt inside a destructor or a weak reference's callback is dropped by Python with a
    traceback: the next call of a progress raises it again (`_raise_lost`).

    Proof: tests/test_cli.py::test_an_interrupt_that_python_drops_is_raised_by_the_next_progress,
        ::test_an_interrupt_that_takes_a_while_says_so
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        if _interrupted.is_set():
            with suppress(OSError):
                os.write(2, b"refcurv: interrupted again: stopped at once\n")
            os._exit(130)
        _interrupted.set()
        with suppress(RuntimeError):  # no thread can be had: then nothing is said
            ending.start()
        raise KeyboardInterrupt

    def quiet(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(dropped)

    _interrupted.clear()
    ending = threading.Timer(_PATIENCE, say, [_ENDING])
    ending.daemon = True
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, hook = {one: signal.signal(one, stop) for one in numbers}, sys.unraisablehook
    sys.unraisablehook = quiet
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = hook
        ending.cancel()
        _interrupted.clear()


_interrupted = threading.Event()

_PATIENCE = 1.0
"""Seconds for which an interrupted command may say nothing."""

_ENDING = "interrupted: it stops when what is at work has ended; once more stops it at once"


def _raise_lost() -> None:
    if _interrupted.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def progress_bar(
    label: str, tokens: int | None = None, pieces: str = ""
) -> Callable[[int, int], None]:
    """What to call with (done, all): a bar on a terminal, in a log a line a minute of all of them.

    Args: pieces, what is counted, where that is to be said: "layers".

    Its `doing` says what is being done: beside the bar, or at the end of the line, which otherwise
    says how long the rest will take; and how fast `tokens` pass, if there are so many in all. Its
    `goes_on` says from what, in a line of its own. Its `uncounted` says what follows when all is
    counted, until the last call.

    Proof: tests/test_cli.py::test_progress_goes_into_a_log_too,
        ::test_progress_says_what_is_being_done, ::test_short_steps_are_told_of_too
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return _Bar(label, pieces)
    log = _Log(label, tokens, pieces)
    _clock.watch(log)
    return log


class _Clock:
    """When the next line of a log is due, whatever steps it has, and of which step it will be.

    Within a command a thread looks at it: nothing else does in a step that takes long.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._heard: _Log | None = None
        self._over: threading.Event | None = None
        self._looked_at = False

    def begin(self) -> None:
        """A command begins."""
        self._last, self._over = time.monotonic(), threading.Event()

    def end(self) -> None:
        """It is over, and so is what looks at the clock."""
        if self._over is not None:
            self._over.set()
        self._heard, self._over, self._looked_at = None, None, False

    def watch(self, log: _Log) -> None:
        """A step begins."""
        self._heard = log
        if self._over is not None and not self._looked_at:
            self._looked_at = True
            threading.Thread(target=_remind, args=(self, self._over), daemon=True).start()

    def hear(self, log: _Log) -> None:
        """A step is alive."""
        self._heard = log
        self.tell()

    def tell(self) -> float:
        """A line of the step that was heard last, if one is due; seconds until the next one is."""
        now, log = time.monotonic(), self._heard
        if now - self._last >= _SECONDS:
            self._last = now
            if log is not None:
                say(log.line(now))
        return self._last + _SECONDS - now


_clock = _Clock()
"""Of this process."""


def _remind(clock: _Clock, over: threading.Event) -> None:
    """Look at the clock whenever a line is due, until the command is over."""
    while not over.wait(clock.tell()):
        pass


class _Log:
    """A step whose progress goes into a log, by the `_clock`."""

    def __init__(self, label: str, tokens: int | None, pieces: str) -> None:
        self._label, self._what, self._tokens = label, "", tokens
        self._pieces, self._uncounted = pieces and f"{pieces} ", ""
        self._begin = time.monotonic()
        self._pace = _Pace()
        self._now = (0, 0)

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        _raise_lost()
        self._now = (done, total)
        if total:
            self._pace.hear(done, time.monotonic())
        _clock.hear(self)

    def doing(self, what: str) -> None:
        """What is being done."""
        _raise_lost()
        self._what = what
        _clock.hear(self)

    def goes_on(self, what: str) -> None:
        """From what it goes on."""
        say(_going_on(self._label, what))

    def uncounted(self, what: str) -> None:
        """What follows."""
        self._uncounted, self._what = what, ""

    def line(self, now: float) -> str:
        """How far it is."""
        done, total = self._now
        so_far = f"{done:,} of {total:,} {self._pieces}" if total else ""
        after = f"{so_far}after {now - self._begin:,.0f} s{self._rest(now)}"
        if self._uncounted:
            after = f"{self._uncounted}, after {now - self._begin:,.0f} s"
        return ": ".join(filter(None, (self._label, after, self._what)))

    def _rest(self, now: float) -> str:
        """How fast it goes, and how long the rest will take."""
        done, total = self._now
        speed = self._pace.speed(done, now)
        if not speed:
            return ""
        rate = round(self._tokens * speed / total) if self._tokens else 0
        tokens = f", {number_of(rate, 'token')}/s" if self._tokens else ""
        left = f", about {span((total - done) / speed)} left"
        return tokens + (left if done < total and not self._what else "")


class _Pace:
    """How fast a step goes, once it has begun.

    What it did within its first second may have been left by an earlier run: it is read, not done,
    and took no time. A step that says again how much it had done then begins now.
    """

    def __init__(self) -> None:
        self._until = math.inf
        self._begin, self.before = 0.0, 0

    def hear(self, done: int, now: float) -> None:
        """So much is done."""
        if self._until == math.inf:
            self._until = now + _FIRST
        elif now > self._until and done > self.before:
            return
        self._begin, self.before = now, done

    def speed(self, done: int, now: float) -> float:
        """Pieces a second; 0 where that cannot be said."""
        took = now - self._begin
        return max(done - self.before, 0) / took if took > 0 else 0.0


_FIRST = 1.0
"""Seconds within which a step has read all that an earlier run left of it."""


def _going_on(label: str, what: str) -> str:
    return f"{label}: goes on from {what}, which an earlier run left"


def end_bars() -> None:
    """What is not done will not be: its bar stays as it is, on a line of its own.

    Proof: tests/test_cli.py::test_a_message_has_a_line_of_its_own
    """
    for bar in list(_bars):
        with suppress(OSError):
            bar.close()


_bars: weakref.WeakSet[_Bar] = weakref.WeakSet()
"""Those that are not done."""

_COUNTED, _TIME = "{l_bar}{bar}| {n_fmt}/{total_fmt}", " [{elapsed}{postfix}]"

_BESIDE = 34
"""Letters of a line that are neither bar nor text: its name, counts and the time."""

_SOON = 0.1
"""Seconds that a rate needs; what took none has none."""


class _Bar:
    """A bar, and what is being done."""

    def __init__(self, label: str, pieces: str) -> None:
        self._label, self._pieces, self._uncounted = label, pieces and f" {pieces}", ""
        self._bar: Any = None
        self._pace = _Pace()

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        _raise_lost()
        bar = self._shown()
        bar.total = total
        now = time.monotonic()
        self._pace.hear(done, now)
        bar.initial, bar.speed = self._pace.before, self._pace.speed(done, now)
        bar.update(done - bar.n)
        if done >= total:
            bar.set_postfix_str("")
            self.close()

    def doing(self, what: str) -> None:
        """What is being done."""
        _raise_lost()
        columns = _shape()[0] or _COLUMNS
        room = columns * 3 // 4 - _BESIDE - len(self._pieces)  # a quarter is the bar's
        if self._uncounted:
            room = max(columns - _BESIDE - len(self._uncounted), 1)
        self._shown().set_postfix_str(what if len(what) <= room else f"{what[: room - 1]}…")

    def goes_on(self, what: str) -> None:
        """From what it goes on."""
        say(_going_on(self._label, what))

    def uncounted(self, what: str) -> None:
        """What follows, in a line of its own below the bar."""
        self._uncounted, self._bar = what, None
        self._shown()

    def clear(self) -> None:
        """Leave the line to something else; the next update draws the bar again."""
        self._bar.clear()

    def close(self) -> None:
        """Draw it a last time."""
        self._bar.close()
        _bars.discard(self)

    def _shown(self) -> Any:
        if self._bar is None:
            columns, rows = _shape()
            desc = ": ".join(filter(None, (f"{self._label:>10}", self._uncounted)))
            self._bar = _paced()(
                desc=desc, file=sys.stderr, bar_format=self._no_rate,
                ncols=None if columns else _COLUMNS, nrows=None if rows else _ROWS,
            )  # fmt: skip
            _bars.add(self)
        paced = self._bar.format_dict["elapsed"] >= _SOON and not self._bar.postfix
        self._bar.bar_format = None if paced and not self._uncounted else self._no_rate
        return self._bar

    @property
    def _no_rate(self) -> str:
        return "{desc}" + _TIME if self._uncounted else _COUNTED + self._pieces + _TIME


def _paced() -> type[Any]:
    """tqdm's bars with a pace of ours."""
    from tqdm import tqdm

    class Paced(tqdm):  # type: ignore[type-arg]
        """A bar whose `speed` is told."""

        speed = 0.0

        @property
        def format_dict(self) -> dict[str, Any]:
            return {**super().format_dict, "rate": self.speed or None}

    return Paced


def _shape() -> tuple[int, int]:
    """Columns and rows of the terminal; 0 where it does not say: a bar would be cut to nothing."""
    try:
        shape = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return 0, 0
    return shape.columns, shape.lines


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"warning: {message} ({Path(filename).name}:{lineno})")


def _line(message: str) -> str:
    """On one line, nothing in it that a terminal obeys, and not too long."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    left = len(text) - _MOST
    return f"{text[: _MOST * 3 // 4]} … {text[left + _MOST * 3 // 4 + 3 :]}" if left > 0 else text


def _wrapped(line: str) -> str:
    """For eyes: broken at the ends of words. A log has it on one line, for programs.

    Proof: tests/test_cli.py::test_a_message_is_broken_at_the_ends_of_words_on_a_terminal
    """
    whole = line.replace("pip install ", f"pip{_TIED}install{_TIED}")  # so that it can be copied
    return textwrap.fill(
        whole, _COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).replace(_TIED, " ")


_TIED = "\N{NO-BREAK SPACE}"


def _flush() -> None:
    """Flush what was printed; what cannot be is dropped, or Python would try again at exit."""
    if sys.stdout is None:
        return
    try:
        with _named():
            sys.stdout.flush()
    except OSError:
        _drop(sys.stdout)
        raise


@contextmanager
def _named() -> Iterator[None]:
    """Within, a fault says that it is one of standard output."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _drop(stream: TextIO) -> None:
    """From now on the stream's file is nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
