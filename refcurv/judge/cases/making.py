"""A set of cases: the truth of a model and a corpus, bugs planted in it, and what is free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.staircase import cut
from refcurv.files.disk import new_folder, write_json
from refcurv.files.paths import PathLike, machine_faults, output_path
from refcurv.files.weights import config_to_json
from refcurv.judge.cases.case import INVALID, SCHEMA, VALID, Case, Check, write_case
from refcurv.judge.cases.freedom import acceptable
from refcurv.judge.cases.harness import NEEDS, accepted, budgets
from refcurv.judge.cases.planted import BUGS, invalid
from refcurv.judge.cases.routes import checks
from refcurv.judge.cases.truth import SHARES, Subject, Truth, dense_layer, truth
from refcurv.law.checks import (
    ConventionError,
    RangeError,
    RefcurvError,
    SchemaError,
    require_seed,
)
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_fit
from refcurv.model.given import require_callable, require_corpus, require_model
from refcurv.model.patterns import expand
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, silent

MOST_PARAMETERS: Final = 2**14
"""Parameters of a model, each of which is stepped by itself (the second route of its gradient)."""

MOST_PASSES: Final = 2**12
"""Labelled positions times vocabulary: for the expected Fisher a backward pass each, twice."""


class CaseError(RefcurvError):
    """A number that its second route does not confirm: no case is written."""

    status = 3


def make_cases(
    model: Model,
    corpus: Corpus,
    folder: PathLike,
    *,
    layers: str = "**",
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """`cases` of a user's own model into a new folder; returns the manifests.

    Raises SchemaError where something is at `folder` already, before the work.

    Proof: tests/test_cases.py::test_a_users_own_set
    """
    require_callable("cases", "progress", progress)
    target = output_path("cases", folder)
    with machine_faults("cases", folder):
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise SchemaError(
                f"cases: {str(target)!r} exists and is no empty folder. Name another."
            )
    made = cases(model, corpus, layers=layers, seed=seed, progress=progress)
    return write_cases(made, folder)


def not_planted(manifests: Iterable[dict[str, Any]]) -> list[str]:
    """The bugs that no case has: nothing in the model and corpus shows them."""
    said = {one["reason"] for one in manifests if one["result"] == INVALID}
    return [f"{bug.id.partition('-')[0]} ({bug.what})" for bug in BUGS if bug.what not in said]


@one_blas_thread()
def cases(
    model: Model,
    corpus: Corpus,
    name: str = "model",
    *,
    layers: str = "**",
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[Case]:
    """The cases of one model and corpus: the valid one first, then bugs, then what is free.

    Definition
        The valid case has every number, each by two routes within budget (`routes`). A bug that no
        harness could see in this model is left out: an invalid case is off by ten budgets at least.

    Args:
        model: loaded in float64, and small (`require_small`).
        corpus: what it reads.
        name: of the cases: NAME_v1, and AREA_BUG-NAME_v1.
        layers: pattern over linear layers.
        seed: of the labels that are drawn, and of what is free.
        progress: called with (done, all).

    Raises:
        RangeError: too large; the message says what would fit. ConventionError: the model was
        loaded in float32. CaseError: a number is not confirmed. What `collect` refuses.

    Proof: tests/test_cases.py::test_a_users_own_set
    """
    made = truth(subject(model, corpus, layers, seed))
    steps = sum(math.prod(shape) for shape in model.config.parameter_shapes().values())
    total = steps + len(BUGS) + 1
    true = valid(made, f"{name}_v1", progress=lambda done, _: progress(done, total))
    yield true
    done = counter(progress, total, steps)
    for bug in BUGS:
        case = invalid(bug, made, true)
        done()
        if case is not None:
            yield case
    yield from acceptable(true, seed)
    done()


def subject(model: Model, corpus: Corpus, layers: str, seed: int) -> Subject:
    """The subject, once it is known to be small and to be read."""
    require_model("cases", model)
    require_corpus("cases", corpus)
    if model.dtype != "float64":
        raise ConventionError('cases: load the model with dtype="float64".')
    require_small(model.config, corpus)
    chosen = expand(layers, list(model.config.linear_layers()))
    return Subject(model, corpus, tuple(chosen), require_seed("cases", seed))


def require_small(config: ModelConfig, corpus: Corpus) -> None:
    """Refuse what would take hours, with the size that would fit."""
    sizes = {name: math.prod(shape) for name, shape in config.parameter_shapes().items()}
    if (total := sum(sizes.values())) > MOST_PARAMETERS:
        raise RangeError(
            f"cases: the model has {number_of(total, 'parameter')}; at most "
            f"{MOST_PARAMETERS:,} fit, for the "
            "loss is computed anew for each. The largest is "
            f"{max(sizes, key=sizes.__getitem__)!r}. Make a tiny one of the same family: copy its "
            "config.json, set the width to 16, the MLP's to 32, 2 layers, 2 heads and a "
            "vocabulary of 64; let transformers write random weights, "
            "AutoModelForCausalLM.from_config(config).save_pretrained('tiny'); then refcurv "
            "convert tiny w.h5.",
            parameters=total,
        )
    labelled = int((require_fit("cases", corpus, config) >= 0).sum())
    if (passes := labelled * config.vocabulary) > MOST_PASSES:
        raise RangeError(
            f"cases: {labelled:,} labelled positions times a vocabulary of {config.vocabulary:,} "
            f"ask for {passes:,} backward passes; at most {MOST_PASSES:,} fit. Give a corpus of "
            f"{max(1, MOST_PASSES // config.vocabulary):,} labelled positions.",
            passes=passes,
        )


def valid(
    made: Truth,
    id: str,
    feature: str = "a user's own model",
    *,
    more: Callable[[Sequence[Check]], Iterable[Check]] = lambda known: (),
    progress: Progress = silent,
) -> Case:
    """The valid case, once every number is confirmed: by `checks`, and by `more` that knows them.

    Raises CaseError naming the first number that is not.
    """
    confirmed = tuple(checks(made, progress))
    confirmed = (*confirmed, *more(confirmed))
    wrong = [one for one in confirmed if not one.passed]
    if wrong:
        one = wrong[0]
        raise CaseError(
            f"cases: {one.quantity}: {one.routes[0]} and {one.routes[1]} differ by {one.error:.1e} "
            f"> {one.budget:.1e} of its terms. Nothing was written; `refcurv audit` says more."
        )
    dense, subject = dense_layer(made.subject), made.subject
    return Case(
        id=id,
        area="model",
        result=VALID,
        arrays=made.arrays,
        config=config_to_json(subject.model.config),
        reason=feature,
        needs=NEEDS,
        method={
            "fisher": str(made.factors.fisher), "seed": subject.seed, "draws": 1,
            "rows": str(made.factors.rows), "dtype": "float64", "rho": list(SHARES),
            "exact": dense and f"{dense}.weight",
        },
        checks=confirmed,
        left_out=() if dense else ("exact: the smallest layer is too large to be dense",),
        diagnostics=_diagnostics(made),
    )  # fmt: skip


def _diagnostics(made: Truth) -> dict[str, float]:
    """The least gap at a cut, by which a mask is decided; asymmetry of what should have none."""
    gaps = [
        cut(one.lam, one.mu, rho).gap
        for one in made.bases.values() if one.lam[0] * one.mu[0] > 0 for rho in SHARES
    ]  # fmt: skip
    sums = [f.sum_G for f in made.collected["expected"].values()]
    skew = [np.abs(S - S.T).max() for S in sums]
    return {"min_gap": float(min(gaps, default=0.0)), "asymmetry": float(max(skew))}


def write_cases(made: Iterable[Case], folder: PathLike) -> list[dict[str, Any]]:
    """Every case into a new folder, whole or not at all; returns the manifests.

    Nothing is written that the harness does not accept, or reject, as it should.
    """
    out = []
    with new_folder("cases", folder) as inside:
        for case in made:
            if accepted(case) == (case.result == INVALID):
                verb = "accepted" if case.result == INVALID else "rejected"
                raise CaseError(f"cases: {case.id} is {case.result}, and the harness {verb} it.")
            out.append(write_case(case, Path(inside), budgets(case)))
        index = {
            "schema": SCHEMA,
            "cases": [{k: one[k] for k in ("caseId", "result", "flags", "needs")} for one in out],
        }
        write_json(index, Path(inside) / "index.json")
    return out
