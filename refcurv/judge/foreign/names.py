"""Their layer names and ours."""

from __future__ import annotations

from collections.abc import Mapping

from refcurv.judge.dump import Dump
from refcurv.judge.verdict import Comparison


def match(
    dump: Dump, shapes: Mapping[str, tuple[int, int]], names: Mapping[str, str]
) -> tuple[dict[str, str], list[Comparison]]:
    """(our layer → their name, what is to be said about it); `names` are given by the caller.

    Args: shapes, (O, I) of each of our layers that is wanted.
    """
    matched = {ours: names.get(ours, ours) for ours in shapes}
    return {ours: their for ours, their in matched.items() if their in dump.layers}, []
