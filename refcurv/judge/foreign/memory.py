"""Dumps in memory: {layer: (A, G, n)}, and refcurv's own Factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refcurv.curvature.factors import Factors
from refcurv.files.lazy import Lazy
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.law.checks import as_array

_HELD = ("A", "G", "U_A", "mu", "U_G", "lam", "Lambda", "mask", "W")


def of_factors(factors: Factors) -> Dump:
    """refcurv's own, read layer by layer."""

    def read(name: str) -> Theirs:
        one = factors[name]
        return Theirs(A=one.A, n_A=one.n_A, G=one.G, n_G=one.n_G)

    return Dump(
        program="refcurv",
        layers=Lazy(list(factors), read),
        holds=dict.fromkeys(factors, frozenset({"A", "n_A", "G", "n_G"})),
        declared={"fisher": str(factors.fisher), "rows": str(factors.rows)},
        arithmetic=Arithmetic(factors.dtype, factors.dtype, "float64", "float64", "float64"),
    )


def of_arrays(layers: Mapping[str, Any]) -> Dump:
    """{layer: (A, G, n)}: means over n rows; A or G may be None, and so may n.

    For bases, corrections and edits {layer: {field of `Theirs`: array}}.
    """
    found, dtypes = {}, set()
    for name, given in layers.items():
        if isinstance(given, Mapping):
            found[str(name)] = Theirs(**given)
            continue
        A, G, n = given
        sides = {}
        for side, X in (("A", A), ("G", G)):
            if X is not None:
                array = as_array("validate", f"{side} of {name!r}", X, "numbers")
                dtypes.add(array.dtype.name)
                sides[side] = array.astype(np.float64)
        count = None if n is None else float(n)
        found[str(name)] = Theirs(sides.get("A"), count, sides.get("G"), count)
    stored = dtypes.pop() if len(dtypes) == 1 else None
    return Dump(
        program="memory",
        layers=found,
        holds={
            name: frozenset(k for k in _HELD if getattr(one, k) is not None)
            for name, one in found.items()
        },
        arithmetic=Arithmetic(stored=stored if stored in ("float16", "float32") else None),
    )
