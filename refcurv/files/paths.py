"""Paths: what is at them, where an output goes, and what the machine says against it, in a line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from refcurv.law.checks import SchemaError, StorageError
from refcurv.progress import size

PathLike = str | os.PathLike[str]

READING: Final = "Check the disk and the permissions."
WRITING: Final = "Check space and permissions; nothing that existed was changed."
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


def as_path(who: str, path: PathLike) -> Path:
    """`path` as a Path, wherever it leads; SchemaError for what is no path.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    _resolved(who, path)
    return Path(path)


def output_path(who: str, path: PathLike) -> Path:
    """Where an output goes, links resolved; SchemaError unless its folder exists.

    The folder is looked for as it is spelled, too: without a folder "no" there is no "no/../x".

    Proof: tests/test_disk.py::test_no_path_leads_through_a_folder_that_is_not_there
    """
    target = _resolved(who, path)
    for folder in (Path(path).parent, target.parent):
        require_folder(who, folder)
    return target


def require_folder(who: str, folder: Path) -> None:
    """SchemaError unless a folder is there."""
    if not is_folder(who, folder):
        if mode_of(who, folder):
            raise SchemaError(f"{who}: {str(folder)!r} is no folder. Give another path.")
        raise SchemaError(f"{who}: the folder {str(folder)!r} does not exist. Create it first.")


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


def one_line(error: BaseException) -> str:
    """The text of an error in one line of bounded length, without addresses and the final stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())
    return text[:200].rstrip(".") or type(error).__name__
