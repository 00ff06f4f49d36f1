"""Is it the curvature, or the cutting? Other cuts of the same matrices, at the same perplexity.

How strongly each may cut is found on the dev split, where its perplexity is that of the K-FAC
edit; what is left then is measured on the split that the table reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import refcurv as rc
from refcurv.curvature.bases import Bases
from refcurv.editing.record import EditRecord
from refcurv.evaluation.matching import Match, Strengthen, at_perplexity, text_perplexity, tradeoff
from refcurv.evaluation.suite import RETAINED, Measurement, finite, measure
from refcurv.law.checks import EmptyError, RefcurvError
from refcurv.model.corpus import Population
from refcurv.progress import Progress, silent
from refcurv.sweeps.methods import STRONGEST, Method, methods

TOLERANCE: Final = 0.005
"""How far apart two perplexities are that count as one."""

STEPS: Final = (-2, -1, 1, 2)
"""Points of a curve beside the compared edit, in powers of `SPREAD`."""


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
    and the K-FAC edit on that split; seed of the random controls.
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


def largest_cut(record: EditRecord) -> float:
    """The share of its curvature mass that the most edited layer loses."""
    return max((1 - row.rho for row in record.layers), default=0.0)


def controls(setting: Setting, progress: Progress = silent) -> dict[str, Any]:
    """Every cut at the K-FAC edit's dev perplexity, and what each leaves along its strengths.

    Returns:
        Plain values: split; populations; target and tolerance; dtype of searches and curves;
        unedited, compared (one per method, K-FAC first) and curves. Or {"left_out": why}: without
        a `text` population in dev, a `recite` and a `text` one in the split, or a cut.

    Proof: tests/test_demo.py::test_controls_are_matched_on_dev, ::test_curves_pass_the_edit,
        ::test_the_report_of_a_users_own_files
    """
    try:
        return _controls(setting, progress)
    except RefcurvError as error:  # the report is whole without them
        return {"left_out": str(error)}


def _controls(setting: Setting, progress: Progress) -> dict[str, Any]:
    dev_name, dev = _first(setting.corpus, "dev", "text")
    recite_name, recite = _first(setting.corpus, setting.split, "recite")
    text_name, text = _first(setting.corpus, setting.split, "text")
    if not largest_cut(setting.record) > 0:
        raise EmptyError("controls: rho is 1 for every layer, so nothing was cut to compare with.")
    rho = {row.layer: row.rho for row in setting.record.layers}
    target = text_perplexity(rc.edit(setting.light, setting.basis, rho)[0], dev)
    compared, curves = [], {}
    known = methods(SPREAD, setting.basis, rho, setting.seed, "controls")
    progress(0, 2 * len(known))
    for place, way in enumerate(known.values()):
        method, on_light = way.name.replace("-", " "), _on(setting.light, way)
        if way.name == "kfac":
            removed, record, after = largest_cut(setting.record), setting.record, setting.after
            match = Match(removed, target, target, True, ())
        else:
            match = at_perplexity(
                on_light, target, dev, weakest=way.weakest, strongest=STRONGEST,
                tolerance=TOLERANCE,
            )  # fmt: skip
            removed = match.strength
            edited, record = way.cut(setting.model, removed)
            after = measure(edited, setting.corpus, split=setting.split)
        left = _left(after, recite_name, text_name)
        compared.append({"method": method, **_how(removed, record, match), **left})
        progress(2 * place + 1, 2 * len(known))
        beside = [removed * SPREAD[way.name] ** step for step in STEPS]
        points = tradeoff(on_light, [x for x in beside if x < 1], recite, text)
        curves[method] = _curve([point.to_json() for point in points], removed, left)
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


def _first(corpus: rc.Corpus, split: str, kind: str) -> tuple[str, Population]:
    """The first population of a split and kind."""
    for name, one in corpus.populations.items():
        if isinstance(one, Population) and (one.split, one.kind) == (split, kind):
            return name, one
    raise EmptyError(
        f"controls: the corpus has no population of kind {kind!r} in split {split!r}. Strengths "
        "are matched on a dev text; recitation and perplexity are reported on the table's split."
    )


def _how(removed: float, record: EditRecord, match: Match) -> dict[str, Any]:
    """How strongly was cut, and how near it came to the target."""
    return {
        "removed": removed,
        "kept": record.kept,
        "dev_perplexity": finite(match.perplexity),
        "matched": match.matched,
        "verdict": match.verdict,
        "tried": [[removed, finite(value)] for removed, value in match.tried],
    }


def _left(found: Measurement, recite: str, text: str) -> dict[str, Any]:
    """Strict recitation or accuracy, or perplexity, of every population."""
    values = {
        name: finite(one.values[RETAINED.get(one.kind, "perplexity")])
        for name, one in found.populations.items()
    }
    return {"recitation": values[recite], "perplexity": values[text], "values": values}


def _curve(
    points: list[dict[str, Any]], removed: float, left: dict[str, Any]
) -> list[dict[str, Any]]:
    """The curve's points and the compared edit between them, weakest first."""
    for point in points:
        point["removed"] = point.pop("strength")
    chosen = {what: left[what] for what in ("recitation", "perplexity")} | {"removed": removed}
    return sorted([*points, chosen], key=lambda point: float(point["removed"]))
