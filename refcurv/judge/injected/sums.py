"""Faults of scale, count, layout and layer: what A, G and n become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.judge.dump import Theirs
from refcurv.judge.injected.injection import Change, Injection
from refcurv.judge.injected.rows import network, rows
from refcurv.judge.injected.truth import Layers, Truth, both
from refcurv.law.checks import Array

AMOUNT: Final = 0.1
"""Of damping: over the mean eigenvalue."""

STEPS: Final = 4
"""Steps of accumulation, or workers, that the loss or the gradients are divided by."""

SCALE: Final = 2.0**16
"""Of the gradients in mixed precision."""


def each(change: Callable[[Truth, str, Theirs], Theirs | None]) -> Change:
    """`change` in every layer; None in those where it cannot be."""

    def made(truth: Truth, layers: Layers) -> Layers:
        found = {name: change(truth, name, one) for name, one in layers.items()}
        if not any(found.values()):
            return {}
        return {name: one or layers[name] for name, one in found.items()}

    return made


def scaled(G: Callable[[Truth], float] = lambda _: 1.0, A: float = 1.0, n_A: int = 1) -> Change:
    """A, G and n_A times numbers."""

    def change(truth: Truth, __: str, one: Theirs) -> Theirs:
        X, n, Y, _ = both(one)
        return replace(one, A=A * X, G=G(truth) * Y, n_A=n_A * n)

    return each(change)


def _outputs(truth: Truth) -> float:
    assert truth.model is not None
    return 1 / truth.model.config.vocabulary


def _length(truth: Truth) -> int:
    """Positions of a sequence, or of an image."""
    assert truth.corpus is not None and truth.model is not None
    image = truth.model.config.image
    return truth.corpus.label.shape[1] if image is None else image.positions


def _positions(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    """One loss term for each of the layer's positions, where an image has one."""
    assert truth.model is not None
    if truth.model.config.image is None or layer == "head":
        return None
    return replace(one, G=both(one)[2] * _length(truth))


def _places(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    assert truth.model is not None
    image = truth.model.config.image
    if image is None or layer != "patch":
        return None
    return replace(one, G=both(one)[2] / image.patches)


def _damped(_: Truth, __: str, one: Theirs) -> Theirs:
    def damped(X: Array) -> Array:
        return np.asarray(X + AMOUNT * np.trace(X) / len(X) * np.eye(len(X)))

    A, _n, G, _m = both(one)
    return replace(one, A=damped(A), G=damped(G))


def _corner(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    """The ones of padding and of last positions are in the corner, and in n they are not."""
    assert truth.corpus is not None
    every, (A, n_A, *_) = truth.corpus.label.size, both(one)
    if layer not in truth.joint or every == n_A:
        return None
    A = A.copy()
    A[-1, -1] = every / n_A
    return replace(one, A=A)


def _ones_first(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    if layer not in truth.joint or one.A is None:
        return None
    return replace(one, A=np.roll(one.A, 1, axis=(0, 1)))


def _ones_missing(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    if layer not in truth.joint or one.A is None:
        return None
    return replace(one, A=one.A[:-1, :-1])


def _ones_added(truth: Truth, layers: Layers) -> Layers:
    """A column of ones where there is no bias."""
    found = rows(truth, network(truth))

    def added(_: Truth, layer: str, one: Theirs) -> Theirs | None:
        if truth.factors[layer].sum_a is not None or layer not in found:
            return None
        x = np.column_stack([found[layer].a, np.ones(len(found[layer].a))])
        return replace(one, A=x.T @ x / len(x))

    return each(added)(truth, layers)


def _swapped(_: Truth, __: str, one: Theirs) -> Theirs:
    return replace(one, A=one.G, G=one.A)


def _swapped_square(_: Truth, __: str, one: Theirs) -> Theirs | None:
    """Where W is square the sizes do not tell."""
    A, _n, G, _m = both(one)
    return replace(one, A=G, G=A) if A.shape == G.shape else None


def _rolled(_: Truth, __: str, one: Theirs) -> Theirs | None:
    A = both(one)[0]
    return replace(one, A=np.roll(A, len(A) // 2, axis=0)) if len(A) > 1 else None


def _blocks(layers: Layers) -> dict[str, list[str]]:
    """The layers of one kind, block by block; kinds that several blocks have."""
    kinds: dict[str, list[str]] = {}
    for name in layers:
        if name.startswith("blocks."):
            kinds.setdefault(name.split(".", 2)[2], []).append(name)
    return {kind: names for kind, names in kinds.items() if len(names) > 1}


def _next_block(_: Truth, layers: Layers) -> Layers:
    """Each block has the next one's factors."""
    kinds, out = _blocks(layers).values(), dict(layers)
    for names in kinds:
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            out[name] = layers[other]
    return out if kinds else {}


def _shared(_: Truth, layers: Layers) -> Layers:
    """All blocks add to one sum."""
    kinds, out = _blocks(layers).values(), dict(layers)
    for names in kinds:
        every = [both(layers[name]) for name in names]
        n_A, n_G = sum(one[1] for one in every), sum(one[3] for one in every)
        A = np.sum([A * n for A, n, _n, _m in every], axis=0) / n_A
        G = np.sum([G * m for _n, _m, G, m in every], axis=0) / n_G
        out |= dict.fromkeys(names, replace(layers[names[0]], A=A, G=G, n_A=n_A, n_G=n_G))
    return out if kinds else {}


def _zero(_: Truth, layers: Layers) -> Layers:
    first = next(iter(layers))
    A, _n, G, _m = both(layers[first])
    return {**layers, first: replace(layers[first], A=0 * A, G=0 * G)}


def _missing(_: Truth, layers: Layers) -> Layers:
    return dict(list(layers.items())[1:])


def _counted_otherwise(truth: Truth, _: str, one: Theirs) -> Theirs | None:
    """n_G counts every position."""
    assert truth.corpus is not None
    every, (_A, n_A, _G, n_G) = truth.corpus.label.size, both(one)
    return None if every == n_A else replace(one, n_G=n_G * every / n_A)


SUMS: Final = (
    Injection("B1", "g is the gradient of the mean loss, not of the summed one",
              change=scaled(lambda truth: truth.terms**-2.0)),
    Injection("B5", "a square loss without its half: G is twice as large",
              change=scaled(lambda _: 2.0)),
    Injection("B6", "the loss is averaged over outputs, once", "corpus",
              change=scaled(_outputs)),
    Injection("B7", "each layer has as many loss terms as positions", "corpus",
              change=each(_positions)),
    Injection("B11", "the gradients' scale of mixed precision, 2^16, is left in",
              change=scaled(lambda _: SCALE**2)),
    Injection("B12", "damping is part of A and G", change=each(_damped)),
    Injection("B14", "the places of a convolution are not counted", "corpus",
              change=each(_places)),
    Injection("B30", "the bias's 1 is not masked", "corpus", change=each(_corner)),
    Injection("B31", "A has no column for the bias", change=each(_ones_missing),
              declared={"bias": "joint"}),
    Injection("B31-first", "the column of the bias comes first", change=each(_ones_first)),
    Injection("B31-added", "A has a column for a bias that is not there", "corpus",
              change=_ones_added),
    Injection("B32", "A and G are swapped", change=each(_swapped)),
    Injection("B37", "the loss terms of expand for reduce: G is multiplied by the positions",
              "corpus", change=scaled(lambda truth: float(_length(truth)))),
    Injection("B38", "A and G of the same layer in another block", change=_next_block),
    Injection("B39", "hooks fired twice: A and its count are doubled", change=scaled(n_A=2)),
    Injection("B39-uncounted", "hooks fired twice, and rows are counted once",
              change=scaled(A=2.0)),
    Injection("B40", "all blocks add to the sums of one layer", change=_shared),
    Injection("B43", "the loss was divided by four accumulation steps",
              change=scaled(lambda _: STEPS**-2.0)),
    Injection("B46", "gradients are averaged over four workers before the square",
              change=scaled(lambda _: STEPS**-2.0)),
    Injection("B47", "row shards of A are joined in the wrong order", change=each(_rolled)),
    Injection("B48", "the first layer's hook never fired: zeros", change=_zero),
    Injection("B48-missing", "the first layer's hook never fired: it is not there",
              change=_missing),
    Injection("B78", "the Kronecker product in the other order, where W is square",
              change=each(_swapped_square)),
    Injection("B82", "n of G counts every position", "corpus", change=each(_counted_otherwise)),
)  # fmt: skip
