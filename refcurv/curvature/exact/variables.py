"""The parameters that a problem is differentiated by, laid end to end as one vector.

Every function of `exact` begins here. What it was given becomes a Problem, and the parameters that
`wrt` names become the entries θ_1 .. θ_P, in the problem's order, each row-major (VEC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from refcurv.curvature.exact.problems import Problem, problem
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    NameUnknownError,
    RangeError,
    as_array,
    require_dtype,
    require_finite,
    require_shape,
)
from refcurv.model.corpus import Corpus
from refcurv.model.given import require_record
from refcurv.model.patterns import expand
from refcurv.model.weights import Model

DENSE = 8192
"""Parameters of the largest block that is made dense: half a GiB."""

Subject = Model | Problem
"""What has curvature: a Model with what it reads, or a Problem, which has its own data."""

Tokens = ArrayLike | Corpus | None
"""What a Model reads: a Corpus, (B, T) integers, or images; None beside a Problem."""

Labels = ArrayLike | None
"""What plain tokens should predict; None is the default of LABELS."""

Vector = Mapping[str, Array]
"""{name: array of the parameter's shape}."""


@dataclass(frozen=True, slots=True)
class Variables:
    """A problem and the names of the parameters that it is differentiated by."""

    problem: Problem
    names: list[str]

    @property
    def size(self) -> int:
        """P, the entries of all of them."""
        return sum(self.problem.parameters[name].size for name in self.names)

    def flat(self, vector: Vector) -> Array:
        """{name: (*shape)} → (P,); {name: (C, *shape)} → (C, P)."""
        parts = []
        for name in self.names:
            array, ndim = np.asarray(vector[name]), self.problem.parameters[name].ndim
            parts.append(array.reshape(*array.shape[: array.ndim - ndim], -1))
        return np.concatenate(parts, axis=-1)

    def named(self, flat_P: Array) -> dict[str, Array]:
        """(P,) → {name: array}."""
        out, begin = {}, 0
        for name in self.names:
            like = self.problem.parameters[name]
            out[name] = flat_P[begin : begin + like.size].reshape(like.shape)
            begin += like.size
        return out


def variables_of(
    who: str, model: Subject, tokens: Tokens, labels: Labels, wrt: str, *, dense: bool = False
) -> Variables:
    """The parameters that `wrt` names, of a Problem or of a Model on tokens.

    With `dense` they must be few enough for a matrix of them to be written.
    """
    if isinstance(model, Problem):
        if tokens is not None or labels is not None:
            raise ConventionError(f"exact.{who}: a Problem has its own data; leave tokens out.")
        found = Variables(model, _float64(who, model, expand(wrt, list(model.parameters))))
    else:
        what, how = "the model must be a Model or a Problem", "rc.load(path)"
        require_record(f"exact.{who}", what, model, Model, how)
        if tokens is None:
            raise ConventionError(
                f"exact.{who}: a Model needs tokens: a Corpus, (B, T) integers, or images."
            )
        names = expand(wrt, list(model.config.parameter_shapes()))
        found = Variables(problem(model, tokens, labels), names)
    # A size is asked for only here: to know it, a lazy parameter is read from its file.
    if dense and (P := found.size) > DENSE:
        raise RangeError(
            f"exact.{who}: the block has {P:,} parameters, and a dense matrix of it would take "
            f"{8 * P * P / 2**30:,.1f} GiB (at most {DENSE:,} parameters are made dense). Ask "
            f"matrix_free.xtrace or extreme_eigenvalues of exact.operator(..., wrt={wrt!r})."
        )
    return found


def _float64(who: str, made: Problem, names: list[str]) -> list[str]:
    """The names, of parameters that a complex step of 1e-30 can move: float64 or wider."""
    for name in names:
        dtype = made.parameters[name].dtype
        if dtype.kind != "f" or np.finfo(dtype).maxexp < np.finfo(np.float64).maxexp:
            raise DTypeError(
                f"exact.{who}: a Problem's parameters must be float64 or longdouble; {name!r} is "
                f"{dtype}. Widen them first: no value changes."
            )
    return names


def layer_shape(who: str, variables: Variables) -> tuple[int, int]:
    """(O, I) of the one linear layer whose weight the variables are."""
    name = variables.names[0]
    if len(variables.names) > 1 or name not in variables.problem.linear:
        raise ConventionError(
            f"exact.{who}: defined for the weight of one linear layer; got "
            f"{', '.join(variables.names)}. Embeddings, gains and tied weights have no rows a, g "
            "of their own."
        )
    O, I = variables.problem.parameters[name].shape  # noqa: E741
    return O, I


def named_by(who: str, vector: Vector) -> str:
    """The pattern that names the parameters of a vector; ConventionError for what is no vector."""
    if not isinstance(vector, Mapping) or not all(isinstance(name, str) for name in vector):
        kind = type(vector).__name__
        raise ConventionError(f"exact.{who}: a vector is {{parameter name: array}}; got {kind}.")
    return ",".join(vector)


def direction(who: str, variables: Variables, vector: Vector) -> Array:
    """The vector as (P,), in float64 or wider, once it is known to fit the variables."""
    named_by(who, vector)
    unknown = sorted(set(vector) ^ set(variables.names))
    if unknown:
        raise NameUnknownError(
            f"exact.{who}: the vector must name the parameters of the block; "
            f"{unknown[0]!r} is in only one of the two."
        )
    for name in variables.names:
        shape = variables.problem.parameters[name].shape
        one = as_array(f"exact.{who}", f"vector[{name!r}]", vector[name], f"{shape} = {name}")
        require_shape(f"exact.{who}", f"vector[{name!r}]", one, shape, name)
        require_dtype(f"exact.{who}", f"vector[{name!r}]", one, "fiub", "real numbers")
    v_P = variables.flat(vector)
    require_finite(f"exact.{who}", "the vector", v_P)
    return np.asarray(v_P, np.result_type(v_P.dtype, np.float64))
