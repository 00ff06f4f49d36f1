"""A and G of one layer, theirs beside the truth: by what no choice of scale can change, first.

(c A, G/c) is the same K, so that A/tr A, G/tr G and the one number tr A · tr G come before A and G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.factors import Factor
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.case import Case
from refcurv.judge.differences import apart
from refcurv.judge.drawn import DEVIATIONS, LITTLE, NO_DRAWING, RARE, UNKNOWN, Drawing, deviations
from refcurv.judge.dump import Theirs
from refcurv.judge.verdict import (
    BY_DRAWING,
    EQUAL_AS,
    FAIL,
    LEFT_OUT,
    MISSING,
    PASS,
    UNDECIDED,
    Comparison,
)
from refcurv.law.checks import Array
from refcurv.law.words import number_of

TELLING = 0.1
"""Chosen: a larger error has the size of no dtype, whatever a layer's roundings could add up to."""

HALF = 0.5
"""What a factor of 1/2 is off by: a budget of as much hides it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One side of one layer, X' theirs and X ours.

    Fields: form, |X'/tr X' − X/tr X| over |X/tr X|; ratio, tr X'/tr X; whole, |X' − X| over |X|;
    rows, n'/n or None. Where theirs is 0 so is X'/tr X', and two zeros agree. Where a trace that is
    not 0 is not positive, form is infinite and ratio NaN.
    """

    form: float
    ratio: float
    whole: float
    rows: float | None


def measure(theirs: Array, ours: Array, n_theirs: float | None, n_ours: int) -> Measured:
    """The three distances of one side; both (X, X), theirs finite."""
    rows, ratio = None if n_theirs is None else n_theirs / n_ours, factor_of(theirs, ours)
    if not theirs.any():
        return Measured(1.0, ratio, 1.0, rows) if ours.any() else Measured(0.0, ratio, 0.0, rows)
    form, whole = math.inf, math.inf
    size = float(norm(ours))
    if size:
        whole = apart(theirs, ours) / size
    if not math.isnan(ratio):
        form = apart(theirs, ours, ratio) / size
    return Measured(form, ratio, whole, rows)


def factor_of(theirs: Array, ours: Array) -> float:
    """`Measured.ratio` alone, which needs no norm; both (X, X), theirs finite."""
    if not theirs.any():
        return 0.0 if ours.any() else 1.0
    tr_theirs, tr_ours = float(np.trace(theirs)), float(np.trace(ours))
    return tr_theirs / tr_ours if tr_ours > 0 and 0 < tr_theirs < math.inf else math.nan


def compare_moments(bounds: Bounds, theirs: Theirs) -> tuple[list[Comparison], dict[str, Measured]]:
    """All comparisons of A and G of one layer, and the numbers behind them, by side.

    Proof: tests/test_judge.py::test_the_truth_passes,
        ::test_a_factor_is_measured_and_fails
    """
    case, layer, ours = bounds.case, bounds.layer, bounds.case.ours(bounds.layer)
    A, G = case.means(layer)
    other = any(getattr(theirs, part) is not None for part in ("U_A", "U_G", "mask", "W"))
    drawn = {"A": 0.0, "G": bounds.drawing.form}
    out: list[Comparison] = []
    found: dict[str, Measured] = {}
    for side, given, n_theirs, own, n_ours in (
        ("A", theirs.A, theirs.n_A, A, ours.n_A),
        ("G", theirs.G, theirs.n_G, G, ours.n_G),
    ):
        true = np.diag(own) if own.ndim == 1 else own  # of a table
        if given is None:
            verdict = LEFT_OUT if other else MISSING
            out.append(said(layer, side, verdict, f"the dump has no {side} of this layer"))
            continue
        X = np.diag(given) if given.ndim == 1 and len(given) == len(true) else given
        trouble = _unfit(side, X, true)
        if trouble:
            out.append(said(layer, side, FAIL, trouble))
            continue
        found[side] = one = measure(X, true, n_theirs, n_ours)
        out.append(_symmetry(bounds, side, X))
        form = f"{side} has another form: no factor makes it ours"
        limit = bounds.of_side(side)
        out.append(
            bounds.judged(f"{side}/tr {side}", one.form, form, drawing=drawn[side], budget_of=limit)
        )
        out.append(_rows(case, layer, side, n_theirs))
        if side == "A" and layer in case.joint:
            out.append(_corner(bounds, X, true))
    return out + _scales(bounds, found), found


def _unfit(side: str, X: Array, true: Array) -> str:
    """Why theirs cannot be compared; empty if it can."""
    if X.shape != true.shape:
        return f"{side} is {X.shape}; ours is {true.shape}"
    bad = int((~np.isfinite(X)).sum())
    return (
        f"{bad} of the {number_of(X.size, 'entry', 'entries')} of {side} are not finite"
        if bad
        else ""
    )


def said(layer: str, quantity: str, verdict: str, cause: str) -> Comparison:
    """A comparison without a number."""
    return Comparison(layer, quantity, None, None, verdict, None, cause)


def _symmetry(bounds: Bounds, side: str, X: Array) -> Comparison:
    size, skew = float(norm(X)), _skew(X)
    error = skew / size if size else 0.0
    text = f"{side} is not symmetric"
    return bounds.judged(f"symmetry of {side}", error, text, budget_of=bounds.of_side(side))


def _skew(X: Array, tile: int = 512) -> float:
    """|X − Xᵀ|, tile by tile: the transpose of a large matrix as a whole misses every cache."""
    at = range(0, len(X), tile)
    pairs = ((slice(i, i + tile), slice(j, j + tile)) for i in at for j in at if i <= j)
    each = [(p == q, float(norm(X[p, q] - X[q, p].T))) for p, q in pairs]
    return math.hypot(*(x for same, x in each for _ in range(1 if same else 2)))


def _corner(bounds: Bounds, X: Array, true: Array) -> Comparison:
    """The last entry of a joint A is the mean of 1², once a factor of all of A is taken out.

    It is left out where other entries differ too: then it may not be that mean at all.
    """
    scale = float(np.trace(X[:-1, :-1])) / (float(np.trace(true[:-1, :-1])) or math.nan)
    value = float(X[-1, -1]) / scale if scale > 0 else math.nan
    rest = true[:-1]
    off = float(norm(X[:-1] / (scale or math.nan) - rest)) / (float(norm(rest)) or math.nan)
    if not off <= bounds.case.budget(bounds.layer, "bfloat16"):
        return said(bounds.layer, "corner of A", LEFT_OUT, "other entries of A differ too")
    cause = f"the corner of A is {value:.6g} where it should be 1"
    found = bounds.judged("corner of A", abs(value - 1), cause, times=2)
    return replace(found, fault="B30") if found.verdict == FAIL else found


def _rows(case: Case, layer: str, side: str, theirs: float | None) -> Comparison:
    """Counts are integers, and agree or do not; a row of G counts once for each draw (COUNTS)."""
    name, ours = f"n_{side}", case.ours(layer)
    if theirs is None:
        return said(layer, name, LEFT_OUT, "the dump does not say")
    draws = case.dump.declared.get("draws", "1")
    counts = {"A": [ours.n_A], "G": [ours.n_G, ours.n_A * int(draws)]}[side]
    error = min(abs(theirs / count - 1) for count in counts)
    cause = f"{number_of(theirs, 'row')}; ours are {counts[0]}" if error else ""
    return Comparison(layer, name, error, 0.0, FAIL if error else PASS, None, cause)


def _scales(bounds: Bounds, found: dict[str, Measured]) -> list[Comparison]:
    """tr A · tr G, then A and G with their scales."""
    if set(found) != {"A", "G"}:
        return []
    layer, free = bounds.layer, bounds.case.dump.scale_free
    A, G = bounds.case.means(layer)
    zero = [found[side].ratio for side, M in (("A", A), ("G", G)) if not M.any()]
    # where A or G is 0 in both so is K, whatever the other one's scale is
    product = zero[0] if zero else found["A"].ratio * found["G"].ratio
    if free:
        cause = f"the format does not record the scale of {' and '.join(sorted(free))}; "
        cause += f"theirs is ours {_times(product, 9)}"
        return [said(layer, "tr A · tr G", LEFT_OUT, cause)]
    cause = f"theirs is ours {_times(product)}"
    share, level = bounds.drawing, bounds.case.arithmetic.stored or "float64"
    if found["G"].form < min(bounds.case.budget(layer, "float32"), tells(G, share)):
        share = NO_DRAWING  # then no label differs

    def rounded(form: float) -> bool:
        """The size of an error in scale tells a dtype only where the form tells the same."""
        return bounds.case.budget(layer, level) < form <= bounds.case.budget(layer, "bfloat16")

    worst = max(one.form for one in found.values())
    drawn = share.of_factor(product)
    both = bounds.judged(
        "tr A · tr G", abs(product - 1), cause, times=2, drawing=drawn, inferred=rounded(worst)
    )
    out = [both]
    for side, one in found.items():
        cause = f"theirs is ours {_times(one.ratio)}"
        drawn = share.norm if side == "G" else 0.0
        limit = bounds.of_side(side)
        each = bounds.judged(
            side, one.whole, cause, drawing=drawn, inferred=rounded(one.form), budget_of=limit
        )
        fits = one.form <= limit(level) + (share.reach if side == "G" else 0.0)
        if each.verdict != PASS and both.verdict == PASS and fits:
            cause += "; tr A · tr G agrees, so that K is the same"
            each = Comparison(layer, side, one.whole, each.budget, LEFT_OUT, "B8", cause)
        elif each.verdict == FAIL and both.verdict == UNDECIDED and fits:
            cause += "; whether K is the same is undecided, as tr A · tr G is"
            each = Comparison(layer, side, one.whole, each.budget, LEFT_OUT, None, cause)
        out.append(each)
    return out


def tells(G: Array, share: Drawing) -> float:
    """Where forms agree better than this, labels are the same: a hundredth of one deviation.

    0 of a matrix of rank one: other labels change its scale and never its form. Unknown drawing
    counts as all of G.
    """
    trace, size = float(np.trace(G)), float(norm(G))
    apart = 1 - (size / trace) ** 2 if trace > 0 else 0.0
    one = share.form / DEVIATIONS if share.known else 1.0
    return 0.01 * max(apart - 1e-6, 0.0) * one


def _times(ratio: float, digits: int = 6) -> str:
    if math.isnan(ratio):
        return "times no number, for a trace is not positive"
    return f"times {ratio:.{digits}g}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one layer may differ by: `drawing` is what drawn labels explain."""

    case: Case
    layer: str
    drawing: Drawing

    def of_side(self, side: str) -> Callable[[str], float]:
        """The budget of A or of G, by the dtype of undeclared parts."""
        return lambda dtype: self.case.budget(self.layer, dtype, side)

    def judged(
        self,
        quantity: str,
        error: float,
        cause: str,
        *,
        times: float = 1,
        drawing: float = 0.0,
        inferred: bool = True,
        told: bool | None = None,
        budget_of: Callable[[str], float] | None = None,
    ) -> Comparison:
        """Within budget of what is declared; else of drawing; else of a dtype that nobody declared.

        Drawing comes before such a dtype: the same error has both sizes, and A tells the dtype.
        An error that is no number counts as infinite, and no drawing explains it. Nothing passes by
        a standard error that is not LITTLE: other labels could hide there.

        Args: times, of the budget of one matrix; drawing: what drawn labels explain, NaN if
            unknown; inferred: may the size of the error tell the dtype? told: are the corpus's
            labels told from drawn ones otherwise? By default, where honest dumps were drawn.
            budget_of: the budget if undeclared parts have this dtype; of A or G by default.
        """
        declared = self.case.arithmetic
        finest = declared.stored or "float64"
        limit_of = budget_of or (lambda dtype: times * self.case.budget(self.layer, dtype))
        budget = limit_of(finest)
        error = float(error) if error < math.inf else math.inf

        def made(verdict: str, cause: str = "", limit: float = budget) -> Comparison:
            return Comparison(self.layer, quantity, error, limit, verdict, None, cause)

        if error <= budget:
            return made(PASS)
        drawn = self._drawn(error, budget + drawing, drawing, told)
        same = inferred and error <= limit_of("float32")  # no other label changes so little
        if drawn is not None and not (same and drawn[0] == UNDECIDED):
            return made(*drawn, budget + drawing)
        if inferred and not declared.declared and error <= TELLING:
            for dtype in list(ROUNDOFF)[list(ROUNDOFF).index(finest) + 1 :]:
                limit = limit_of(dtype)
                if error <= limit:
                    size = (
                        f"the error has the size of {dtype}, which is not declared (--arithmetic)"
                    )
                    return made(EQUAL_AS + dtype, size, limit)
        if drawn is not None:
            return made(*drawn, budget + drawing)
        if math.isnan(drawing) and error < math.inf:
            return made(UNDECIDED, HOW_MUCH_DRAWING)
        if drawing > 0:
            cause += f"; {BY_DRAWING} up to {budget + drawing:.1%}{self._source}"
        return made(FAIL, cause, budget + (drawing if drawing > 0 else 0.0))

    def _drawn(
        self, error: float, limit: float, drawing: float, told: bool | None
    ) -> tuple[str, str] | None:
        """Verdict and cause of what drawing explains, or may explain; None of what it does not."""
        if drawing <= LITTLE or (self.drawing.told if told is None else told):
            words = f"{BY_DRAWING} {error:.1%} (up to {limit:.1%}{self._source})"
            return (PASS, words) if error <= limit else None
        # NaN is within nothing
        return (UNDECIDED, self._hides) if error <= RARE * limit else None

    @property
    def _hides(self) -> str:
        """Why drawing decides nothing, and what would; error and budget stand beside it."""
        known = self.case.model is not None and self.case.corpus is not None
        more = "" if known else "model and corpus, or "
        return (
            "drawing labels often changes it by as much as the budget, and other labels could hide "
            f"there: give {more}their labels (--labels), or collect both as empirical"
        )

    @property
    def _source(self) -> str:
        """How it is known what drawing explains, in words behind a number."""
        draws = self.drawing.draws
        return f", the most of {draws} honest draws" if draws else ""


def unless_hidden(found: Comparison) -> Comparison:
    """A comparison of A or G; undecided if it passes by roundings that a fault could hide behind.

    Of few rows in a short dtype the budget may exceed all of A or G. Asked behind the diagnosis,
    for to that what is within budget is no fault.

    Proof: tests/test_judge_bounds.py::test_nothing_passes_by_rounding_that_could_hide_a_factor
    """
    of_moments = found.quantity in ("A/tr A", "G/tr G", "tr A · tr G", "A", "G")
    error, budget = found.error or 0.0, found.budget or 0.0
    if found.verdict != PASS or found.cause or not of_moments:
        return found
    if error <= TELLING or budget < HALF:
        return found
    return replace(found, verdict=UNDECIDED, cause=_ROUNDS)


def right(bounds: Bounds, measured: Mapping[str, Measured], dtype: str) -> bool:
    """Are A and G ours up to a factor, within the budget of a dtype and by drawing?"""
    limit = bounds.case.budget(bounds.layer, dtype)
    drawn = {"A": 0.0, "G": bounds.drawing.norm}
    return all(
        one.form <= limit + (0.0 if math.isnan(drawn[side]) else drawn[side])
        for side, one in measured.items()
    )


_ROUNDS = (
    "roundings of this arithmetic can change it by as much as the budget, and a factor of 2 could "
    "hide there: give a dump in float32, or of more rows"
)
HOW_MUCH_DRAWING = (
    "labels are drawn, and nothing says how much that changes: give model and corpus, or collect "
    "the reference with draws=8 (--draws 8), or as empirical if theirs are the corpus's own labels"
)
NOISE_DRAWS = 8
"""Draws of `Case.noise`.  Chosen: cheap, and G of many rows has not to be known better."""

_WITHOUT_DRAWING = ("empirical", "expected")


def who_draws(case: Case) -> tuple[bool, bool]:
    """Are labels of the reference drawn, and are theirs, so that they differ by it?"""
    theirs, ours = case.dump.declared.get("fisher"), str(case.reference.fisher)
    if case.dump.declared.get("labels") == "given":  # the reference's own
        return False, False
    they_draw = theirs not in _WITHOUT_DRAWING if theirs else ours != "empirical"
    return ours not in _WITHOUT_DRAWING, they_draw


def drawing(case: Case, layer: str, n_G: float | None) -> Drawing:
    """What drawn labels explain in one layer; n_G is theirs."""
    we_draw, they_draw = who_draws(case)
    if not (we_draw or they_draw):
        return NO_DRAWING
    if case.drawn is not None:
        return case.drawn[layer]
    draws = case.reference.draws
    single, freedom = (case.noise or {}).get(layer), NOISE_DRAWS - 1
    if single is None and we_draw:
        single, shards = case.once(("drawn", layer), lambda: _varies(case, layer))
        freedom = (draws - 1) * shards
    if single is None:
        return UNKNOWN
    rows = case.once(("rows", layer), lambda: case.ours(layer).n_A)
    their_draws = (n_G or rows) / max(rows, case.counts(layer).theirs["A"] or 0)
    share = deviations(freedom) * math.sqrt(we_draw / draws + they_draw / their_draws)
    return Drawing(share * single[0], share * single[1], share * single[0])


def _varies(case: Case, layer: str) -> tuple[tuple[float, float] | None, int]:
    """`one_draw` of the reference, and of how many shards."""
    one = case.ours(layer)
    return one_draw(one, case.reference.draws), max(1, one.n_A // case.reference.shard_rows)


def one_draw(one: Factor, draws: int) -> tuple[float, float] | None:
    """Standard deviations by one draw of all rows: of G over |G|, and of tr G over tr G."""
    size, trace = float(norm(one.sum_G)) / one.n_G, float(np.trace(one.sum_G)) / one.n_G
    if one.error_G is None or one.error_trace_G is None or not size or not trace:
        return None
    root = math.sqrt(draws)
    return one.error_G * root / size, one.error_trace_G * root / trace
