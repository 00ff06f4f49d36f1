"""What the sums of a layer lead to, enclosed: eigenvalues, eigenvectors, masks, edited weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refcurv.algebra.balls import Balls, exact, joined
from refcurv.algebra.eigen_enclosures import Spectrum, enclose, is_positive, refined
from refcurv.certified.cuts import decided, edited
from refcurv.judge.cases.case import Case
from refcurv.judge.cases.truth import SHARES, share_name
from validation.cases.contained import UNDECIDED, Array


def spectral(
    case: Case, layer: str, W: Array, sum_A: Balls, sum_G: Balls
) -> Iterator[tuple[str, Balls]]:
    """Names of the file and their balls. W' is left out where a pair of its mask is undecided.

    A and G are means of so many terms, and have as many eigenvalues above 0 at most (O25).
    """
    made = {}
    for side, S, values in (("A", sum_A, "mu"), ("G", sum_G, "lam")):
        terms = int(case.arrays[f"factors.{layer}.n_{side}"])
        made[side] = one = enclose(S / terms, refined(S / terms), rank=terms)
        yield f"basis.{layer}.U_{side}", _columns(one)
        yield f"basis.{layer}.{values}", one.values
    A, G = made["A"], made["G"]
    for rho in SHARES:
        at = f"edits.{share_name(rho)}.{layer}"
        if f"{at}.mask" not in case.arrays:
            continue
        kept, dropped = decided(G.values, A.values, rho, layer)
        yield f"{at}.mask", exact(np.where(kept | dropped, kept.astype(np.uint8), UNDECIDED))
        if (kept | dropped).all():
            yield f"{at}.weight", edited(W, G, A, kept)


def _columns(one: Spectrum) -> Balls:
    """(n, r), the eigenvectors of the first r eigenvalues, with the sign of ORDER.

    Each of the r is proved to be above 0, and apart from all others; of its eigenvector the entry
    of largest magnitude is proved to be that one. Of the others any basis of their space will do.
    """
    U, sure = one.vectors, 0
    for start, stop in one.clusters:
        least, most = U[:, start].least(), U[:, start].most()
        top = int(least.argmax())
        if stop > start + 1 or not is_positive(one.values[start]):
            break
        if (np.delete(most, top) >= least[top]).any() or U[top, start].rounded() < 0:
            break
        sure = stop
    return joined([U[:, :sure]], axis=1)
