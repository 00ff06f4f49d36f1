"""The folder of a report: each file in it by name; its figures and its page drawn from results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from refcurv.files.disk import is_kept, make_folders, require_kept, require_writable
from refcurv.files.paths import (
    PathLike,
    is_folder,
    machine_faults,
    mode_of,
    require_apart,
    unfinished,
)
from refcurv.law.checks import EmptyError, SchemaError
from refcurv.report import page, plots
from refcurv.report.cells import Json

FACTORS, BASIS, EDITED, RESULTS = "factors.h5", "basis.h5", "edited.h5", "results.json"
CONTROLS = "controls.jsonl.unfinished"
"""What the search for the controls' strengths has found, until the results are whole."""

CHOICE = "choice.jsonl.unfinished"
"""What was tried on dev to choose a rho, until the results are whole."""

PAGE = "report.html"

TITLE = "Memory and reasoning along the spectrum of loss curvature"

MARK = ("title", "refcurv")
"""Keys of the results of a report, from its beginning on."""

KEPT = MappingProxyType(
    {unfinished(RESULTS): MARK, **dict.fromkeys((CONTROLS, CHOICE), ("format", "version"))}
)
"""What an interrupted report leaves as JSON, and keys by which it is known."""


def outputs(folder: PathLike) -> dict[str, Path]:
    """Every file that a report may write, by what a message calls it."""
    figures = (f"{name}.png" for name in plots.FIGURES)
    kept = (unfinished(FACTORS), *KEPT)
    names = (FACTORS, BASIS, EDITED, RESULTS, PAGE, *kept)
    return {f"{name} of --out": Path(folder) / name for name in (*names, *figures)}


def prepare(folder: PathLike, inputs: Mapping[str, PathLike]) -> Path:
    """The folder, in which every file can be written and none takes an input's place.

    Proof: tests/test_demo.py::test_a_report_refuses_what_it_could_not_judge_before_the_work
    """
    if not os.fspath(folder):
        raise SchemaError("report: --out '' names no folder. Give '.' for the one you are in.")
    folder = Path(folder)
    if mode_of("report", folder) and not is_folder("report", folder):
        raise SchemaError(f"report: {str(folder)!r} is no folder. Name another with --out.")
    make_folders("report", folder)
    files = outputs(folder)
    require_apart("report", files, inputs)
    for path in files.values():
        require_writable("report", path)
    for name, keys in KEPT.items():
        require_kept("report", folder / name, keys)
    _require_own(folder, files.values())
    return folder


def is_report(folder: Path) -> bool:
    """Has it the results of a report, whole or as one has begun them?

    Proof: tests/test_hostile.py::test_what_no_report_has_written_is_not_written_over
    """
    return any(is_kept("report", folder / name, MARK) for name in (RESULTS, unfinished(RESULTS)))


def _require_own(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a folder where a report would write over what no report has written.

    The results of a report, also those of one that was interrupted, say whose the others are.

    Proof: tests/test_hostile.py::test_what_no_report_has_written_is_not_written_over
    """
    for path in () if is_report(folder) else files:
        if path.name not in KEPT and path.name != unfinished(FACTORS) and mode_of("report", path):
            raise SchemaError(
                f"report: {str(path)!r} would be written over, and no report has written it: there "
                f"is no {RESULTS} of one. Move it elsewhere, or name another folder with --out."
            )


def undraw(folder: PathLike) -> None:
    """Remove the page and the figures of earlier results: new ones have taken their place.

    Where drawing fails then, or is stopped, nothing is taken for the new results' page.

    Proof: tests/test_demo.py::test_what_was_evaluated_is_kept
    """
    with machine_faults("report", folder):
        for name in (PAGE, *(f"{name}.png" for name in plots.FIGURES)):
            (Path(folder) / name).unlink(missing_ok=True)


def draw(results: Json, folder: PathLike) -> list[str]:
    """Write the page, and each figure that there is something for; an earlier report's others go.

    Returns:
        The names of all files that the report has now, the page first.

    Proof: tests/test_demo.py::test_everything_is_written,
        tests/test_report.py::test_figures_of_an_earlier_report_go
    """
    folder, drawn = Path(folder), []
    undraw(folder)
    for name, figure_of in plots.FIGURES.items():
        try:
            figure = figure_of(results)
        except EmptyError:  # no populations, no bands
            continue
        plots.save(figure, folder / f"{name}.png")
        drawn.append(f"{name}.png")
    page.write_page(results, folder / PAGE)
    made = {FACTORS, BASIS} & set((results.get("files") or {}).values())  # others were given
    return [PAGE, *sorted([*made, EDITED, RESULTS, *drawn])]
