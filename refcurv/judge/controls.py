"""Is it the curvature, or the cutting? Other cuts of the same matrices, at the same perplexity.

How strongly each may cut is found on the dev split, where its perplexity is that of the K-FAC
edit; what is left then is measured on the split that the table reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import refcurv as rc
from refcurv.curvature.bases import Bases
from refcurv.editing.record import EditRecord
from refcurv.evaluation.lines import Lines
from refcurv.evaluation.matching import Match, Strengthen, search, text_perplexity, tradeoff
from refcurv.evaluation.suite import RETAINED, Measurement, finite, measure
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.law.checks import EmptyError, RefcurvError, StorageError
from refcurv.law.conventions import describe
from refcurv.law.words import number_of
from refcurv.model.corpus import Population
from refcurv.progress import Progress, doing, silent, span
from refcurv.sweeps.asked import basis_digest, population_digests
from refcurv.sweeps.methods import STRONGEST, Method, methods

TOLERANCE: Final = 0.005
"""How far apart two perplexities are that count as one."""

STEPS: Final = (-2, -1, 1, 2)
"""Points of a curve beside the compared edit, in powers of `SPREAD`."""

USUAL: Final = 8
"""Strengths that a search tries, about; only estimates of time depend on it."""

SPREAD: Final = MappingProxyType(
    {"kfac": 1.4, "svd": 3.0, "random-pairs": 3.0, "random-basis": 3.0}
)
"""Method → the factor between neighbouring points of its curve."""


def _on(model: rc.Model, way: Method) -> Strengthen:
    """Share removed → edited model: a strength for `matching`."""
    return lambda removed: way.cut(model, removed)[0]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared with what.

    Fields: model, as the table's; light, the same weights in the dtype for searches and curves;
    basis; record of the K-FAC edit; corpus; split of the table; before, after: the unedited model
    and the K-FAC edit on that split; seed of the random controls; seconds that the K-FAC edit's
    measurement took; file, of what is found, None if it is not kept.
    """

    model: rc.Model
    light: rc.Model
    basis: Bases
    record: EditRecord
    corpus: rc.Corpus
    split: str
    before: Measurement
    after: Measurement
    seed: int
    seconds: float = 0.0
    file: Path | None = None


def largest_cut(record: EditRecord) -> float:
    """The share of its curvature mass that the most edited layer loses."""
    return max((1 - row.rho for row in record.layers), default=0.0)


def controls(
    setting: Setting,
    progress: Progress = silent,
    told: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Every cut at the K-FAC edit's dev perplexity, and what each leaves along its strengths.

    `told` hears, before the search, what will be done and about how long it takes. Each
    measurement is kept in `setting.file` at once; a run with the same setting goes on from there.

    Returns:
        Plain values: split; populations; target and tolerance; dtype of searches and curves;
        unedited, compared (one per method, K-FAC first) and curves. Or {"left_out": why}: without
        a `text` population in dev, a `recite` and a `text` one in the split, or a cut.

    Proof: tests/test_demo.py::test_controls_are_matched_on_dev, ::test_curves_pass_the_edit,
        ::test_the_report_of_a_users_own_files, ::test_interrupted_controls_go_on,
        ::test_a_disk_that_fails_under_controls_ends_the_report
    """
    try:
        return _controls(setting, progress, told)
    except StorageError:  # nor could the report be written
        raise
    except RefcurvError as error:  # the report is whole without them
        return {"left_out": str(error).removeprefix("controls: ")}


def _controls(
    setting: Setting, progress: Progress, told: Callable[[str], object]
) -> dict[str, Any]:
    dev_name, dev = _first(setting.corpus, "dev", "text")
    recite_name, recite = _first(setting.corpus, setting.split, "recite")
    text_name, text = _first(setting.corpus, setting.split, "text")
    if not largest_cut(setting.record) > 0:
        raise EmptyError("controls: rho is 1 for every layer, so nothing was cut to compare with.")
    rho = {row.layer: row.rho for row in setting.record.layers}
    known = methods(SPREAD, setting.basis, rho, setting.seed, "controls")
    lines = Lines(setting.file, _facts(setting, rho), fresh=True, who="controls")
    progress(0, 2 * len(known))
    doing(progress, f"K-FAC on {dev_name}")
    begin = time.monotonic()
    target = text_perplexity(rc.edit(setting.light, setting.basis, rho)[0], dev)
    seconds = time.monotonic() - begin
    told(_plan(setting, (dev_name, dev), (recite, text), seconds, len(lines) - 1))
    compared: list[dict[str, Any]] = []
    curves = {}
    for place, way in enumerate(known.values()):
        method, on_light = way.name.replace("-", " "), _on(setting.light, way)
        if way.name == "kfac":
            removed, kept, after = largest_cut(setting.record), setting.record.kept, setting.after
            match = Match(removed, target, target, True, ())
            left = _left(after, recite_name, text_name)
        else:
            match = _matched(lines, way, on_light, target, dev, progress)
            removed = match.strength
            doing(progress, f"{method}: what it leaves")
            found = _measured(lines, setting, way, removed, (recite_name, text_name))
            kept, left = found["kept"], found["left"]
        compared.append({"method": method, **_how(removed, kept, match), **left})
        progress(2 * place + 1, 2 * len(known))
        doing(progress, f"{method}: points of its curve")
        beside = [removed * SPREAD[way.name] ** step for step in STEPS]
        points = _points(lines, way, on_light, [x for x in beside if x < 1], recite, text)
        curves[method] = _curve(points, removed, left)
        progress(2 * place + 2, 2 * len(known))
    return {
        "split": setting.split,
        "populations": {"matched": dev_name, "recitation": recite_name, "perplexity": text_name},
        "target": target,
        "tolerance": TOLERANCE,
        "dtype": setting.light.dtype,
        "unedited": _left(setting.before, recite_name, text_name),
        "compared": compared,
        "curves": curves,
    }


def _facts(setting: Setting, rho: Mapping[str, float]) -> dict[str, Any]:
    """What decides the results (FINGERPRINT)."""
    return {
        "of": "controls", "rho": dict(rho), "seed": setting.seed, "split": setting.split,
        "weights": digest(setting.model), "dtypes": [setting.model.dtype, setting.light.dtype],
        "basis": basis_digest(setting.basis, rho),
        "populations": population_digests(setting.corpus),
        "law": describe(), **store.machine(),
    }  # fmt: skip


def _plan(
    setting: Setting, on: tuple[str, Population], drawn: Iterable[Population], seconds: float,
    known: int,
) -> str:  # fmt: skip
    """What will be done, and about how long it takes, from one edit's `seconds` on dev."""
    (dev, population), others = on, len(SPREAD) - 1
    tokens = sum(p.tokens.size for p in drawn) / population.tokens.size
    points = len(SPREAD) * len(STEPS) * tokens
    took = seconds * (others * USUAL + points) + others * setting.seconds
    text = (
        f"controls: {others} other ways to cut are tried, about {USUAL} strengths each, until "
        f"they cost what K-FAC costs on {dev}; then {len(STEPS)} points of each curve: about "
        f"{span(took)}. What is found is kept: interrupted, the same command goes on"
    )
    return text + (f". {number_of(known, 'measurement')} are known already" if known else "")


def _matched(
    lines: Lines, way: Method, on_light: Strengthen, target: float, dev: Population,
    progress: Progress,
) -> Match:  # fmt: skip
    """The strength at which a method has the perplexity; each trial is kept."""
    count = 0

    def trial(removed: float) -> float:
        nonlocal count
        count += 1
        name = way.name.replace("-", " ")
        doing(progress, f"{name}: strength {count} of about {max(count, USUAL)}")
        key = {"method": way.name, "removed": removed}
        value = lines.once(
            "trial", key, lambda: {"value": finite(text_perplexity(on_light(removed), dev))}
        )["value"]
        return math.inf if value is None else float(value)

    return search(trial, target, weakest=way.weakest, strongest=STRONGEST, tolerance=TOLERANCE)


def _measured(
    lines: Lines, setting: Setting, way: Method, removed: float, names: tuple[str, str]
) -> dict[str, Any]:
    """The share of pairs that a cut keeps, and what it leaves of each population."""

    def make() -> dict[str, Any]:
        edited, record = way.cut(setting.model, removed)
        after = measure(edited, setting.corpus, split=setting.split)
        return {"kept": record.kept, "left": _left(after, *names)}

    return lines.once("edit", {"method": way.name, "removed": removed}, make)


def _points(
    lines: Lines, way: Method, on_light: Strengthen, strengths: Iterable[float],
    recite: Population, text: Population,
) -> list[dict[str, Any]]:  # fmt: skip
    """Points of a curve; each is kept."""

    def point(removed: float) -> dict[str, Any]:
        key = {"method": way.name, "removed": removed}
        made = lines.once(
            "point", key,
            lambda: {"point": tradeoff(on_light, [removed], recite, text)[0].to_json()},
        )  # fmt: skip
        return dict(made["point"])

    return [point(removed) for removed in strengths]


def _first(corpus: rc.Corpus, split: str, kind: str) -> tuple[str, Population]:
    """The first population of a split and kind."""
    for name, one in corpus.populations.items():
        if isinstance(one, Population) and (one.split, one.kind) == (split, kind):
            return name, one
    raise EmptyError(
        f"controls: the corpus has no population of kind {kind!r} in split {split!r}. Strengths "
        "are matched on a dev text; recitation and perplexity are reported on the table's split."
    )


def _how(removed: float, kept: float, match: Match) -> dict[str, Any]:
    """How strongly was cut, and how near it came to the target."""
    return {
        "removed": removed,
        "kept": kept,
        "dev_perplexity": finite(match.perplexity),
        "matched": match.matched,
        "verdict": match.verdict,
        "tried": [[removed, finite(value)] for removed, value in match.tried],
    }


def _left(found: Measurement, recite: str, text: str) -> dict[str, Any]:
    """Strict recitation or accuracy, or perplexity, of every population, and how sure they are."""
    values = {
        name: finite(one.values[RETAINED.get(one.kind, "perplexity")])
        for name, one in found.populations.items()
    }
    intervals = {
        name: [finite(end) for end in one.interval]
        for name, one in found.populations.items()
        if one.interval is not None
    }
    return {
        "recitation": values[recite], "perplexity": values[text], "values": values,
        "intervals": intervals, "items": {n: one.items for n, one in found.populations.items()},
    }  # fmt: skip


def _curve(
    points: list[dict[str, Any]], removed: float, left: dict[str, Any]
) -> list[dict[str, Any]]:
    """The curve's points and the compared edit between them, weakest first."""
    for point in points:
        point["removed"] = point.pop("strength")
    chosen = {what: left[what] for what in ("recitation", "perplexity")} | {"removed": removed}
    return sorted([*points, chosen], key=lambda point: float(point["removed"]))
