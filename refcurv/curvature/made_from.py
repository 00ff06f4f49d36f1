"""Factors and bases that are given instead of made: are they of this model and this corpus?"""

from __future__ import annotations

from typing import Any

from refcurv.curvature.bases import Bases, named
from refcurv.curvature.factors import Factors
from refcurv.files.digest import digest, short
from refcurv.law.checks import ConventionError
from refcurv.law.conventions import Rows
from refcurv.law.words import number_of
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.passes.shards import shards


def require_made_from(
    who: str, model: Model, corpus: Corpus, factors: Factors | None, bases: Bases | None
) -> None:
    """Refuse factors and bases of other weights, of another corpus, or that do not belong together.

    Factors say which corpus file they are of. A basis says which factors file it is of. Without the
    factors it is known by its number of rows: a corpus of other tokens and as many rows is not
    noticed. What an older file does not say passes.

    Raises:
        ConventionError: says which does not belong, and what to do.

    Proof: tests/test_reuse.py::test_what_is_of_other_files_is_refused
    """
    if factors is not None:
        what = f"the factors {str(factors.source.get('path'))!r}"
        require_weights(who, what, factors.weights, model)
        _require_input(who, what, factors.source, corpus.source, "corpus")
    if bases is not None:
        require_weights(who, named(bases), bases.weights, model)
        if factors is not None:
            _require_input(who, named(bases), bases.source, factors.source, "factors")
        else:
            _require_rows(who, bases, model, corpus)


def require_weights(who: str, what: str, weights: str | None, model: Model) -> None:
    """Refuse what comes from other weights; None, as of older files, passes."""
    if weights is not None and weights != (own := digest(model)):
        raise ConventionError(
            f"{who}: the model has weights {short(own)}, but {what} comes from weights "
            f"{short(weights)}. Give the model of those, or leave it out."
        )


def _require_input(who: str, what: str, made: Any, given: Any, kind: str) -> None:
    """Is the given file among those that it was made from?"""
    inputs = (made.get("provenance") or {}).get("inputs") or {}
    if inputs and given.get("sha256") not in inputs.values():
        raise ConventionError(
            f"{who}: {what} comes from {', '.join(map(repr, inputs))}, not from the {kind} "
            f"{str(given.get('path'))!r}, or that was changed since. Give the {kind} that it comes "
            "from, or leave it out."
        )


def _require_rows(who: str, bases: Bases, model: Model, corpus: Corpus) -> None:
    """The layers within blocks read every kept row of the corpus."""
    has = next((x.rows for n, x in bases.samples.items() if n.startswith("blocks.")), None)
    kinds = (Rows.REACHED, Rows.ALL, Rows.LABELLED if corpus.images is None else Rows.CLS)
    counts = [_rows(model, corpus, kind) for kind in kinds]
    if has is not None and has not in counts:
        raise ConventionError(
            f"{who}: {named(bases)} is of {number_of(has, 'row')}, and the corpus has "
            f"{counts[0]:,}. Give the corpus that it comes from, or leave it out."
        )


def _rows(model: Model, corpus: Corpus, kind: Rows) -> int:
    return sum(int(unit.keep_BT.sum()) for unit in shards(corpus, model.config, kind))
