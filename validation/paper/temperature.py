"""Perplexity when one number, the temperature, may be set again after an edit.

An edit may leave what a model knows as it is and make it too sure of it, or not sure enough; then
its perplexity rises, and dividing all logits by one number takes the rise back. Greedy answers do
not depend on that number. It is chosen on one text and judged on another.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar

import refcurv as rc

Array = np.ndarray

COLDEST, HOTTEST = 0.25, 4.0


def refit(model: rc.Model, fit_on: rc.Population, judged: rc.Population) -> tuple[float, float]:
    """(T, perplexity of `judged` at logits / T), T the one of least perplexity on `fit_on`.

    The nats are convex in 1/T, so that there is one minimum; it is looked for in
    [COLDEST, HOTTEST].

    Cost: one forward pass over both, whose logits are held at one time; about 15 log-softmaxes.
    Proof: tests/validation/test_paper.py::test_a_temperature_is_found_again
    """
    logit_NV, label_N = scored(model, fit_on)

    def excess(log_beta: float) -> float:
        return mean_nats(logit_NV, label_N, math.exp(log_beta))

    ends = -math.log(HOTTEST), -math.log(COLDEST)
    beta = math.exp(minimize_scalar(excess, bounds=ends, method="bounded").x)
    return 1 / beta, math.exp(mean_nats(*scored(model, judged), beta))


def scored(model: rc.Model, text: rc.Population) -> tuple[Array, Array]:
    """The logits (N, V), float64, at which a token behind its prompt is scored, and the tokens."""
    place = np.arange(text.tokens.shape[1] - 1)
    asked = (text.prompt_length[:, None] - 1 <= place) & (place < text.length[:, None] - 1)
    logit_BTV = rc.logits(model, text.tokens)[:, :-1]
    return logit_BTV[asked].astype(np.float64), text.tokens[:, 1:][asked]


def mean_nats(logit_NV: Array, label_N: Array, beta: float) -> float:
    """Mean of −log softmax(β z)[label]."""
    z_NV = beta * (logit_NV - logit_NV.max(axis=1, keepdims=True))
    said = np.take_along_axis(z_NV, label_N[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(z_NV).sum(axis=1)) - said).mean())
