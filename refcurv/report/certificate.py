"""What `refcurv certify` prints: certain digits, and how far floats are from the real numbers."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor
from typing import Any

from refcurv.report.text import format_rows

Json = dict[str, Any]

DTYPES = ("float64", "float32", "longdouble")


def format_certificate(found: Json) -> str:
    """A row for each quantity of each sequence, the worst array of it; then what it means.

    Proof: tests/test_certified.py::test_the_command_says_what_is_certain
    """
    rows = [_row(name, names, found) for name, names in _groups(found).items()]
    head = ("", "arrays", "numbers", "certain digits", "as float64", *DTYPES)
    table = format_rows(head, rows, "lrrrrrrr")
    return "\n".join([table, "", *_words(found)])


def _groups(found: Json) -> dict[str, list[str]]:
    """Arrays by quantity and sequence; of all sequences together those of A and G."""
    out: dict[str, list[str]] = {}
    for name in found["numbers"]:
        kind, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        group = f"{kind} of {first}" if kind.startswith("eigen") else kind
        if kind not in ("A", "G", "eigenvalues", "eigenvectors", "cut", "edit"):
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
    return "inf" if None in some else f"{max(some):.3g}"


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
    yield "The dtypes: largest error of the definitions in it, in ulps of the largest entry."
    if found.get("spectra"):
        yield from ("", *_spectra(list(found["spectra"].values())))
    if found.get("cuts"):
        yield from ("", *_cuts(found["cuts"]))


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
    worst = "unknown" if None in angles else f"{max(angles):.1e} at most"
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
