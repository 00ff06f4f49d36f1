"""Make the stored cases and their page, by one command; the same bytes on the same build.

    python -m validation.cases.make            all cases anew, half a minute
    python -m validation.cases.make --render   README.md from the stored manifests

Beside the routes of `refcurv cases` each valid case has a third: the loops of tests/oracles.py in
longdouble, which share nothing with the package.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refcurv.judge.cases.analytic import analytic
from refcurv.judge.cases.case import Case, Check
from refcurv.judge.cases.freedom import acceptable
from refcurv.judge.cases.making import subject, valid, write_cases
from refcurv.judge.cases.planted import BUGS, invalid
from refcurv.judge.cases.routes import apart
from refcurv.judge.cases.truth import Truth, truth
from validation.cases.models import FEATURES, Feature

ROOT = Path(__file__).parents[2]
HERE = ROOT / "validation" / "cases"
PAGE, VECTORS = HERE / "README.md", HERE / "vectors"
LOOPS = "loops in longdouble (tests/oracles.py)"


def made_of(feature: Feature) -> tuple[Truth, Case]:
    """The truth of a feature, and its valid case."""
    made = truth(subject(feature.model(), feature.corpus, "**", seed=0))
    case = valid(made, f"{feature.name}_v1", feature.what, more=by_loops(made))
    return made, case


def by_loops(made: Truth) -> Callable[[Sequence[Check]], Iterable[Check]]:
    """Logits, nats, drawn labels and eigenvalues once more, by what shares nothing."""
    sys.path.insert(0, str(ROOT / "tests"))
    import oracles

    def more(known: Sequence[Check]) -> Iterator[Check]:
        first = {one.quantity: one for one in reversed(known)}

        def check(name: str, want: Any) -> Check:
            one, size = first[name], first[name].size
            assert size is not None
            error = apart(made.arrays[name], np.asarray(want, np.float64), size)
            return Check(name, (one.routes[0], LOOPS), error, one.budget, size, one.kind)

        logits, nats, drawn = _loops(oracles, made)
        yield check("logits", logits)
        yield check("nats", nats)
        yield check("drawn", drawn)
        for name, factor in made.factors.items():
            for side, values in (("A", "mu"), ("G", "lam")):
                M = np.asarray(getattr(factor, side), np.longdouble)
                yield check(f"basis.{name}.{values}", oracles.jacobi_eigh(M)[0])

    return more


def _loops(oracles: Any, made: Truth) -> tuple[Any, Any, Any]:
    """Sequence by sequence, without its padding."""
    model, corpus, one = made.subject.model, made.subject.corpus, made.seen
    parameters = {n: np.asarray(x, np.longdouble) for n, x in model.parameters.items()}
    logits = np.zeros(made.arrays["logits"].shape)
    nats, drawn = np.zeros(one.label.shape), np.full(one.label.shape, -1)
    for n, label in enumerate(one.label):
        if corpus.images is not None:
            read, segment, real = corpus.images[n].astype(np.longdouble), None, slice(None)
        else:
            real = slice(int(corpus.real[n].sum()))
            read, segment = corpus.tokens[n, real], corpus.segment[n, real]
        z = oracles.logits(model.config, parameters, read, segment)
        logits[n, real] = z
        each = oracles.nats(model.config, parameters, read, segment)
        for t, v in enumerate(label):
            if v >= 0:
                nats[n, t] = each[t, v]
        drawn[n, real] = oracles.drawn_labels(z, label[real], made.subject.seed, 0, n)
    return logits, nats, drawn


def every_case() -> Iterator[Case]:
    """Valid cases, then each bug in the first model where it is seen, then what is free."""
    known = [made_of(feature) for feature in FEATURES]
    by_hand = analytic()
    yield by_hand
    yield from (case for _, case in known)
    for bug in BUGS:
        found = (invalid(bug, made, case) for made, case in known)
        case = next((one for one in found if one is not None), None)
        assert case is not None, f"no model shows {bug.id}"
        yield case
    yield from acceptable(by_hand)
    yield from acceptable(known[0][1])


# ------------------------------------------------------------------ the page


def manifests(folder: Path = VECTORS) -> list[dict[str, Any]]:
    """The manifests of a folder, in the order of its index."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    names = [one["caseId"] for one in index["cases"]]
    return [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]


def page() -> str:
    """README.md with its two tables as the manifests say."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("routes", routes_table()), ("cases", cases_table())):
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}<!-- /{name} -->\n{after}"
    return text


def routes_table() -> str:
    """Every kind of number, its routes, and the worst over all valid cases."""
    worst: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for manifest in manifests():
        for one in manifest["checks"]:
            if one["kind"] != "analytic":
                worst.setdefault((one["quantity"], " = ".join(one["routes"])), []).append(one)
    lines = [
        "| number | two routes | arrays | worst error | budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (quantity, routes), found in worst.items():
        w = max(found, key=lambda one: one["error"] / one["budget"] if one["budget"] else 0)
        size = f"{w['error']:.0e} | {w['budget']:.0e}" if w["budget"] else "none | 0"
        arrays = sum(one["arrays"] for one in found)
        lines.append(f"| `{quantity}` | {routes} | {arrays} | {size} |")
    return "\n".join(lines) + "\n"


def cases_table() -> str:
    """Every case: what it is there for, who can judge it, its bytes."""
    every = manifests()
    total = sum(one["file"]["bytes"] for one in every)
    counts = {
        r: sum(one["result"] == r for one in every) for r in ("valid", "invalid", "acceptable")
    }
    said = ", ".join(f"{n} {result}" for result, n in counts.items())
    lines = [
        f"{len(every)} cases ({said}), {total / 1e6:.1f} MB.",
        "",
        "| case | result | bug | what | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in every:
        bug, needs = ", ".join(one["flags"]), ", ".join(one["needs"])
        lines.append(f"| `{one['caseId']}` | {one['result']} | {bug} | {one['reason']} | {needs} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="the page alone")
    if not parser.parse_args().render:
        new = VECTORS.with_name("vectors.new")
        shutil.rmtree(new, ignore_errors=True)
        write_cases(every_case(), new)
        shutil.rmtree(VECTORS, ignore_errors=True)
        new.rename(VECTORS)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
