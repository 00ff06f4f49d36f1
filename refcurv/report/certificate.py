"""What `refcurv certify` prints: certain digits, and how far floats are from the real numbers."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, Context, Decimal
from math import ceil, floor
from textwrap import fill
from typing import Any

from refcurv.law.words import number_of
from refcurv.report.text import NARROW, format_rows

Json = dict[str, Any]

DTYPES = ("float64", "float32", "longdouble")

JOINED = (
    "A", "G", "eigenvalues", "eigenvectors", "cut", "edit", "hessian", "ggn", "fisher",
)  # fmt: skip
"""Quantities that are of all sequences together."""

KINDS = ("probable", "worst")

MOST = 5
"""Arrays outside their budget that are named."""


def format_certificate(found: Json) -> str:
    """What is proved, what floats make of it, how much of their budgets they use.

    Each table has a row for each quantity of each sequence: the worst array of it.

    Proof: tests/test_certified.py::test_the_command_says_what_is_certain
    """
    lines = [*_proved(found), *_words(found), *_floats(found)]
    return "\n".join(line if "\n" in line else _wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    return fill(
        line, NARROW, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _proved(found: Json) -> Iterator[str]:
    """How many digits are certain, and of how many numbers the nearest float64 is known."""
    rows = [_row(name, names, found) for name, names in _groups(found).items()]
    head = ("proved", "arrays", "numbers", "certain digits", "nearest float64")
    yield format_rows(head, rows, "lrrrr")
    yield ""


def _groups(found: Json) -> dict[str, list[str]]:
    """Arrays by quantity and sequence; of all sequences together those of A and G."""
    out: dict[str, list[str]] = {}
    for name in found["numbers"]:
        kind, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        group = f"{kind} of {first}" if kind.startswith("eigen") else kind
        if kind not in JOINED:
            group = f"{kind}, sequence {first}"
        out.setdefault(group, []).append(name)
    return out


def _row(title: str, names: list[str], found: Json) -> tuple[object, ...]:
    some = [found["numbers"][name] for name in names]
    size = sum(_size(one["shape"]) for one in some)
    digits = [one["digits"] for one in some if one["digits"] is not None]
    settled = sum(one["settled"] for one in some) / max(size, 1)
    certain = f"{floor(min(digits))}" if digits else "all"
    share = f"{floor(1000 * settled) / 10:.1f}%"  # 100 % only if it is all of them
    return title, len(names), f"{size:,}", certain, share


def _worst(routes: list[Json], dtype: str) -> str:
    """The largest error in ulps of the array's largest entry."""
    some = [r["ulps"] for r in routes if r["dtype"] == dtype]
    if not some:
        return "-"
    return "inf" if None in some else at_most(max(some), 3)


def _floats(found: Json) -> Iterator[str]:
    """The errors of floats, and the shares of their budgets that these are."""
    groups = _groups(found).items()
    of = {n: title for title, names in groups for n in names}
    routes: dict[str, list[Json]] = {title: [] for title, _ in groups}
    for route in found["routes"]:
        if route["name"] in of:
            routes[of[route["name"]]].append(route)
    routes = {title: some for title, some in routes.items() if some}
    if not routes:
        return
    rows = [(title, *(_worst(some, dtype) for dtype in DTYPES)) for title, some in routes.items()]
    yield ""
    yield format_rows(("error in ulps", *DTYPES), rows, "lrrr")
    yield ""
    yield (
        "The same formulas in floats: the largest error of an array is so many units of eps times "
        "its largest entry, or less. It counts the radius: with few digits that is most of it."
    )
    yield ""
    head = [cell for dtype in DTYPES for cell in (dtype, "at worst")]
    shares = [
        (title, *(_share(some, dtype, kind) for dtype in DTYPES for kind in KINDS))
        for title, some in routes.items()
    ]
    yield format_rows(("share of budget", *head), shares, "lrrrrrr")
    yield ""
    yield (
        "The error of an array in Frobenius norm, as a share of two budgets. The first is of "
        "roundings of either sign by chance: an array exceeds it with odds of 3e-14. The second, "
        "at worst, is of roundings of any sign. Both are of first order and of a scale that four "
        "shaken runs show: products of roundings are left out, and neither is proved."
    )
    yield from _outside(found["routes"])


def _outside(routes: list[Json]) -> Iterator[str]:
    """The arrays that are further from the real numbers than roundings explain."""
    out = [r for r in routes if r["inside"] is False]
    for r in out[:MOST]:
        yield f"OUTSIDE: {r['dtype']}, {r['name']}: {_percent(r['used']['probable'])} of the budget"
    if len(out) > MOST:
        yield f"and {len(out) - MOST} more."


def _share(routes: list[Json], dtype: str, kind: str) -> str:
    some = [r for r in routes if r["dtype"] == dtype]
    if not some:
        return "-"
    if any(r["budgets"][kind] is None for r in some):
        return "none"
    shares = [r["used"][kind] for r in some]
    return _percent(None if None in shares else max(shares), 2 if kind == "probable" else 1)


def _percent(share: float | None, digits: int = 2) -> str:
    if share is None:
        return "inf"
    return f"{ceil(100 * share)}%" if share >= 0.1 else f"{at_most(100 * share, digits)}%"


def at_most(x: float, digits: int) -> str:
    """A number that is not negative in so many digits, which are no smaller: a bound stays one."""
    up = Context(prec=digits, rounding=ROUND_CEILING).create_decimal_from_float(x)
    text = f"{float(up):.{digits}g}"
    return text if Decimal(text) >= Decimal(x) else str(up)  # below float64 it rounds once more


def _size(shape: list[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _words(found: Json) -> Iterator[str]:
    enough = found["digits"] is None or found["digits"] >= found["wanted"]
    yield (
        f"{found['bits']} bits; every number lies within its radius, which is proved."
        if enough
        else f"NOT REACHED: {found['wanted']:g} digits were asked for; {found['bits']} bits gave "
        f"{floor(10 * found['digits']) / 10:.1f}."
    )
    yield (
        "Digits count from the largest entry of an array. Nearest float64: of so many numbers it "
        "is known which float64 is the nearest."
    )
    source = found.get("source", {})
    for identity, names in source.get("zeros", {}).items():
        arrays = number_of(len(names), "array")
        yield f"Exactly 0 by {identity}: entries of {arrays}, of {names[0]} first."
    yield from _of_labels(source)
    if "lost" in source:
        yield f"Digits are lost {source['lost']}."
    if found.get("spectra"):
        yield from ("", *_spectra(list(found["spectra"].values())))
    if any(name.startswith("eigenvectors") for name in found["numbers"]):
        yield "Eigenvectors of a cluster, or of zeros, are one orthonormal basis of many."
    if found.get("cuts"):
        yield from ("", *_cuts(found["cuts"]))


def _of_labels(source: Json) -> Iterator[str]:
    """Whose labels G and the Fisher have; of drawn ones, what the real numbers draw."""
    if "fisher" not in source:
        return
    if "labels" not in source:
        yield f"Labels of G and the Fisher: {source['fisher']}."
        return
    labels = source["labels"]
    other, unknown = labels["other"], labels["undecided"]
    yield (
        f"Labels of G and the Fisher: drawn in float64 from seed {source['seed']}. Real numbers "
        f"draw {labels['same']:,} the same, which is proved; {len(other):,} are others, "
        f"{len(unknown):,} undecided."
    )
    for number, t, law, real in other:
        yield f"  sequence {number}, position {t}: float64 draws {law}, the real numbers {real}."
    for number, t, law in unknown:
        yield f"  sequence {number}, position {t}: float64 draws {law}; undecided."


def _spectra(some: list[Json]) -> Iterator[str]:
    """How many eigenvalues there are, and the certain digits of each, counted from itself."""
    size, zeros, unsure = (sum(one[key] for one in some) for key in ("size", "zeros", "unsure"))
    yield (
        f"{number_of(size, 'eigenvalue')} of {number_of(len(some), 'matrix', 'matrices')}: "
        f"{zeros:,} are exactly 0 by their rank, "
        f"{unsure:,} may be 0."
    )
    others = [one for one in some if one["fewest"] is not None]
    if others:
        middle = [floor(one["median"]) for one in others]
        yield (
            f"Each of the others, counted from itself: {floor(min(o['fewest'] for o in others))} "
            f"digits or more; medians of the matrices {min(middle)} to {max(middle)}."
        )
    angles = [one["angle"] for one in some]
    worst = "unknown" if None in angles else f"{at_most(max(angles), 2)} at most"
    yield (
        f"Clusters that are not proved to differ, nor to be 0: {sum(o['clusters'] for o in some)}. "
        f"Sine of the largest angle to a subspace: {worst}."
    )


def _cuts(cuts: dict[str, Json]) -> Iterator[str]:
    """The cut of the real numbers; then, another statement, the law's on float64 numbers."""
    rows = list(cuts.values())
    pairs, kept, cut, undecided = (
        sum(one[key] for one in rows) for key in ("pairs", "kept", "cut", "undecided")
    )
    yield (
        f"The real numbers' cut of {number_of(pairs, 'pair')} in "
        f"{number_of(len(rows), 'layer')}: {kept:,} proved kept, "
        f"{cut:,} proved cut, {undecided:,} undecided."
    )
    for layer, one in cuts.items():
        if one["undecided"]:
            pairs = number_of(one["undecided"], "pair")
            yield f"UNDECIDED: {pairs} of {layer}; its W' is not enclosed."
    for key, on in (("nearest", "the nearest float64"), ("float64", "float64's own")):
        off = [one[key] for one in rows]
        says = "has no cut" if None in off else f"decides {sum(off):,} proved pairs otherwise"
        yield f"The law's cut (SELECT) on {on} eigenvalues {says}."
