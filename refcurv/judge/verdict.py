"""What `validate` says: comparisons, their verdicts, and the causes of what does not agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.pictures import Picture

PASS: Final = "pass"
FAIL: Final = "fail"
MISSING: Final = "missing"
LEFT_OUT: Final = "left out"
UNDECIDED: Final = "undecided"
"""Nothing says whether drawing explains the difference; the cause says what would."""
BY_DRAWING: Final = "drawing labels explains"
"""How the cause of a comparison begins that passes because drawn labels differ from run to run."""
LABELS: Final = "labels"
"""The quantity of the finding that says that whose labels G has could not be judged."""
EQUAL_AS: Final = "equal as "
"""And a dtype: the size of the error is that of a dtype that nobody declared."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of one layer, theirs beside the reference's: an entry of `Verdict.findings`.

    Fields:
        layer: our name; "" for the dump as a whole.
        quantity: "A/tr A", "G/tr G", "tr A · tr G", "A", "G", "n_A", "n_G", "symmetry of A",
            "corner of A", "basis of A", "orthogonality of U_A", "form of Lambda", "Lambda", "mask",
            "W", "names", ...
        error, budget: relative; None where there is nothing to measure.
        verdict: PASS, FAIL, MISSING, LEFT_OUT, UNDECIDED, or EQUAL_AS and a dtype.
        fault: the id of the cause ("B15", METHOD, Bugs), or None.
        cause: a sentence: the cause where it is known, else what was seen.
    """

    layer: str
    quantity: str
    error: float | None
    budget: float | None
    verdict: str
    fault: str | None = None
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Cause:
    """What explains a disagreement: a hypothesis that brings theirs within budget.

    Fields:
        fault: its id ("B15"), or None of a difference that has a name but no id.
        sentence: what they did, and how it shows. remedy: what to change in their code.
        layers, quantities: what it explains. before, after: the largest error over these without
            and with the hypothesis. alike: other ids that leave the same trace in this dump.
    """

    fault: str | None
    sentence: str
    remedy: str
    layers: tuple[str, ...]
    quantities: tuple[str, ...]
    before: float
    after: float
    alike: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `validate` found.

    Fields:
        findings: in the order of layers; the dump as a whole first.
        causes: the simplest set that explains what failed; empty if nothing did, or nothing does.
        excluded: where something stayed unexplained, the hypotheses that were tried, each with
            the error that it left.
        program, recipe: whose format, and what was done to read it. matched: our layer → theirs.
        arithmetic: by which dtypes they were judged, and which were inferred, in words.
        accepted: dtypes that the caller accepts without a declaration, and with each one those
            that are finer. pictures: of the layers that were asked for, for a report.
    """

    findings: tuple[Comparison, ...]
    causes: tuple[Cause, ...] = ()
    excluded: tuple[str, ...] = ()
    program: str = ""
    recipe: tuple[str, ...] = ()
    matched: Mapping[str, str] | None = None
    arithmetic: str = ""
    accepted: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def passed(self) -> bool:
        """Every comparison passed, none is missing, and there is one; LEFT_OUT does not count."""
        compared = any(f.verdict != LEFT_OUT for f in self.findings)
        return compared and not self.failed

    @property
    def failed(self) -> tuple[Comparison, ...]:
        """The comparisons that keep it from passing."""
        return tuple(f for f in self.findings if not is_fine(f.verdict, self.accepted))

    def to_json(self) -> dict[str, Any]:
        """Plain values; an error that is no number becomes a text, "infinite" or "nan"."""
        rows = [asdict(one) for one in self.findings]
        causes = [asdict(one) for one in self.causes]
        for row in [*rows, *causes]:
            for name in ("error", "before", "after"):
                if isinstance(row.get(name), float) and not math.isfinite(row[name]):
                    row[name] = "nan" if math.isnan(row[name]) else "infinite"
        return {
            "passed": self.passed,
            "program": self.program,
            "findings": rows,
            "causes": causes,
            "excluded": list(self.excluded),
            "recipe": list(self.recipe),
            "matched": dict(self.matched or {}),
            "arithmetic": self.arithmetic,
            "accepted": list(self.accepted),
            **({"pictures": [one.to_json() for one in self.pictures]} if self.pictures else {}),
        }


def is_fine(verdict: str, accepted: Collection[str]) -> bool:
    """Does this verdict of a comparison let a dump pass, these dtypes being accepted?"""
    if not verdict.startswith(EQUAL_AS):
        return verdict in (PASS, LEFT_OUT)
    size = ROUNDOFF[verdict.removeprefix(EQUAL_AS)]
    return any(size <= ROUNDOFF[dtype] for dtype in accepted)
