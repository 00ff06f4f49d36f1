"""Arrays by key in a file that nobody else sees, for what memory shall not hold."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path

import numpy as np

from refcurv.files.disk import unnamed_file
from refcurv.files.paths import WRITING, machine_faults
from refcurv.law.checks import Array


class Scratch(MutableMapping[Hashable, Array]):
    """A mapping whose arrays lie in a file without a name; it is gone when the process is.

    What is put in is written at once, and each access reads it anew. The place of what is removed
    serves the next array of the same size. Threads may use it together.

    Args: folder, on whose disk the file lies; who, for messages.

    Raises:
        StorageError: the disk is full, or cannot be written or read.

    Proof: tests/test_streaming.py::test_a_scratch_file_is_a_mapping_of_arrays,
        ::test_what_is_read_of_a_scratch_file_is_not_written_over
    """

    def __init__(self, folder: Path, who: str = "collect") -> None:
        self._folder, self._who = folder, who
        self._file = unnamed_file(who, folder)
        self._places: dict[Hashable, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def __setitem__(self, key: Hashable, array: Array) -> None:
        data = np.ascontiguousarray(array)
        with self._lock:
            self._release(key)
            place = self._place(data.nbytes)
        with machine_faults(self._who, self._folder, WRITING):
            view, at = data.reshape(-1).view(np.uint8).data, place
            while view:
                written = os.pwrite(self.fileno(), view, at)
                view, at = view[written:], at + written
        with self._lock:
            self._places[key] = (place, data.dtype, data.shape)

    def __getitem__(self, key: Hashable) -> Array:
        with self._lock, machine_faults(self._who, self._folder):  # its place is given to no other
            place, dtype, shape = self._places[key]
            array = np.empty(shape, dtype)
            view, at = array.reshape(-1).view(np.uint8).data, place
            while view:
                read = os.preadv(self.fileno(), [view], at)
                if not read:
                    raise OSError("the scratch file is shorter than what was written to it")
                view, at = view[read:], at + read
        return array

    def __delitem__(self, key: Hashable) -> None:
        with self._lock:
            if key not in self._places:
                raise KeyError(key)
            self._release(key)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def fileno(self) -> int:
        """Of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def _release(self, key: Hashable) -> None:
        """What lay at the key is gone, and its place is free."""
        if key in self._places:
            place, dtype, shape = self._places.pop(key)
            self._free.setdefault(dtype.itemsize * int(np.prod(shape)), []).append(place)

    def _place(self, nbytes: int) -> int:
        """Where so many bytes may lie."""
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        place, self._end = self._end, self._end + nbytes
        return place
