"""Paths, faults of the machine, texts: what every file needs, whatever its format."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from refcurv.law.checks import SchemaError, StorageError

PathLike = str | os.PathLike[str]

READING: Final = "Check the disk and the permissions."
WRITING: Final = "Check space and permissions; nothing that existed was changed."

_NO_PATH: Final = (errno.ENAMETOOLONG, errno.ELOOP)
"""What the path itself is to blame for: a name that is too long, links that lead in a circle."""


@contextmanager
def machine_faults(who: str, path: PathLike, hint: str = READING) -> Iterator[None]:
    """Turn an OSError (disk full, permission, read error) into a StorageError of one line.

    A path that no file can have is a SchemaError: the machine is not at fault.

    Proof: tests/test_reports_files.py::test_a_path_that_no_file_can_have_is_bad_input
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else one_line(error)
        if error.errno in _NO_PATH:
            raise SchemaError(f"{who}: {os.fspath(path)!r}: {reason}. Give another path.") from None
        raise StorageError(
            f"{who}: {os.fspath(path)!r}: {reason}. {hint}", errno=error.errno
        ) from error


def output_path(who: str, path: PathLike) -> Path:
    """Where an output goes, links resolved; SchemaError unless its folder exists."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a NUL in the path
        raise SchemaError(f"{who}: {os.fspath(path)!r} is no path: {one_line(error)}.") from None
    with machine_faults(who, path):
        if target.parent.is_dir():
            return target
    raise SchemaError(f"{who}: the folder {str(target.parent)!r} does not exist. Create it first.")


def output_file(who: str, path: PathLike) -> Path:
    """`output_path` of a file; SchemaError where something else is, such as a folder."""
    target = output_path(who, path)
    with machine_faults(who, path, WRITING):
        if target.exists() and not target.is_file():
            kind = "is a folder" if target.is_dir() else "is no regular file"
            raise SchemaError(f"{who}: {str(target)!r} {kind}. Give the name of a file.")
    return target


def require_apart(
    who: str, outputs: Mapping[str, PathLike], inputs: Mapping[str, PathLike]
) -> None:
    """SchemaError where an output would replace an input or another output, links resolved.

    Both map what a file is for, as a message may call it, to where it is.

    Proof: tests/test_cli.py::test_no_output_may_take_the_place_of_an_input
    """
    written: dict[str, Path] = {}
    for name, path in outputs.items():
        target = Path(os.path.realpath(path))
        for other, known in {**inputs, **written}.items():
            if _same_file(target, Path(os.path.realpath(known))):
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


def free_bytes(path: PathLike) -> int:
    """Bytes free on the disk that `path` lies on, or would."""
    with machine_faults("write", path, WRITING):
        return shutil.disk_usage(Path(os.path.realpath(path)).parent).free


def require_space(who: str, path: PathLike, nbytes: int) -> None:
    """StorageError, before the work, where `path` could not hold so many bytes."""
    free = free_bytes(path)
    if nbytes > free:
        raise StorageError(
            f"{who}: {os.fspath(path)!r} will take {nbytes / 1e9:.2f} GB, but its disk has "
            f"{free / 1e9:.2f} GB free. Make room, or take fewer layers."
        )


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(who: str, path: PathLike) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` when the block ends well.

    It lies beside `path` until then, on the disk before it is renamed, so that `path` holds its old
    bytes or its new ones, never half. It is locked for as long as this process lives: the next
    writer of `path` removes what a killed one left. A symbolic link is followed. It has the
    permissions of the file that it replaces, else those that the umask leaves.

    Raises:
        SchemaError: the folder does not exist, or `path` is no regular file.
        StorageError: the machine could not write; the old file, if any, is untouched.

    Proof: tests/test_disk.py::test_a_killed_writer_leaves_nothing_behind_the_next_one,
        tests/test_reports_files.py::test_a_replaced_file_keeps_its_permissions
    """
    target = output_file(who, path)
    partial = _partial(target)
    try:
        with machine_faults(who, path, WRITING):
            _remove_left_over(target)
            raw = _locked(partial)
        with raw:
            _take_permissions(raw, target)
            yield raw
            with machine_faults(who, path, WRITING):
                os.fsync(raw.fileno())
                partial.replace(target)
                sync_folder(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_writable(who: str, path: PathLike) -> Path:
    """`output_file`, once a file could be made there: asked before the work, not after it.

    Raises:
        SchemaError, StorageError: as `replacing`.

    Proof: tests/test_disk.py::test_a_target_that_cannot_be_written_is_refused_at_once
    """
    target = output_file(who, path)
    with machine_faults(who, path, WRITING):
        partial = _partial(target)
        with _locked(partial):
            partial.unlink()
    return target


@contextmanager
def new_folder(who: str, path: PathLike) -> Iterator[Path]:
    """An empty folder that is renamed to `path` when the block ends well, as `replacing` does.

    Nothing may be at `path`, or an empty folder. What is written into it must be synced.

    Raises:
        SchemaError, StorageError: as `output_path`; the machine could not write.

    Proof: tests/test_disk.py::test_a_killed_writer_of_a_folder_leaves_nothing_behind_the_next_one
    """
    target = output_path(who, path)
    partial = _partial(target)
    with machine_faults(who, path, WRITING):
        try:
            _remove_left_over(target)
            descriptor = _locked_folder(partial)
            try:
                yield partial
                sync_folder(partial)
                partial.rename(target)
                sync_folder(target.parent)
            finally:
                os.close(descriptor)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _locked(partial: Path) -> BinaryIO:
    """A new file, and its lock, which ends when the file is closed."""
    while True:
        raw = partial.open("x+b", buffering=0)
        if _still_there(partial, raw.fileno()):
            return raw
        raw.close()


def _locked_folder(partial: Path) -> int:
    """A new folder, opened, and its lock, which ends when it is closed."""
    while True:
        partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # as below, before it could be opened
            continue
        if _still_there(partial, descriptor):
            return descriptor
        os.close(descriptor)


def _still_there(partial: Path, descriptor: int) -> bool:
    """Once locked: did nobody take what was just made for something left, before it was locked?

    Who did has locked it until it is removed, and is waited for.

    Proof: tests/test_reports_files.py::test_what_is_taken_for_a_dead_writers_is_made_anew
    """
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return partial.exists()


def _take_permissions(raw: BinaryIO, target: Path) -> None:
    """Those of `target`, before anything is written that not everybody may read."""
    with suppress(OSError):  # there is none, or a file system without permissions
        os.fchmod(raw.fileno(), target.stat().st_mode & 0o777)


def _remove_left_over(target: Path) -> None:
    """Remove the partial files and folders of writers of `target` that are no more alive.

    Proof: tests/test_disk.py::test_what_was_made_anew_meanwhile_is_not_removed
    """
    for partial in target.parent.glob(_partial(target, "*").name):
        with suppress(OSError):  # somebody's who lives, or not ours
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), partial.lstat()):  # not made anew since
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            finally:
                os.close(descriptor)


def _partial(target: Path, which: str = "") -> Path:
    """A name for the new file beside `target`; with `which` "*", the pattern of all such names."""
    of = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return target.with_name(f".refcurv-{of}-{which or secrets.token_hex(6)}.partial")


def write_bytes(who: str, path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        SchemaError, StorageError: as `replacing`.

    Proof: tests/test_report.py::test_writing_is_atomic
    """
    with replacing(who, path) as file, machine_faults(who, path, WRITING):
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def write_json(data: object, path: PathLike) -> None:
    """Write JSON, UTF-8, whole or not at all; half a character in a text becomes "?".

    Raises:
        SchemaError, StorageError: as `write_bytes`.

    Proof: tests/test_report.py::test_json_is_written_whole
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes("write", path, f"{text}\n".encode("utf-8", "replace"))


def input_path(path: PathLike) -> Path:
    """An input's absolute path; SchemaError unless a regular file is there."""
    found = Path(path)
    with machine_faults("open", path):
        try:
            mode = found.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise SchemaError(f"open: there is no file {str(found)!r}.") from None
        except ValueError as error:  # a NUL in the path
            raise SchemaError(f"open: {str(found)!r} is no path: {one_line(error)}.") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise SchemaError(f"open: {str(found)!r} is {what}; a file is needed.")
    return found.absolute()


def identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time: changes when the file is replaced or written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with machine_faults("sha256", path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(who: str, what: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text`; SchemaError for anything else, duplicate keys and NaN included."""

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
        raise SchemaError(f"{who}: {what} is not valid JSON: {one_line(error)}.") from None
    if not isinstance(data, dict):
        raise SchemaError(f"{who}: {what} must be a JSON object; got {type(data).__name__}.")
    return data


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length, without the final stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:200].rstrip(".") or type(error).__name__
