"""What `validate` was given: each argument is of its kind, or one line says what it must be."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from refcurv.curvature.bases import Bases
from refcurv.curvature.factors import Factors
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.law.checks import ConventionError, NameUnknownError
from refcurv.law.dtypes import require_float
from refcurv.model.given import (
    is_iterable,
    require_callable,
    require_corpus,
    require_model,
    require_whole,
    shown,
)
from refcurv.progress import Progress


def require_ours(model: object, corpus: object, reference: object, basis: object) -> None:
    """Model and corpus are loaded; the others are loaded, or lie at a path; each may be left out.

    Proof: tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if model is not None:
        require_model("validate", model)
    if corpus is not None:
        require_corpus("validate", corpus)
    for what, given, kind in (("reference", reference, Factors), ("basis", basis, Bases)):
        if given is not None and not isinstance(given, kind | str | os.PathLike):
            raise ConventionError(
                f"validate: the {what} must be {kind.__name__} or the path of a file; got "
                f"{shown(given)}."
            )


def require_options(names: object, layers: object, pictures: object, progress: Progress) -> None:
    """Names by name, a pattern, a count, and what is called as work proceeds.

    Proof: tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if not isinstance(names, Mapping | None):
        raise ConventionError(
            f"validate: names must map our layers to theirs, as {{'head': 'lm_head'}}; got "
            f"{shown(names)}."
        )
    if not isinstance(layers, str | None):
        raise NameUnknownError(
            "validate: layers must be one text, such as 'blocks.*.mlp.up,head'; got "
            f"{shown(layers)}."
        )
    require_whole("validate", "pictures", pictures, 0)
    require_callable("validate", "progress", progress)


def accepted(given: Any) -> tuple[str, ...]:
    """The dtypes that are accepted without a declaration; one text is one of them.

    Proof: tests/test_hostile.py::test_arguments_of_any_type_are_refused_in_one_line
    """
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Collection) or not is_iterable(given):
        raise ConventionError(
            f"validate: accept must name dtypes, as ['bfloat16']; got {shown(given)}."
        )
    return tuple(require_float("validate", "accept", dtype, ROUNDOFF) for dtype in given)
