"""Which other matrix of ours theirs may be: of another layer or side, or of several layers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import misjoined
from refcurv.judge.diagnosis.seen import Seen, Try
from refcurv.judge.diagnosis.variants.setting import FUSED
from refcurv.law.checks import Array
from refcurv.law.words import number_of
from refcurv.model.config import NormPlace


class Index:
    """Diagonals of all our matrices, to find those which theirs may be, and these when asked."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._diagonals: dict[tuple[str, str], Array] = {}
        self._pool: tuple[object, Array] = (None, np.zeros(0))

    def tries(self, seen: Seen, wanted: Container[str] | None = None) -> Iterator[Try]:
        """Every hypothesis that fits the shapes. Args: wanted, make these faults only."""
        shards = wanted is None or ("B34" in wanted and "B47" in wanted)
        if shards and seen.T.shape != seen.X.shape:
            yield from self.misjoined(seen)
        if wanted is None or "B40" in wanted:
            yield from self.pooled(seen)
        if wanted is None or any(id in wanted for id in ("B32", "B34", "B35", "B38", "B42")):
            yield from self.others(seen)

    def others(self, seen: Seen, most: int = 2) -> Iterator[Try]:
        """Ours of other layers and of the other side that T is nearest to, by the diagonals."""
        if seen.T.ndim != 2 or seen.T.shape[0] != seen.T.shape[1]:
            return
        own = _shares(np.diag(seen.T))
        found = []
        for (layer, side), diagonal in self._read().items():
            if len(diagonal) == len(own) and (layer, side) != (seen.layer, seen.side):
                far = (layer != seen.layer, _kind(layer) != _kind(seen.layer))
                found.append((float(norm(_shares(diagonal) - own)), *far, layer, side))
        for *_, layer, side in sorted(found)[:most]:
            ours = self._case.ours(layer)
            Y = ours.A if side == "A" else ours.G
            Y = np.diag(Y) if Y.ndim == 1 else Y
            if Y.shape == seen.X.shape and np.array_equal(Y, seen.X):
                continue  # layers that read the same input
            fault, alike = self._of_another(seen, layer, side)
            note = f"it is our {side} of {layer}"
            yield Try((fault,), note, Y, alike, of=(layer, side))

    def misjoined(self, seen: Seen) -> Iterator[Try]:
        """Shards of G of another part of the same fused layer, joined to another shape."""
        own, known = fused(seen.layer), self._read()
        for layer in self._case.reference:
            if layer == seen.layer or seen.side == "A" or fused(layer) != own:
                continue
            if len(known[layer, "G"]) == len(seen.X):
                for one in misjoined(replace(seen, X=self._case.ours(layer).G)):
                    note = f"it is our G of {layer}, whose {one.note}"
                    yield replace(one, faults=("B34", "B47"), note=note)

    def pooled(self, seen: Seen) -> Iterator[Try]:
        """The sums of several layers together, where that is nearer than ours.

        Of all of one kind and size; of those of one input and size, which programs may hold in one.
        """
        size, kind, known = len(seen.X), _kind(seen.layer), self._read()
        fits = [x for x in self._case.reference if len(known[x, seen.side]) == size]
        every = [x for x in fits if _kind(x) == kind]
        if seen.T.shape != seen.X.shape:
            return
        own, ours = _shares(np.diag(seen.T)), _shares(known[seen.layer, seen.side])
        both = [x for x in every if x in self._case.matched]
        parts = partners(seen.layer, fits)
        for names in dict.fromkeys((tuple(every), tuple(both), *parts)):
            diagonal = _shares(sum((known[x, seen.side] for x in names), np.zeros(size)))
            if len(names) < 2 or norm(diagonal - own) >= norm(ours - own):
                continue
            Y, note = (
                self._pooled(seen.side, names),
                f"the sums of {number_of(len(names), 'layer')} together",
            )
            times = len(names) * float(np.trace(Y))
            if abs(float(np.trace(seen.T)) - times) <= 0.5 * times / len(names):
                Y, note = Y * len(names), f"{note}, over the rows of one"
            yield Try(("B40",), note, Y)

    def _pooled(self, side: str, names: tuple[str, ...]) -> Array:
        """The mean over the rows of all of them; that of the last call is kept."""
        if self._pool[0] != (side, names):
            each = [self._case.ours(x) for x in names]
            total = sum(((x.sum_A if side == "A" else x.sum_G) for x in each), np.zeros(()))
            n = sum(x.n_A if side == "A" else x.n_G for x in each)
            self._pool = (side, names), total / n
        return self._pool[1]

    def _of_another(self, seen: Seen, layer: str, side: str) -> tuple[str, tuple[str, ...]]:
        """The fault of theirs being our `side` of `layer`."""
        if side != seen.side:
            return ("B32", ()) if layer == seen.layer else ("B32", ("B38",))
        if side == "G" and fused(seen.layer) == fused(layer):
            return "B34", ("B38",)  # another part of one matrix
        if self._wholly(seen, layer):
            return "B38", ()
        later = side == "A" and self._in_place(seen.layer, layer)
        if _kind(layer) == _kind(seen.layer):
            return "B38", ("B42",) if later else ()
        if later:
            return "B42", ("B34", "B38")
        return ("B34" if side == "A" else "B35"), ("B38",)

    def _wholly(self, seen: Seen, layer: str) -> bool:
        """Is the other side of theirs, too, nearest to that of `layer`?"""
        side, theirs = "AG".replace(seen.side, ""), self._case.theirs(seen.layer)
        T = theirs.A if side == "A" else theirs.G
        if T is None or T.ndim != 2 or T.shape[0] != T.shape[1]:
            return False
        own, known = _shares(np.diag(T)), self._read()
        fits = [x for x, s in known if s == side and len(known[x, s]) == len(own)]
        far = {x: float(norm(_shares(known[x, side]) - own)) for x in fits}
        return layer in far and far[layer] <= min(far.values())

    def _in_place(self, layer: str, later: str) -> bool:
        """Do both read the stream itself, `later` behind a sum that `layer` does not see?

        A sum in place then overwrites what `layer` read by what `later` reads.
        """
        model = self._case.model
        if model is None or model.config.norm_place is not NormPlace.POST:
            return False
        order = [fused(x) for x in model.config.linear_layers()]
        one, two = fused(layer), fused(later)
        return {one[1], two[1]} <= {*_FUSED.values()} and order.index(one) < order.index(two)

    def _read(self) -> Mapping[tuple[str, str], Array]:
        if not self._diagonals:
            for layer in self._case.reference:
                both = self._case.once(("diagonals", layer), partial(diagonals, self._case, layer))
                self._diagonals |= {(layer, side): both[side] for side in "AG"}
        return self._diagonals


def diagonals(case: Case, layer: str) -> dict[str, Array]:
    """Those of the sums of our A and G."""
    one = case.ours(layer)
    sums = {"A": one.sum_A, "G": one.sum_G}
    return {side: np.array(S if S.ndim == 1 else np.diag(S)) for side, S in sums.items()}


def _shares(diagonal: Array) -> Array:
    total = float(diagonal.sum())
    return diagonal / total if total > 0 else diagonal


_FUSED = {kind: "_".join(sorted(group)) for group in FUSED for kind in group}


def fused(layer: str) -> tuple[str, str]:
    """Its block, and the matrix that programs may hold it in, with others of the same input."""
    block, _, kind = layer.rpartition(".")
    return block, _FUSED.get(kind, kind)


def partners(layer: str, others: Iterable[str]) -> list[tuple[str, ...]]:
    """The layer with one, and with all, of the others that one matrix may hold with it."""
    every = [x for x in others if fused(x) == fused(layer)]
    pairs = [tuple(x for x in every if x in (layer, y)) for y in every if y != layer]
    return [*pairs, tuple(every)]


def _kind(layer: str) -> str:
    """`mlp.up` of `blocks.3.mlp.up`."""
    return layer.split(".", 2)[-1] if layer.startswith("blocks.") else layer
