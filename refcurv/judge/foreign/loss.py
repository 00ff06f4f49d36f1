"""Gradients of a mean loss, brought to those of a sum (LOSS)."""

from __future__ import annotations

from dataclasses import replace

from refcurv.files.lazy import Lazy
from refcurv.judge.dump import Dump, Theirs
from refcurv.law.checks import require_range


def of_summed_loss(dump: Dump) -> Dump:
    """The dump in nats of a summed loss, where `declared["loss_terms"]` says how many terms m has.

    Definition
        g of the mean over m terms is 1/m of g of their sum. So G, lam and Lambda are times m².

    Raises RangeError: loss_terms is no number of at least 1.

    Proof: tests/test_foreign_pickles.py::test_the_terms_of_a_mean_loss
    """
    if "loss_terms" not in dump.declared:
        return dump
    m = require_range("validate", "loss_terms", dump.declared["loss_terms"], 1, 1e12)

    def read(name: str) -> Theirs:
        one = dump.layers[name]
        sides = {side: getattr(one, side) for side in ("G", "lam", "Lambda")}
        return replace(one, **{k: m**2 * X for k, X in sides.items() if X is not None})

    said = f"G is times m², m = {m:.12g}: its g is of the mean loss over m positions of a batch."
    return replace(
        dump,
        layers=Lazy(list(dump.layers), read),
        recipe=(*dump.recipe, said),
        scale_free=dump.scale_free - {"G"},
    )
