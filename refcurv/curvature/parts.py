"""Layers of a file that is being made, in files of their own until all are there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from refcurv.curvature.fingerprint import advised, require_told, told
from refcurv.files.disk import (
    make_folder,
    parse_json,
    read_bytes,
    remove_folder,
    strangers,
    write_json,
)
from refcurv.files.lazy import Lazy
from refcurv.files.paths import is_folder, machine_faults, mode_of, unfinished
from refcurv.law.checks import ConventionError, SchemaError, StorageError

RUN = "run.json"
Layer = TypeVar("Layer")


@dataclass(frozen=True, slots=True)
class Parts(Generic[Layer]):
    """A folder beside an output: `run.json` says of which run (FINGERPRINT), the rest are layers.

    Fields: who, for messages; folder, which may not be there yet; facts, of this run; names, of all
    its layers; layers, what lies in it, each read when asked for.
    """

    who: str
    folder: Path
    facts: Mapping[str, Any]
    names: Collection[str]
    layers: Mapping[str, Layer]

    def is_own(self, name: str) -> bool:
        """Is this the name of a file that the run writes?"""
        return name == RUN or (name.endswith(".h5") and name.removesuffix(".h5") in self.names)


def open_parts(
    who: str,
    path: str | Path,
    facts: Mapping[str, Any],
    names: Iterable[str],
    load: Callable[[Path], Mapping[str, Layer]],
) -> Parts[Layer]:
    """What an earlier run of the same facts left of the output `path`.

    Args: names, of the layers that the run will have; load, opens a file of layers.

    Raises:
        ConventionError: it is of another run; says what differs; or, when a layer is read, another
        run has removed it meanwhile. SchemaError: it is damaged, or no run left it.

    Proof: tests/test_streaming.py::test_a_killed_run_goes_on, ::test_damaged_parts_are_refused,
        tests/test_resumed_bases.py::test_what_another_run_removes_meanwhile,
        ::test_a_strangers_folder_is_refused_and_kept
    """
    folder = Path(f"{unfinished(path)}.layers")
    empty: Parts[Layer] = Parts(who, folder, facts, frozenset(names), {})
    if not _is_begun(empty):
        return empty
    where = f"{who}: {str(folder)!r}"
    found: dict[str, Mapping[str, Layer]] = {}
    for file in sorted(folder.glob("*.h5")):
        with advised(who):
            some = load(file)
        if found.keys() & some.keys() or min(some) != file.stem:
            raise SchemaError(f"{where}: {file.name} holds other layers than its own: delete it.")
        found |= dict.fromkeys(some, some)

    def read(name: str) -> Layer:
        try:
            with advised(who):
                return found[name][name]
        except (SchemaError, StorageError):
            if mode_of(who, folder / f"{min(found[name])}.h5"):
                raise
            raise _gone(who, name, folder) from None

    return replace(empty, layers=Lazy(list(found), read))


def _is_begun(parts: Parts[Any]) -> bool:
    """Has this run begun the folder? SchemaError if anything lies there that no run writes."""
    who, folder = parts.who, parts.folder
    where = f"{who}: {str(folder)!r}"
    with machine_faults(who, folder):
        is_link = folder.is_symlink()
    if is_link or (mode_of(who, folder) and not is_folder(who, folder)):
        raise SchemaError(
            f"{where} is in the way of the layers kept. Move it, or name another output."
        )
    begun = bool(mode_of(who, folder / RUN))
    if begun:
        _require_ours(who, folder, parts.facts)
    # run.json comes first and goes last: without it no layers are of any run
    if strange := strangers(who, folder, parts.is_own if begun else {RUN}.__contains__):
        raise SchemaError(
            f"{where} is where layers are kept, and {strange[0]!r:.100} in it is not known to be "
            "of any run. Move it elsewhere, or name another output."
        )
    return begun


def add_part(
    parts: Parts[Layer], layers: Mapping[str, Layer], save: Callable[[Path], object]
) -> None:
    """Keep some layers, which `save` writes; the first time also what run they are of.

    Raises:
        ConventionError: another run has begun the same output meanwhile. StorageError: it cannot
        be kept, or another run has removed the folder meanwhile.

    Proof: tests/test_streaming.py::test_two_runs_of_one_output_do_not_mix,
        tests/test_resumed_bases.py::test_what_another_run_removes_meanwhile
    """
    first = not mode_of(parts.who, parts.folder / RUN)
    if not first:
        _require_ours(parts.who, parts.folder, parts.facts)
    try:
        if first:
            _remove(parts)  # nothing says whose layers are in it
            make_folder(parts.who, parts.folder)
            write_json(json.loads(told(parts.facts)), parts.folder / RUN)
        save(parts.folder / f"{min(layers)}.h5")
    except (SchemaError, StorageError):
        if not mode_of(parts.who, parts.folder):
            where = f"{parts.who}: {str(parts.folder)!r}"
            raise StorageError(
                f"{where} was removed by another run of this output. Run "
                "the command again, if that is not what was wanted."
            ) from None
        if first:
            _remove(parts)
        raise


def require_all(parts: Parts[Layer], names: Iterable[str]) -> None:
    """ConventionError unless all these layers are there: another run may have removed them."""
    gone = [name for name in names if name not in parts.layers]
    if gone:
        raise _gone(parts.who, gone[0], parts.folder)


def _gone(who: str, layer: str, folder: Path) -> ConventionError:
    return ConventionError(
        f"{who}: {layer!r} is no longer in {str(folder)!r}. Did another run make the same output "
        "meanwhile? If that is not what was wanted, run the command again."
    )


def _require_ours(who: str, folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse the layers of another run."""
    where, known = f"{who}: {str(folder)!r}", folder / RUN
    theirs = parse_json(f"{where}: {RUN}", read_bytes(who, known))
    require_told(where, facts, theirs)


def discard(parts: Parts[Layer]) -> None:
    """The output is whole: its parts go, and nothing else.

    Proof: tests/test_resumed_bases.py::test_what_a_stranger_adds_meanwhile_is_kept
    """
    if not _remove(parts):
        warnings.warn(
            f"{parts.who}: {str(parts.folder)!r} stays, for something in it is not of this run",
            stacklevel=2,
        )


def _remove(parts: Parts[Any]) -> bool:
    """Remove what the run wrote; is the folder gone?"""
    return remove_folder(parts.who, parts.folder, parts.is_own, RUN)
