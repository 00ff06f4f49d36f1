"""The command line: it runs one command, and every fault is one line and an exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from refcurv import terminal
from refcurv.algebra import buffers
from refcurv.commands import COMMANDS
from refcurv.commands.arguments import parser
from refcurv.commands.values import files
from refcurv.files.disk import require_writable
from refcurv.files.paths import READING, reason, require_apart
from refcurv.law.checks import RefcurvError

DONE, JUDGED_AND_FAILED, BAD_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130

TRACEBACK = "REFCURV_TRACEBACK"
"""The environment variable that asks for the traceback of a bug."""

FAULTS = (
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors of the operating system that no other input would have spared."""

GOES_ON = ("collect", "decompose", "recite", "sweep", "report", "demo")
"""The commands that go on where an interrupted one was."""

FOLDERS = ("report", "demo", "export", "cases")
"""The commands that write a folder; of the others `files` says what they write."""

HOUSE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Every error is one line on stderr."""
    with terminal.interrupts():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    command, writes = "", False
    try:
        with terminal.streams():
            args = parser(COMMANDS).parse_args(arguments)
            command, writes = args.command, args.command in FOLDERS or bool(files(args)[1])
            _require_targets(args)
            buffers.with_buffers(1)
            good = args.work(args)
        return JUDGED_AND_FAILED if good is False else DONE
    except KeyboardInterrupt:
        hint = "; each output is the old one or the new one, whole" * writes
        again = f". Give the same command again: {command} goes on from whatever it has kept"
        return _fail(f"interrupted{hint}" + again * (command in GOES_ON), INTERRUPTED)
    except Exception as error:
        said, status = _sentence(error)
        return _fail(_by_command(said, command), status)


def _sentence(error: Exception) -> tuple[str, int]:
    """What an error says in one line, and its exit status: never that of a judgement."""
    if isinstance(error, RefcurvError):
        return str(error), error.status
    if isinstance(error, MemoryError):
        hint = "Fewer --layers, or --dtype float32, need less"
        return f"out of memory: {error}. {hint}", MACHINE
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return f"{error}: too little memory for it, or too many threads (`ulimit -a`)", MACHINE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        machine = error.errno in FAULTS
        return f"{where}{reason(error)}. {READING}", MACHINE if machine else BAD_INPUT
    if isinstance(error, ImportError):
        return f"{error}: a package that refcurv needs is missing or broken; install it", MACHINE
    return _bug(error), MACHINE


def _by_command(said: str, command: str) -> str:
    """What a function of Python says, as what the command says; a step keeps its own name.

    Proof: tests/test_cli.py::test_an_error_names_the_command_that_was_given
    """
    import refcurv as rc

    name, colon, rest = said.partition(": ")
    steps = {work.__name__ for work in COMMANDS}
    return f"{command}: {rest}" if command and colon and name in {*rc.__all__} - steps else said


def _bug(error: Exception) -> str:
    """What nobody foresaw: not the input's fault. With REFCURV_TRACEBACK the traceback first."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = [(Path(frame.filename), frame.lineno) for frame in frames]
    inside = [(path.relative_to(HOUSE.parent), at) for path, at in places if HOUSE in path.parents]
    place = ":".join(map(str, (inside or places)[-1]))
    said = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
    return (
        f"{said} (at {place}). This is a bug of refcurv, whatever the input: please report this "
        f"line, with the traceback that {TRACEBACK}=1 prints"
    )


def _require_targets(args: argparse.Namespace) -> None:
    """Before the work: every output can be written, and takes the place of no input."""
    reads, writes = files(args)
    require_apart(args.command, {**_of_folder(args), **writes}, reads)
    for path in writes.values():
        require_writable(args.command, path)


def _of_folder(args: argparse.Namespace) -> dict[str, Path]:
    """What `report` and `demo` write into their folder."""
    if not hasattr(args, "out"):
        return {}
    from refcurv.report.folder import outputs

    return outputs(args.out)


def _fail(message: str, status: int) -> int:
    terminal.end_bars()
    terminal.say(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
