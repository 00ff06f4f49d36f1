"""Do reference, basis, model and corpus belong together? If not, every hypothesis is nonsense."""

from __future__ import annotations

from refcurv.curvature.bases import Bases
from refcurv.curvature.factors import Factors
from refcurv.files.digest import digest, short
from refcurv.law.checks import ConventionError
from refcurv.law.words import number_of
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.passes.shards import shards


def require_together(
    reference: Factors, model: Model | None, corpus: Corpus | None, bases: Bases | None
) -> None:
    """Refuse a model, a corpus or a basis that is not the reference's, as far as these tell.

    The weights are compared by digest, where the reference and the basis say it. A corpus is known
    by its number of rows. One of other tokens and as many rows is not noticed.

    Raises:
        ConventionError: other weights, another number of rows, a layer that the model has not.

    Proof: tests/test_validate_cli.py::test_what_does_not_belong_together_is_refused
    """
    made = {"the reference": reference.weights, "the basis": bases and bases.weights}
    if model is not None:
        made["the model"] = digest(model)
        _require_layers(reference, model)
    told = {what: weights for what, weights in made.items() if weights}
    if len(set(told.values())) > 1:
        which = ", ".join(f"{what} of {short(weights)}" for what, weights in told.items())
        raise ConventionError(
            f"validate: these are not of the same weights: {which}. Make the reference and the "
            "basis anew from this model, or give the model that they were made from."
        )
    if model is not None and corpus is not None:
        _require_rows(reference, model, corpus)


def _require_layers(reference: Factors, model: Model) -> None:
    known = {**model.config.linear_layers(), **model.config.tables()}
    for name in reference:
        if name not in known:
            raise ConventionError(
                f"validate: the model has no layer {name!r}, which the reference has. It was made "
                "from another model."
            )


def _require_rows(reference: Factors, model: Model, corpus: Corpus) -> None:
    """The layers within blocks read every kept row of the corpus."""
    units = shards(corpus, model.config, reference.rows)
    count = sum(int(unit.keep_BT.sum()) for unit in units)
    name = next((name for name in reference if name.startswith("blocks.")), None)
    if name is not None and reference[name].n_A != count:
        raise ConventionError(
            f"validate: the reference has {number_of(reference[name].n_A, 'row')} "
            f"({reference.rows}), and the "
            f"corpus {count}. Give the corpus that the reference was collected from."
        )
