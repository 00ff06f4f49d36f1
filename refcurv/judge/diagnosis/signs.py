"""Signs of a fault where no transformation of the truth was found that confirms it.

They are looked for last, and a cause that rests on them says so: its `after` is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.dropped import DROPOUT, OTHERS, Family, random_pass
from refcurv.judge.diagnosis.others import partners
from refcurv.judge.diagnosis.search import PLAIN, SHARPER, Side
from refcurv.judge.diagnosis.seen import fitted, see, states
from refcurv.law.checks import Array
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig, Norm, NormPlace, Residual

LARGEST = 2048
"""Matrices beyond this size have their rank not counted.  Chosen: some seconds each."""

NETWORK = ("B50", "B51", "B52", "B53", "B54", "B55", "B56")
"""Faults of the arithmetic, which also grow with depth."""


class Sign(NamedTuple):
    """A fault, in which layers of which side, how it shows, and what looks the same."""

    fault: str
    side: str
    layers: tuple[str, ...]
    words: str
    alike: tuple[str, ...]


def signs(case: Case, found: Mapping[str, Side], sized: bool = False) -> Iterator[Sign]:
    """One G of two layers, lost ranks, other norms, and an A that drifts away with depth.

    Args: sized, is theirs in every layer as far off as a network in another dtype is? Other weights
        are a number that is fitted to how far it is, and the dtype has none: so it is the dtype.
    """
    yield from _one_matrix(case, found["G"])
    for side in found.values():
        yield from _padded(case, side)
    collapsed = {name: _collapsed(case, side) for name, side in found.items()}
    named = {id for side in found.values() for one in side.chosen for id in one.faults}
    for name, ranks in collapsed.items():
        if ranks:
            layer, (theirs, ours) = next(iter(ranks.items()))
            words = f"In {layer}, {name} has rank {theirs}; ours has {ours}. Not confirmed"
            first = "B44" if name == "G" and not collapsed["A"] else "B36"
            other = {"B44": "B36", "B36": "B44"}[first]
            if other in named:
                first, other = other, first
            yield Sign(first, name, tuple(ranks), words, (other,))
    if not collapsed["A"]:
        yield from (
            list(_random(case, found, DROPOUT))
            or list(_other_norms(case, found["A"]))
            or ([] if sized else list(_random(case, found, OTHERS)) or _drifting(found["A"]))
        )


def _one_matrix(case: Case, side: Side) -> Iterator[Sign]:
    """Two layers of one input have one G, which is each layer's own in ours (B40).

    Drawing does not make them the same: they are outputs of different weights. What explains one
    of them without drawing says already why. Where diagonals differ, no matrix is read for it.
    """
    groups = dict.fromkeys(
        pair for x in side.ladders for pair in partners(x, side.ladders) if len(pair) == 2
    )
    for group in groups:
        if any(_told(side, x) for x in group):
            continue
        budget = max(side.ladders[x].steps[0][1] for x in group)
        one, two = (states(case, x)["G"].diagonal for x in group)
        # of a positive matrix |T| is at most √N times |diag T|
        if one.shape != two.shape or fitted(one, two)[0] > math.sqrt(len(one)) * budget:
            continue
        seen = [see(case, x)["G"] for x in group]
        T, X = ([getattr(one, name) for one in seen] for name in "TX")
        same = len({x.shape for x in (*T, *X)}) == 1 and fitted(T[0], T[1])[0] <= budget
        if same and fitted(X[0], X[1])[0] > SHARPER * budget:
            words = f"{' and '.join(group)} have one G, and ours have two"
            inputs = any("B35" in one.faults for one in side.chosen)  # these have one gradient
            yield Sign("B35" if inputs else "B40", "G", group, words, ())


def _padded(case: Case, side: Side) -> Iterator[Sign]:
    """Rows of zeros where columns have none: row shards that were padded to one length (B47).

    Definition
        k rows are filled. They are the first k of a symmetric matrix if their first k columns are
        symmetric to rounding. No drawing makes this, and none hides it.

    Proof: tests/test_judge_structure.py::test_padding_of_row_shards_shows_whatever_labels_are_drawn
    """
    found: dict[str, int] = {}
    for layer, steps in side.ladders.items():
        if side.of(layer)[0].faults or states(case, layer)[side.side].diagonal.all():
            continue
        T = see(case, layer)[side.side].T
        filled = np.abs(T).max(axis=1) > 0
        rows = T[filled][:, : int(filled.sum())]
        if T.shape[0] != T.shape[1] or not T[:, ~filled].any() or np.count_nonzero(rows) < 4:
            continue
        if float(norm(rows - rows.T)) <= steps.steps[0][1] * float(norm(rows)):
            found[layer] = int((~filled).sum())
    if found:
        layer, count = next(iter(found.items()))
        words = f"In {layer}, zeros fill {number_of(count, 'row')} of {side.side} where columns "
        words += "have numbers; the other rows are the first of a symmetric matrix"
        yield Sign("B47", side.side, tuple(found), words, ())


def _told(side: Side, layer: str) -> bool:
    """Does a fault explain the layer, this one or any that leaves nothing to drawing?"""
    idea, left = side.of(layer)
    exact = side.rank(layer, left) < side.ladders[layer].by_drawing
    return "B40" in idea.faults or (idea != PLAIN and exact)


def _collapsed(case: Case, side: Side) -> dict[str, tuple[int, int]]:
    """Layer → (rank of theirs, of ours), where theirs is at most two thirds of ours."""
    out = {}
    for layer in side.unexplained():
        seen = see(case, layer)[side.side]
        if seen.T.shape == seen.X.shape and len(seen.X) <= LARGEST:
            floor = side.ladders[layer].steps[0][1]
            theirs, ours = _rank(seen.T, floor), _rank(seen.X, floor)
            if 3 * theirs <= 2 * ours and theirs < ours:
                out[layer] = theirs, ours
    return out


def _rank(X: Array, floor: float) -> int:
    """Eigenvalues above what rounding explains."""
    X = X / max(float(abs(X).max()), 1e-300)  # LAPACK fails near the largest float
    values = np.abs(np.linalg.eigvalsh((X + X.T) / 2))
    return int((values > max(floor, 1e-13 * len(X)) * values.max(initial=0)).sum())


def _random(case: Case, found: Mapping[str, Side], family: Family) -> Iterator[Sign]:
    """Theirs is a random pass of a network with dropout, or has other weights (`dropped`)."""
    if not found["A"].unexplained():
        return
    one = random_pass(case, found, family)
    if one is None:
        return
    words = {
        "B55": f"With dropout of about {one.p:.2g} on {one.place} a pass is {one.spread:.2g} from "
        f"the mean of passes, and theirs is {one.theirs:.2g}",
        "B57": f"With other weights of {one.place}, {one.p:.2g} of their size away at random, it "
        f"is {one.spread:.2g} from the mean of such, and theirs is {one.theirs:.2g}. Arithmetic "
        "that was not tried may look so",
    }[family.fault] + "; a test says so, no equality"
    for name, side in found.items():
        layers = tuple(x for x in one.layers if x in side.open())
        if layers:
            yield Sign(family.fault, name, layers, words, () if family is DROPOUT else NETWORK)


def _other_norms(case: Case, side: Side) -> Iterator[Sign]:
    """A says that the weights of a LayerNorm are not ours.

    Definition
        a = γ x̂ + β with 1ᵀ x̂ = 0. So v = [1/γ; −Σ β/γ] has vᵀ [a; 1] = 0 in every row, whatever the
        rows are, and A_joint v = 0. Theirs has such a vector of its own where its smallest
        eigenvalue is 0, and the weights are not ours where it is not v.

    Proof: tests/test_judge_network.py::test_weights_of_another_norm_show
    """
    found = {}
    for layer in side.unexplained() if case.model is not None else ():
        seen, v = see(case, layer)["A"], _null_vector(case, layer)
        if v is None or seen.T.shape != (len(v), len(v)) or len(v) > LARGEST:
            continue
        d = np.sqrt(np.maximum(np.diag(seen.T), 1e-300))
        values, vectors = np.linalg.eigh(seen.T / np.outer(d, d))
        own, ours = vectors[:, 0], v * d / float(norm(v * d))
        rounding = max(side.ladders[layer].steps[0][1], 1e-13 * len(v)) * values[-1]
        apart = float(norm(ours - own * float(own @ ours)))
        # what rounding may turn the vector by (Davis and Kahan), which must say something
        turned = rounding / max(values[1] - values[0], 1e-300)
        if abs(values[0]) <= rounding and 10 * turned < min(apart, 1):
            found[layer] = apart
    if found:
        far = max(found.values())
        words = f"In {next(iter(found))}, A is that of a LayerNorm whose gain and bias are other "
        words += f"than ours: its null vector is {far:.1g} from theirs. Which weights, A cannot say"
        yield Sign("B57", "A", tuple(side.unexplained()), words, ())


def _null_vector(case: Case, layer: str) -> Array | None:
    """v of `_other_norms`, where the layer reads a LayerNorm and A has a column of the bias."""
    assert case.model is not None
    config, P = case.model.config, case.model.parameters
    name = _norm_before(config, layer)
    if config.norm is not Norm.LAYER or not config.norm_gain or name is None:
        return None
    gain = np.asarray(P[f"{name}.weight"], np.float64) + float(config.norm_offset)
    bias = np.asarray(P[f"{name}.bias"], np.float64) if config.norm_bias else 0 * gain
    if not gain.all() or (layer not in case.joint and bias.any()):
        return None
    column = [-(bias / gain).sum()] if layer in case.joint else []
    return np.concatenate([1 / gain, column])


def _norm_before(config: ModelConfig, layer: str) -> str | None:
    """The norm whose output the layer reads, or None."""
    if layer == "head":
        return "final_norm"
    block, _, part = layer.partition(".mlp." if ".mlp." in layer else ".attn.")
    if config.norm_place is NormPlace.POST or part in ("o", "down") or layer == "patch":
        return None
    mlp = ".mlp." in layer and config.residual is not Residual.SHARED
    return f"{block}.{'mlp' if mlp else 'attn'}_norm"


def _drifting(side: Side) -> Iterator[Sign]:
    """A is ours in the first layers alone, and further off behind them."""
    layers = side.unexplained()
    fine = [x for x in side.ladders if side.of(x)[0] == PLAIN and x not in layers]
    order = list(side.ladders)
    if not fine or not layers or max(map(order.index, fine)) > min(map(order.index, layers)):
        return
    errors = [side.plain(x).error for x in layers]
    if len(errors) > 1 and math.isfinite(max(errors)) and errors[-1] > errors[0]:
        words = f"A is ours up to {fine[-1]}, and {errors[0]:.1g} to {max(errors):.1g} off from "
        words += f"{layers[0]} on. Not confirmed"
        yield Sign("B57", "A", tuple(layers), words, NETWORK)
