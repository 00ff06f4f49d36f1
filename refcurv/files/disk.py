"""Reading and writing: an input is a regular file, an output is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from refcurv.files.paths import (
    WRITING,
    PathLike,
    machine_faults,
    mode_of,
    one_line,
    output_file,
    output_path,
    require_file,
    require_folder,
)
from refcurv.law.checks import ConventionError, SchemaError

HDF5: Final = b"\x89HDF\r\n\x1a\n"
"""How an HDF5 file begins."""

_IN_PLACE: Final = "What was written is in its place, but a power cut may undo it. Check the disk."

_TRIES: Final = 100
"""Chosen: how often a folder is removed that another run fills meanwhile, with a file a time."""

_PARTIAL: Final = re.compile(r"\.refcurv-[0-9a-f]{8}-[0-9a-f]{12}\.partial")
"""Names of files that are being written (`_partial`)."""


def make_folders(who: str, path: PathLike) -> None:
    """Make a folder and those above it, as far as they are missing; but none to leave it by "..".

    Proof: tests/test_disk.py::test_no_path_leads_through_a_folder_that_is_not_there
    """
    parts = Path(path).parts
    if ".." in parts:
        above = len(parts) - parts[::-1].index("..")
        require_folder(who, Path(*parts[:above]))
    with machine_faults(who, path):
        Path(path).mkdir(parents=True, exist_ok=True)


def require_kept(who: str, path: PathLike, keys: Collection[str]) -> None:
    """SchemaError if something else lies where a run keeps what it knows: JSON that has these keys.

    Asked before the work, for the run would write over it, and remove it at the end. Of lines of
    JSON the first one counts.

    Proof: tests/test_hostile.py::test_what_a_run_would_write_over_is_refused
    """
    with machine_faults(who, path):
        there = bool(mode_of(who, path)) and Path(path).stat().st_size > 0
    if there and not is_kept(who, path, keys):
        raise SchemaError(
            f"{who}: {os.fspath(path)!r} is where a run keeps what it knows, and it is "
            "something else. Move it elsewhere, or name another output."
        )


def is_kept(who: str, path: PathLike, keys: Collection[str]) -> bool:
    """Is it a file of JSON, or of lines of it, whose first value has these keys?

    Proof: tests/test_hostile.py::test_what_a_run_would_write_over_is_refused
    """
    if not mode_of(who, path):
        return False
    data = read_bytes(who, path)
    for text in (data, data.partition(b"\n")[0]):
        with suppress(SchemaError):
            found = parse_json(who, text)
            return isinstance(found, dict) and set(keys) <= set(found)
    return False


@contextmanager
def alone(who: str, folder: PathLike) -> Iterator[None]:
    """While a run writes many files into a folder, no other run of its kind does.

    Raises:
        ConventionError: another one is at it, in this process or in any.

    A run that dies gives the folder free. Where the file system has no locks, nothing is refused.

    Proof: tests/test_disk.py::test_two_runs_do_not_write_into_one_folder
    """
    with machine_faults(who, folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConventionError(
            f"{who}: another run is writing into {os.fspath(folder)!r}. Wait until it has ended, "
            "or name another folder."
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


class NewFile(io.FileIO):
    """A file that is being written: `write` takes all that it is given, or says why it cannot.

    The system itself may take less at one time, and never takes more than 2 GiB.

    Proof: tests/test_disk.py::test_a_write_takes_everything_or_says_why
    """

    def __init__(self, descriptor: int, who: str, path: PathLike) -> None:
        super().__init__(descriptor, "r+", closefd=False)
        self._who, self._path = who, path

    def write(self, data: Any) -> int:
        """All of `data`."""
        view, done = memoryview(data), 0
        if view.nbytes:  # what is empty cannot be cast
            view = view.cast("B")
        with machine_faults(self._who, self._path, WRITING):
            while done < view.nbytes:
                done += os.write(self.fileno(), view[done:])
        return done

    def truncate(self, size: int | None = None) -> int:
        """The system's, with its faults in one line."""
        with machine_faults(self._who, self._path, WRITING):
            return super().truncate(size)


@contextmanager
def replacing(who: str, path: PathLike) -> Iterator[NewFile]:
    """A new file, open for writing, that takes the place of `path` when the block ends well.

    `path` holds its old bytes or its new ones, never half (`_beside`). A symbolic link is followed.
    The file has the permissions of the one that it replaces, else those that the umask leaves.

    Raises:
        SchemaError: the folder does not exist, or `path` is no regular file.
        StorageError: the machine could not write. The message says which file is there now: the
            old one, or the new one where only the last sync failed.

    Proof: tests/test_disk.py::test_a_killed_writer_leaves_nothing_behind_the_next_one,
        tests/test_reports_files.py::test_a_replaced_file_keeps_its_permissions
    """
    with _beside(who, path, output_file(who, path), _make_file) as (_, descriptor):
        with NewFile(descriptor, who, path) as file:  # closed before its descriptor is another's
            yield file


@contextmanager
def new_folder(who: str, path: PathLike) -> Iterator[Path]:
    """An empty folder that is renamed to `path` when the block ends well, as `replacing` does.

    Nothing may be at `path`, or an empty folder, whose permissions it takes. The files in it are
    written with `replacing`, so that they are on the disk before the folder is renamed.

    Raises:
        SchemaError, StorageError: as `output_path`; the machine could not write.

    Proof: tests/test_disk.py::test_a_killed_writer_of_a_folder_leaves_nothing_behind_the_next_one
    """
    with _beside(who, path, output_path(who, path), _make_folder) as (folder, _):
        with machine_faults(who, path, WRITING):
            yield folder


def make_folder(who: str, path: PathLike) -> None:
    """Make a folder, unless it is there."""
    with machine_faults(who, path, WRITING):
        Path(path).mkdir(exist_ok=True)


def strangers(who: str, folder: PathLike, ours: Callable[[str], bool]) -> list[str]:
    """What lies in a folder beside regular files of our names, and what `replacing` left there."""
    with machine_faults(who, folder), suppress(FileNotFoundError), os.scandir(folder) as found:
        return sorted(one.name for one in found if not _is_ours(one, ours))
    return []


def _is_ours(one: os.DirEntry[str], ours: Callable[[str], bool]) -> bool:
    named = ours(one.name) or _PARTIAL.fullmatch(one.name) is not None
    return named and one.is_file(follow_symlinks=False)


def remove_folder(who: str, path: PathLike, ours: Callable[[str], bool], last: str = "") -> bool:
    """Remove our files from a folder, also what another run puts there now, and the empty folder.

    Args: ours, is it the name of a file of ours? last, the file that goes last.

    Returns:
        Is the folder gone, or was there none? What is not ours stays, and the folder with it.

    Proof: tests/test_disk.py::test_a_folder_that_is_being_filled_is_removed,
        ::test_what_is_not_ours_stays_in_a_folder
    """
    with machine_faults(who, path, WRITING):
        for _ in range(_TRIES):
            try:
                with os.scandir(path) as found:
                    names = [one.name for one in found if _is_ours(one, ours)]
                for name in sorted(names, key=last.__eq__):
                    Path(path, name).unlink(missing_ok=True)  # another run removes it as well
                Path(path).rmdir()
            except FileNotFoundError:
                return True
            except OSError as error:  # another run fills it, or something is not ours
                if error.errno != errno.ENOTEMPTY:
                    raise
                if strangers(who, path, ours):
                    return False
            else:
                return True
        Path(path).rmdir()
    return True


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for what nobody keeps; it is gone when the object is."""
    return tempfile.TemporaryDirectory(prefix="refcurv-")


def unnamed_file(who: str, folder: PathLike) -> IO[bytes]:
    """A file without a name on the disk of `folder`, for what nobody keeps; gone when closed."""
    with machine_faults(who, folder, WRITING):
        return tempfile.TemporaryFile(prefix=".refcurv-", dir=folder, buffering=0)


def require_writable(who: str, path: PathLike) -> Path:
    """`output_file`, after a trial that a file can be made there. Asked before the work.

    Raises:
        SchemaError, StorageError: as `replacing`.

    Proof: tests/test_disk.py::test_a_target_that_cannot_be_written_is_refused_at_once
    """
    target = output_file(who, path)
    with machine_faults(who, path, WRITING):
        partial = _partial(target)
        os.close(_make_file(partial))
        partial.unlink(missing_ok=True)  # another writer may have taken it for left over
    return target


# ------------------------------------------------------------------ the old or the new, never half


@contextmanager
def _beside(
    who: str, path: PathLike, target: Path, make: Callable[[Path], int]
) -> Iterator[tuple[Path, int]]:
    """A new file or folder beside `target`, and its descriptor. Every output is written this way.

    When the block ends well, it is synced and renamed to `target`. When the block fails, it is
    removed. It is locked until then. A writer that is killed leaves it without a lock; the next
    writer of `target` removes it then, and only then.

    Raises:
        SchemaError, StorageError: as `output_path`; the machine could not write.

    Proof: tests/test_kills.py::test_every_writer_killed_at_any_step_leaves_the_old_or_the_new
    """
    partial = _partial(target)
    try:
        with machine_faults(who, path, WRITING):
            _remove_left_over(target)
            descriptor = _locked(partial, make)
        try:
            _take_permissions(descriptor, target)
            yield partial, descriptor
            with machine_faults(who, path, WRITING):
                os.fsync(descriptor)
                partial.replace(target)
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise
    with machine_faults(who, path, _IN_PLACE):
        _sync_folder(target.parent)


def _make_file(partial: Path) -> int:
    """A new file, open for reading and writing."""
    return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _make_folder(partial: Path) -> int:
    """A new folder, opened."""
    while True:
        partial.mkdir()
        with suppress(FileNotFoundError):  # taken for left over, and removed, before it was opened
            return os.open(partial, os.O_RDONLY)


def _locked(partial: Path, make: Callable[[Path], int]) -> int:
    """What `make` makes, locked until its descriptor is closed.

    Another writer may take it for left over before it is locked. That writer holds the lock until
    it has removed it. It is then made anew.

    Proof: tests/test_reports_files.py::test_what_is_taken_for_a_dead_writers_is_made_anew
    """
    while True:
        descriptor = make(partial)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if partial.exists():
            return descriptor
        os.close(descriptor)


def _take_permissions(descriptor: int, target: Path) -> None:
    """Take over the permissions of `target`, before anything is written that is not for everybody.

    The owner of a folder may always write to it.

    Proof: tests/test_disk.py::test_a_folder_takes_the_permissions_of_the_empty_one_there
    """
    with suppress(OSError):  # there is none, or a file system without permissions
        mode = target.stat().st_mode
        own = stat.S_IMODE(mode) | stat.S_IRWXU if stat.S_ISDIR(mode) else mode & 0o777
        os.fchmod(descriptor, own)


def _remove_left_over(target: Path) -> None:
    """Remove the partial files and folders of writers of `target` that have died.

    Proof: tests/test_disk.py::test_what_was_made_anew_meanwhile_is_not_removed
    """
    for partial in target.parent.glob(_partial(target, "*").name):
        with suppress(OSError):  # somebody's who lives, or not ours
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), partial.lstat()):  # not made anew since
                    _remove(partial)
            finally:
                os.close(descriptor)


def _remove(partial: Path) -> None:
    """Remove a file, or a folder and what is in it."""
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _partial(target: Path, which: str = "") -> Path:
    """A name for the new file beside `target`; with `which` "*", the pattern of all such names."""
    of = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return target.with_name(f".refcurv-{of}-{which or secrets.token_hex(6)}.partial")


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------ bytes and texts


def write_bytes(who: str, path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        SchemaError, StorageError: as `replacing`.

    Proof: tests/test_report.py::test_writing_is_atomic
    """
    with replacing(who, path) as file:
        file.write(data)


def write_json(data: object, path: PathLike) -> None:
    """Write JSON, UTF-8, whole or not at all; half a character in a text becomes "?".

    Raises:
        SchemaError, StorageError: as `write_bytes`.

    Proof: tests/test_report.py::test_json_is_written_whole
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes("write", path, f"{text}\n".encode("utf-8", "replace"))


def write_json_lines(rows: Iterable[object], path: PathLike) -> None:
    """Write a JSON value a line, as `write_json`.

    Proof: tests/test_recited.py::test_the_command_line
    """
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_bytes("write", path, "".join(lines).encode("utf-8", "replace"))


@contextmanager
def reading(who: str, path: PathLike) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading. Every input is opened this way, in folders too.

    tests/test_disk.py::test_nothing_but_disk_opens_files looks for others.

    Raises:
        SchemaError: as `require_file`. StorageError: the machine cannot read it.

    Proof: tests/test_hostile.py::test_a_pipe_within_a_folder_is_refused
    """
    require_file(who, path)
    with machine_faults(who, path), Path(path).open("rb") as file:
        yield file


def read_bytes(who: str, path: PathLike) -> bytes:
    """All bytes of a regular file; raises as `reading`."""
    with reading(who, path) as file:
        return file.read()


def identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time: changes when the file is replaced or written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with reading("sha256", path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_addressable(shape: Iterable[int], itemsize: int) -> bool:
    """Can NumPy make an array of this shape? Where one length is 0, the others still count."""
    return math.prod(n or 1 for n in shape) * itemsize < 2**63


def parse_json(where: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text`; SchemaError for anything else, duplicate keys and NaN included.

    `where` begins the error: the command and the file, once.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{where} is not valid JSON: {one_line(error)}.") from None
    if not isinstance(data, dict):
        raise SchemaError(f"{where} must be a JSON object; got {type(data).__name__}.")
    return data
