"""What every file needs, whatever its format: paths, faults of the machine, whole writing."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from refcurv.law.checks import SchemaError, StorageError
from refcurv.progress import size

PathLike = str | os.PathLike[str]

HDF5: Final = b"\x89HDF\r\n\x1a\n"
"""How an HDF5 file begins."""

READING: Final = "Check the disk and the permissions."
WRITING: Final = "Check space and permissions; nothing that existed was changed."
_IN_PLACE: Final = "What was written is in its place, but a power cut may undo it. Check the disk."

_TRIES: Final = 100
"""Chosen: how often a folder is removed that another run fills meanwhile, with a file a time."""

_PARTIAL: Final = re.compile(r"\.refcurv-[0-9a-f]{8}-[0-9a-f]{12}\.partial")
"""Names of files that are being written (`_partial`)."""

_NO_PATH: Final = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""Errors that the path itself causes: a name that is too long, links that lead in a circle, a file
where a folder should be."""


@contextmanager
def machine_faults(who: str, path: PathLike, hint: str = READING) -> Iterator[None]:
    """Turn an OSError (disk full, permission, read error) into a StorageError of one line.

    A path that no file can have is a SchemaError: the machine is not at fault.

    Proof: tests/test_reports_files.py::test_a_path_that_no_file_can_have_is_bad_input
    """
    try:
        yield
    except OSError as error:
        what = f"{who}: {os.fspath(path)!r}: {reason(error)}."
        if error.errno in _NO_PATH:
            raise SchemaError(f"{what} Give another path.") from None
        raise StorageError(f"{what} {hint}", errno=error.errno) from error


def reason(error: OSError) -> str:
    """Why the operating system refused, in its own words."""
    return os.strerror(error.errno) if error.errno else one_line(error)


def mode_of(who: str, path: PathLike) -> int:
    """The type and permissions of what is at a path, links followed; 0 where nothing is.

    Path.exists and Path.is_dir are no substitutes. For what may not be looked at they raise in
    some versions of Python, and say no in others.

    Raises:
        SchemaError: no file can have this path. StorageError: it may not be looked at.

    Proof: tests/test_disk.py::test_what_may_not_be_looked_at_is_not_called_missing
    """
    with machine_faults(who, path):
        try:
            return Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            _resolved(who, path)  # says so where the working folder is gone
            return 0
        except (TypeError, ValueError) as error:  # no text, or a NUL in it
            told = path if isinstance(error, TypeError) else os.fspath(path)
            what = f"{who}: {told!r:.100} is no path"
            raise SchemaError(f"{what}: {one_line(error)}.") from None


def is_folder(who: str, path: PathLike) -> bool:
    """Is a folder there? Raises as `mode_of`."""
    return stat.S_ISDIR(mode_of(who, path))


def _resolved(who: str, path: PathLike) -> Path:
    """The place that a path leads to through its links; SchemaError for what is no path."""
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError:
        raise _nowhere(who, path) from None
    except (TypeError, ValueError) as error:  # no text, or a NUL in it
        told = path if isinstance(error, TypeError) else os.fspath(path)
        raise SchemaError(f"{who}: {told!r:.100} is no path: {one_line(error)}.") from None


def _nowhere(who: str, path: PathLike) -> SchemaError:
    """The error for a path from a working folder that is gone."""
    return SchemaError(
        f"{who}: {os.fspath(path)!r} leads from the folder that you are in, which was removed. "
        "Go to another, or give the whole path."
    )


def output_path(who: str, path: PathLike) -> Path:
    """Where an output goes, links resolved; SchemaError unless its folder exists.

    The folder is looked for as it is spelled, too: without a folder "no" there is no "no/../x".

    Proof: tests/test_disk.py::test_no_path_leads_through_a_folder_that_is_not_there
    """
    target = _resolved(who, path)
    for folder in (Path(path).parent, target.parent):
        _require_folder(who, folder)
    return target


def _require_folder(who: str, folder: Path) -> None:
    if not is_folder(who, folder):
        if mode_of(who, folder):
            raise SchemaError(f"{who}: {str(folder)!r} is no folder. Give another path.")
        raise SchemaError(f"{who}: the folder {str(folder)!r} does not exist. Create it first.")


def make_folders(who: str, path: PathLike) -> None:
    """Make a folder and those above it, as far as they are missing; but none to leave it by "..".

    Proof: tests/test_disk.py::test_no_path_leads_through_a_folder_that_is_not_there
    """
    parts = Path(path).parts
    if ".." in parts:
        above = len(parts) - parts[::-1].index("..")
        _require_folder(who, Path(*parts[:above]))
    with machine_faults(who, path):
        Path(path).mkdir(parents=True, exist_ok=True)


def output_file(who: str, path: PathLike) -> Path:
    """`output_path` of a file; SchemaError where something else is, such as a folder."""
    target = output_path(who, path)
    mode = mode_of(who, target)
    if mode and not stat.S_ISREG(mode):
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise SchemaError(f"{who}: {str(target)!r} {kind}. Give the name of a file.")
    return target


def require_apart(
    who: str, outputs: Mapping[str, PathLike], inputs: Mapping[str, PathLike]
) -> None:
    """SchemaError if an output would replace an input or another output. Links are resolved.

    `outputs` and `inputs` map what a message calls a file to its path.

    Proof: tests/test_cli.py::test_no_output_may_take_the_place_of_an_input
    """
    written: dict[str, Path] = {}
    for name, path in outputs.items():
        target = _resolved(who, path)
        for other, known in {**inputs, **written}.items():
            if _same_file(target, _resolved(who, known)):
                raise SchemaError(
                    f"{who}: {name} {os.fspath(path)!r} is the same file as {other}, which it "
                    "would destroy. Give another name."
                )
        written[name] = target


def _same_file(one: Path, other: Path) -> bool:
    """The same place, or two hard links to one file."""
    try:
        return one == other or one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def unfinished(path: PathLike) -> str:
    """Beside an output: where what is known of it is kept until it is whole."""
    return f"{os.fspath(path)}.unfinished"


def beside(path: PathLike, *whats: str) -> dict[str, Path]:
    """Where several files are kept beside OUT.jsonl, also `unfinished`: {what: OUT.what.h5}."""
    path = Path(os.fspath(path).removesuffix(unfinished("")))
    stem = str(path).removesuffix(path.suffix)  # "." and "/" have no name to replace
    return {what: Path(f"{stem}.{what}.h5") for what in whats}


def require_kept(who: str, path: PathLike) -> None:
    """SchemaError if something other than JSON lies where a run keeps what it knows as JSON.

    Asked before the work, for the run would write over it, and remove it at the end.

    Proof: tests/test_hostile.py::test_what_a_run_would_write_over_is_refused
    """
    if mode_of(who, path):
        with reading(who, path) as file:
            if file.read(1) not in (b"", b"{"):
                raise SchemaError(
                    f"{who}: {os.fspath(path)!r} is where a run keeps what it knows, and it is "
                    "something else. Move it elsewhere, or name another output."
                )


def free_bytes(path: PathLike) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    with machine_faults("write", path, WRITING):
        return shutil.disk_usage(_resolved("write", path).parent).free


def require_space(who: str, path: PathLike, nbytes: int) -> None:
    """StorageError if the disk of `path` has not so many bytes free. Asked before the work."""
    free = free_bytes(path)
    if nbytes > free:
        raise StorageError(
            f"{who}: {os.fspath(path)!r} will take {size(nbytes)}, but its disk has "
            f"{size(free)} free. Make room, or take fewer layers."
        )


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


def input_path(path: PathLike) -> Path:
    """An input's absolute path; SchemaError unless a regular file is there."""
    require_file("open", path)
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise _nowhere("open", path) from None


def require_file(who: str, path: PathLike) -> None:
    """SchemaError unless a regular file is there: who opens a pipe waits for its other end."""
    mode, found = mode_of(who, path), Path(path)
    if not mode:
        raise SchemaError(f"{who}: there is no file {str(found)!r}.")
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise SchemaError(f"{who}: {str(found)!r} is {what}; a file is needed.")


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


def one_line(error: BaseException) -> str:
    """The text of an error in one line of bounded length, without addresses and the final stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())
    return text[:200].rstrip(".") or type(error).__name__
