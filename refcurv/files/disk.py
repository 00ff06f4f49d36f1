"""Paths, faults of the machine, texts: what every file needs, whatever its format."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from refcurv.law.checks import SchemaError, StorageError

PathLike = str | os.PathLike[str]

READING: Final = "Check the disk and the permissions."
WRITING: Final = "Check space and permissions; nothing that existed was changed."


@contextmanager
def machine_faults(who: str, path: PathLike, hint: str = READING) -> Iterator[None]:
    """Turn an OSError (disk full, permission, read error) into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else one_line(error)
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


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(who: str, path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour takes its place when it is complete.

    Raises:
        SchemaError: its folder does not exist. StorageError: the machine could not write.

    Proof: tests/test_report.py::test_writing_is_atomic
    """
    target = output_path(who, path)
    with machine_faults(who, path, WRITING):
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:80]}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


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
