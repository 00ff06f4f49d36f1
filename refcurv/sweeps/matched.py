"""How strongly a method may cut to cost what a K-FAC edit costs."""

from __future__ import annotations

from collections.abc import Mapping

from refcurv.curvature.bases import Bases
from refcurv.editing.kfac import layers_of
from refcurv.editing.record import shares
from refcurv.evaluation.matching import Match, search_share, text_perplexity
from refcurv.law.checks import RangeError, require_choice
from refcurv.model.corpus import Population
from refcurv.model.given import require_text
from refcurv.model.weights import Model
from refcurv.sweeps.methods import METHODS, STRONGEST, methods, pairs_kept


def match(
    model: Model,
    basis: Bases,
    rho: float | Mapping[str, float],
    method: str,
    population: Population,
    *,
    seed: int = 0,
    tolerance: float = 0.005,
    most: int = 30,
) -> Match:
    """How much a method may remove to cost as much as the K-FAC edit, on one population.

    Definition
        cost(W') = exp(mean nats of the tokens that are asked for)
        |cost(method removing x) / cost(edit(model, basis, rho)) − 1| <= tolerance

    On text the cost is its perplexity: methods are compared at equal perplexity. On recited
    passages it grows as they are forgotten: methods are compared at equal forgetting. Nats are
    compared, not items without an error: their number moves in steps, and between two steps the
    strength would be anything.

    Args:
        model: the unedited one.
        basis: of `decompose` or `load_bases`.
        rho: of the K-FAC edit, as for `edit`; the method cuts the same layers.
        method: kfac, svd, random-basis, random-pairs, inputs or outputs.
        population: of tokens, better of the dev split: the test split is for what is reported.
        seed: of a random control.
        tolerance: relative, >= 0 and < 1.
        most: how many edits may be measured, >= 2.

    Returns:
        Match: `strength` is the share that the method removes, of the curvature mass, of Σ σ²
        (svd) or of the pairs (random-pairs); `matched` says whether it costs the same, `verdict`
        what else. `target` and `perplexity` are the costs.

    Raises:
        ConventionError: an unknown method. RangeError: a rho outside [0, 1], or 1 in all layers:
        nothing is cut. What `edit`, `truncate` and `evaluate` raise.

    Cost: one edit and one forward pass over the population for each strength tried, about 8, and
        for the K-FAC edit.
    Source: METHOD, Controls.
    Proof: tests/test_sweep.py::test_a_match_costs_what_kfac_costs
    """
    require_choice("match", "method", method, METHODS)
    asked = rho if isinstance(rho, Mapping) else {"**": rho}
    cut = shares("match", "rho", model, layers_of("match", model, basis), asked)
    require_text("match", "the population", population)
    if all(share == 1 for share in cut.values()):
        raise RangeError("match: rho is 1 in every layer: nothing is cut to compare with.")
    ways = methods(dict.fromkeys(("kfac", method)), basis, cut, seed, "match")
    way = ways[method]
    kept: dict[float, int] = {}

    def measured(removed: float) -> float:
        edited, record = way.cut(model, removed)
        kept[removed] = pairs_kept(record)
        return text_perplexity(edited, population)

    return search_share(
        measured,
        text_perplexity(ways["kfac"].same(model)[0], population),
        weakest=way.weakest, strongest=STRONGEST, tolerance=tolerance, most=most,
        pairs=kept.get,
    )  # fmt: skip
