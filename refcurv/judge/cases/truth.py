"""Every number of a valid case, by the routes that users run: the fast passes, collect, the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.gram import add_gram
from refcurv.algebra.staircase import cut
from refcurv.curvature import exact
from refcurv.curvature.bases import Bases, decompose
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factor, Factors, collect
from refcurv.editing.projection import keep_pairs
from refcurv.judge.cases.flows import Flow, Seen, against, drawn, flow, kept_rows, nats, seen
from refcurv.law.checks import Array
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model, resident
from refcurv.passes.fast import FAST

SHARES = (0.5, 0.9)
"""rho of the two masks that a case has."""

DENSE = 128
"""Parameters of the largest layer whose curvature a case holds densely: half a MB in all."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a set of cases is about. Fields: model, in float64; corpus; layers; seed of labels."""

    model: Model
    corpus: Corpus
    layers: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """The numbers of one subject, and what they are made of.

    Fields: gold, sampled: flows against the corpus's labels and against drawn ones; labels: the
    drawn ones. collected: of `collect`, by the kind of labels. factors: `sampled` of the stored
    rows, to which the sums in the file belong. bases: theirs. arrays: by the names in the file.
    """

    subject: Subject
    seen: Seen
    gold: Flow
    sampled: Flow
    labels: Array
    collected: Mapping[str, Factors]
    factors: Factors
    bases: Bases
    arrays: dict[str, Array]


def truth(subject: Subject) -> Truth:
    """All numbers of a valid case."""
    model, corpus, seed = subject.model, subject.corpus, subject.seed
    config, parameters = model.config, resident(model, np.float64)
    one = seen(config, corpus)
    gold = flow(config, parameters, one, against(one, one.label), FAST)
    labels = drawn(one, gold.logits, seed)
    sampled = flow(config, parameters, one, against(one, labels), FAST)
    names = ",".join(subject.layers)
    collected = {
        kind: collect(model, corpus, names, kind, seed if kind == "sampled" else 0)
        for kind in ("sampled", "empirical", "expected")
    }
    factors = _of_rows(collected["sampled"], one, sampled)
    bases = decompose(factors)
    made = Truth(subject, one, gold, sampled, labels, collected, factors, bases, {})
    for name, array in _arrays(made):
        made.arrays[name] = np.asarray(array)
    return made


def _of_rows(collected: Factors, one: Seen, sampled: Flow) -> Factors:
    """The factors of these very rows: a reader finds their sums but for its own rounding."""

    def of(layer: str) -> Factor:
        tap = sampled.taps[layer]
        keep = kept_rows(one, layer, tap)
        a, n = tap.a[keep], int(keep.sum())
        sum_a = None if collected[layer].sum_a is None else a.sum(axis=0)
        return Factor(gram(a), n, gram(tap.g[keep]), n, sum_a=sum_a)

    return replace(collected, layers={layer: of(layer) for layer in collected})


def gram(rows: Array) -> Array:
    """Σ x xᵀ over rows (N, X), symmetric to the bit."""
    lower = np.zeros((rows.shape[1], rows.shape[1]))
    add_gram(rows, lower, onto=False)
    return np.asarray(np.tril(lower) + np.tril(lower, -1).T)


def _arrays(made: Truth) -> Iterator[tuple[str, Array]]:
    """Names and arrays, in the order of the file."""
    one, subject, parameters = made.seen, made.subject, resident(made.subject.model, np.float64)
    for name, array in parameters.items():
        yield f"weights.parameters.{name}", array
    for name in ("tokens", "images", "labels", "mask", "segments"):
        if (array := getattr(subject.corpus, name)) is not None:
            yield f"corpus.{name}", array
    yield "labels", one.label.astype(np.int32)
    yield "drawn", made.labels.astype(np.int32)
    yield from outputs(one, made.gold)
    for name in parameters:
        yield f"gradients.{name}", made.gold.gradient[name]
    for layer in subject.layers:
        yield from _of_layer(made, layer)
    yield from _exact(made)


def outputs(one: Seen, gold: Flow) -> Iterator[tuple[str, Array]]:
    """Logits, nats and loss."""
    each = nats(one, gold.logits)
    yield "logits", blank(gold.logits, one.real)
    yield "nats", each
    yield "loss", np.asarray(each.sum())


def blank(x: Array, real: Array) -> Array:
    """Zeros on padding, where no number means anything."""
    if real.shape != x.shape[:2]:  # of images, which have none
        return x
    return np.where(real[..., None], x, 0.0)


def _of_layer(made: Truth, layer: str) -> Iterator[tuple[str, Array]]:
    one, tap = made.seen, made.gold.taps[layer]
    keep = kept_rows(one, layer, tap)
    yield f"rows.{layer}.kept", keep.astype(np.uint8)
    yield f"rows.{layer}.a", blank(tap.a, one.real)
    yield f"rows.{layer}.g", blank(tap.g, one.real)
    yield f"rows.{layer}.g_sampled", blank(made.sampled.taps[layer].g, one.real)
    factor, basis = made.factors[layer], made.bases[layer]
    yield f"factors.{layer}.sum_A", factor.sum_A
    yield f"factors.{layer}.n_A", np.asarray(factor.n_A, np.int64)
    if factor.sum_a is not None:
        yield f"factors.{layer}.sum_a", factor.sum_a
    yield f"factors.{layer}.sum_G", factor.sum_G
    yield f"factors.{layer}.n_G", np.asarray(factor.n_G, np.int64)
    yield f"empirical.{layer}.sum_G", gram(tap.g[keep])
    yield f"expected.{layer}.sum_G", made.collected["expected"][layer].sum_G
    yield from basis_arrays(layer, basis)
    W = made.subject.model.parameters[made.subject.model.config.weight_of(layer)]
    yield from edit_arrays(layer, W, basis)


def basis_arrays(layer: str, one: Eigenbasis) -> Iterator[tuple[str, Array]]:
    """A basis as its file has it."""
    for part in ("U_A", "mu", "U_G", "lam"):
        yield f"basis.{layer}.{part}", getattr(one, part)


def share_name(rho: float) -> str:
    """How a share is called in a name: 0.5 → "rho50"."""
    return f"rho{round(100 * rho)}"


def edit_arrays(layer: str, W: Array, one: Eigenbasis) -> Iterator[tuple[str, Array]]:
    """Mask and edited weights at each share; none where there is no mass to take a share of."""
    if not one.lam[0] * one.mu[0] > 0:
        return
    for rho in SHARES:
        mask = cut(one.lam, one.mu, rho).mask(W.shape[1])
        at = f"edits.{share_name(rho)}.{layer}"
        yield f"{at}.mask", mask.astype(np.uint8)
        yield f"{at}.weight", keep_pairs(W, one, mask)


def dense_layer(subject: Subject) -> str | None:
    """The smallest linear layer, the last of equals; None: all are too large for dense curvature.

    A tied head has no rows of its own.
    """
    config = subject.model.config
    own = [name for name in subject.layers if not (name == "head" and config.tied)]
    size = {name: np.prod(config.linear_layers()[name]) for name in own}
    small = [name for name in own if size[name] <= DENSE]
    return min(reversed(small), key=lambda name: size[name], default=None)


def _exact(made: Truth) -> Iterator[tuple[str, Array]]:
    layer = dense_layer(made.subject)
    if layer is None:
        return
    given = made.subject.model, made.subject.corpus
    wrt = f"{layer}.weight"
    yield f"exact.{layer}.ggn", exact.ggn(*given, wrt=wrt)
    yield f"exact.{layer}.fisher", exact.fisher(*given, wrt=wrt)
    yield f"exact.{layer}.hessian", exact.hessian(*given, wrt=wrt)
    yield f"exact.{layer}.f_tok", exact.f_tok(*given, wrt=wrt)
