"""Exact curvature of small models: Hessian, GGN, Fisher, F_tok and K, dense or as products.

Every function takes a Model with a Corpus, or with tokens and labels, or else a Problem: whatever
has parameters, a forward, a backward and a loss. The package stands on `model/` alone, and shares
nothing with the factors, bases and kernels that it is there to judge.

    problems    a summed loss as a function of named parameters, and the transformer as one
    variables   the parameters that `wrt` names, laid end to end
    products    gradient, H v and GGN v by complex step; H and GGN column by column
    fishers     the cotangents of FISHER, and F, F_tok and K as their sums

GGN goes forward first and Fisher backward only, so that their equality (O11) proves both.
"""

from refcurv.curvature.exact.fishers import (
    Moments,
    Sent,
    f_tok,
    fisher,
    fisher_along,
    kfac,
    moments,
    rows,
)
from refcurv.curvature.exact.problems import OutputLoss, Problem, of_outputs, problem
from refcurv.curvature.exact.products import (
    derivative,
    ggn,
    ggnvp,
    gradient,
    hessian,
    hvp,
    operator,
)

__all__ = [
    "Moments",
    "OutputLoss",
    "Problem",
    "Sent",
    "derivative",
    "f_tok",
    "fisher",
    "fisher_along",
    "ggn",
    "ggnvp",
    "gradient",
    "hessian",
    "hvp",
    "kfac",
    "moments",
    "of_outputs",
    "operator",
    "problem",
    "rows",
]
