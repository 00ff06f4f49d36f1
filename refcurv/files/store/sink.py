"""The file object that HDF5 writes to, which never fails inside HDF5."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from refcurv.files.disk import NewFile

_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)


class Sink:
    """The file that HDF5 writes to: it keeps the first failure to itself and never fails.

    HDF5 does not survive a write that fails. It cannot close the file, tries again at exit, and
    dies there by SIGSEGV (seen with h5py 3.16, HDF5 2.0, under RLIMIT_FSIZE). After a failure this
    file takes everything and keeps nothing. `check` then raises what happened.

    Ctrl-C is such a failure, and so is a SIGTERM that somebody handles. While HDF5 works what their
    handler raises is only noted (`shielded`): h5py's callbacks would turn it into a RuntimeError.
    """

    def __init__(self, raw: NewFile) -> None:
        self._raw = raw
        self._failure: BaseException | None = None

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Within, an interrupt is this file's failure. What HDF5 raises after one is hidden."""

        def noting(handler: Callable[[int, FrameType | None], object]) -> Any:
            def note(number: int, frame: FrameType | None) -> None:
                try:
                    handler(number, frame)
                except KeyboardInterrupt as interrupt:
                    self._failure = self._failure or interrupt

            return note

        main = threading.current_thread() is threading.main_thread()  # no other meets interrupts
        handlers = {number: signal.getsignal(number) for number in _INTERRUPTS if main}
        handled = {number: one for number, one in handlers.items() if callable(one)}
        try:
            for number, one in handled.items():
                signal.signal(number, noting(one))
            yield
        except Exception:
            if self._failure is None:  # else HDF5 missed what this file did not keep
                raise
        finally:
            for number, one in handled.items():
                signal.signal(number, one)

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    # What h5py calls of a file.

    def write(self, data: Any) -> int:
        """Take everything; after a failure keep nothing."""
        try:
            if self._failure is None:
                self._raw.write(data)
        except BaseException as failure:
            self._failure = failure
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        """As `write`."""
        try:
            if self._failure is None:
                return self._raw.truncate(size)
        except BaseException as failure:
            self._failure = failure
        return size or 0

    def read(self, size: int = -1) -> bytes:
        """The file's own; h5py takes only what has it for a file."""
        return self._raw.read(size)

    def readinto(self, buffer: Any) -> int:
        """The file's own."""
        return self._raw.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        """The file's own."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """The file's own."""
        return self._raw.tell()

    def flush(self) -> None:
        """Nothing is buffered; `replacing` syncs at the end."""
