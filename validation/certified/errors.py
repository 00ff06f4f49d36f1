"""How far arrays are from the certified ones, in ulps: eps of a dtype times the largest entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

import refcurv as rc
from refcurv.certified.certificate import farthest, sizes

Arrays = Mapping[str, np.ndarray]
"""By the certificate's names. Where only some entries were made, the rest is NaN."""


def ulps(truth: rc.Certificate, found: Arrays, dtype: str) -> dict[str, float]:
    """The largest error of each quantity, in ulps of its array's largest entry."""
    size, out = sizes(truth), {}
    for name, x in found.items():
        one, there = truth[name], ~np.isnan(x)
        some = replace(one, parts=one.parts[:, there], radius=one.radius[there])
        far = farthest(x[there], some) / size[name] if size[name] else 0.0
        quantity = name.partition(".")[0]
        out[quantity] = max(out.get(quantity, 0.0), far / float(np.finfo(np.dtype(dtype)).eps))
    return out
