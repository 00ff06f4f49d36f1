"""What `refcurv certify` prints: certain digits, and how far floats are from the real numbers."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, Context, Decimal
from math import ceil, floor
from typing import Any

from refcurv.report.text import format_rows

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
    """A row for each quantity of each sequence, the worst array of it; then what it means.

    Proof: tests/test_certified.py::test_the_command_says_what_is_certain
    """
    rows = [_row(name, names, found) for name, names in _groups(found).items()]
    head = ("", "arrays", "numbers", "certain digits", "as float64", *DTYPES)
    table = format_rows(head, rows, "lrrrrrrr")
    return "\n".join([table, "", *_words(found), "", *_budgets(found)])


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
    wanted = set(names)
    ulps = [_worst(found, wanted, dtype) for dtype in DTYPES]
    certain = f"{floor(min(digits))}" if digits else "all"
    share = f"{floor(1000 * settled) / 10:.1f}%"  # 100 % only if it is all of them
    return title, len(names), f"{size:,}", certain, share, *ulps


def _worst(found: Json, names: set[str], dtype: str) -> str:
    """The largest error in ulps of the array's largest entry."""
    some = [r["ulps"] for r in found["routes"] if r["dtype"] == dtype and r["name"] in names]
    if not some:
        return "-"
    return "inf" if None in some else at_most(max(some), 3)


def _budgets(found: Json) -> Iterator[str]:
    """How much of their budgets the dtypes' errors use: the largest share in each group."""
    head = ("used of probable | worst", *DTYPES)
    rows = []
    for title, names in _groups(found).items():
        some = [r for r in found["routes"] if r["name"] in {*names}]
        rows.append((title, *(_shares(some, dtype) for dtype in DTYPES)))
    yield format_rows(head, rows, "lrrr")
    yield ""
    yield "Errors by their budgets, in Frobenius norm: the probable one, which roundings by chance"
    yield "exceed with odds of 3e-14 for each array, and the worst case. Both are of first order."
    out = [r for r in found["routes"] if r["inside"] is False]
    for r in out[:MOST]:
        yield f"OUTSIDE: {r['dtype']}, {r['name']}: {_percent(r['used']['probable'])} of the budget"
    if len(out) > MOST:
        yield f"and {len(out) - MOST} more."


def _shares(routes: list[Json], dtype: str) -> str:
    some = [r for r in routes if r["dtype"] == dtype]
    return " | ".join(_share(some, kind) for kind in KINDS) if some else "-"


def _share(routes: list[Json], kind: str) -> str:
    if any(r["budgets"][kind] is None for r in routes):
        return "no budget"
    shares = [r["used"][kind] for r in routes]
    return _percent(None if None in shares else max(shares))


def _percent(share: float | None) -> str:
    if share is None:
        return "inf"
    return f"{ceil(100 * share)}%" if share >= 0.1 else f"{at_most(100 * share, 2)}%"


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
    yield "Digits count from the largest entry of an array. As float64: the nearest one is proved."
    yield "The dtypes: the definitions in it are off by so many ulps of the largest entry at most."
    source = found.get("source", {})
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
        f"{size:,} eigenvalues of {len(some)} matrices: {zeros:,} are exactly 0 by their rank, "
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
        f"The real numbers' cut of {pairs:,} pairs in {len(rows)} layers: {kept:,} proved kept, "
        f"{cut:,} proved cut, {undecided:,} undecided."
    )
    for layer, one in cuts.items():
        if one["undecided"]:
            yield f"UNDECIDED: {one['undecided']:,} pairs of {layer}; its W' is not enclosed."
    for key, on in (("nearest", "the nearest float64"), ("float64", "float64's own")):
        off = [one[key] for one in rows]
        says = "has no cut" if None in off else f"decides {sum(off):,} proved pairs otherwise"
        yield f"The law's cut (SELECT) on {on} eigenvalues {says}."
