"""Hessian, GGN and Fisher, in random directions.

Proof: tests/test_budgets.py::test_a_budget_sees_a_fault_that_a_hundred_budgets_hide
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature import exact
from refcurv.curvature.exact.problems import Batch, of_batch
from refcurv.judge.bench import Bench
from refcurv.judge.identities.measures import (
    LEAST,
    Measure,
    along,
    batch_of,
    few_terms,
    measure,
    overlaid,
    rounded,
    sizes,
)
from refcurv.judge.roundings import Runs
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import Activation, ModelConfig, NormPlace, Pool, QKNorm
from refcurv.model.layers import DEFINITIONS, Saved
from refcurv.model.transformer import Parameters

SHAPE = 1e-3
"""Budget of an identity that holds in the limit of small steps, here after one extrapolation."""


STEPS = 12
"""Times that a step is halved before it is given up to find one that is small."""


LIKE = 1e-4
"""How nearly two steps must say the same, each further above the rounding of logits than that."""


def _direction(bench: Bench, salt: int) -> dict[str, Array]:
    """A random direction, in each parameter as long as the parameter itself."""
    rng, out = bench.rng(salt), {}
    for name in bench.plan.directions:
        theta = bench.parameters[name]
        v = rng.normal(size=theta.shape)
        out[name] = v * (np.linalg.norm(theta) / max(float(np.linalg.norm(v)), 1e-300))
    return out


def _flat(named: dict[str, Array]) -> Array:
    return np.concatenate([x.ravel() for x in named.values()])


def _wrt(bench: Bench, names: Iterable[str] | None = None) -> str:
    """The pattern of some parameters, by default of those that random directions move."""
    some = list(bench.plan.directions if names is None else names)
    return "**" if len(some) == len(bench.parameters) else ",".join(some)


def _products(bench: Bench, batch: Batch, kind: str, v: dict[str, Array]) -> Runs:
    """A matrix of curvature times v, as it is and as shaken."""

    def product(parameters: Parameters) -> Array:
        made = of_batch(batch, parameters)
        return np.asarray(exact.operator(made, wrt=_wrt(bench, v), kind=kind) @ _flat(v))

    return bench.runs(product)


def _hessian_along(bench: Bench, salt: int) -> Runs:
    """H times a random direction of the first sequences; two identities ask for it."""
    if salt not in bench.hessians:
        bench.hessians[salt] = _products(bench, batch_of(bench), "hessian", _direction(bench, salt))
    return bench.hessians[salt]


def _gradients(bench: Bench, batch: Batch, wrt: str) -> Runs:
    return bench.runs(lambda p: _flat(exact.gradient(of_batch(batch, p), wrt=wrt)))


def gradient_by_complex_step(bench: Bench) -> Iterator[Measure]:
    """<∇L, v> by the backward is Im L(θ + i h v)/h by the forward."""
    if not bench.plan.directions:
        return
    batch = batch_of(bench)
    made, backward = of_batch(batch, bench.parameters), _gradients(bench, batch, _wrt(bench))
    for salt in range(3):
        v = _direction(bench, salt)
        forward = exact.derivative(made, vector=v)
        scale = partial(backward.size, part=partial(along, _flat(v)))
        yield rounded(
            forward, backward.here @ _flat(v), scale, bench.budget, f"direction {salt + 1}"
        )


def hessian_is_symmetric_and_linear(bench: Bench) -> Iterator[Measure]:
    """u·Hv = v·Hu, and H(2u − 3v) = 2Hu − 3Hv."""
    if not bench.plan.directions:
        return
    u, v = _direction(bench, 0), _direction(bench, 1)
    both = {name: 2 * u[name] - 3 * v[name] for name in u}
    H_u, H_v = (_hessian_along(bench, salt) for salt in (0, 1))
    made = of_batch(batch_of(bench), bench.parameters)
    H_both = _flat(exact.hvp(made, wrt=_wrt(bench), vector=both))
    along_u, along_v = (partial(along, _flat(x)) for x in (u, v))
    yield rounded(
        _flat(u) @ H_v.here, _flat(v) @ H_u.here,
        lambda n: [H_v.size(n, along_u), H_u.size(n, along_v)], bench.budget, "symmetry",
    )  # fmt: skip
    yield rounded(
        H_both, 2 * H_u.here - 3 * H_v.here, lambda n: [2 * H_u.size(n), 3 * H_v.size(n)],
        bench.budget, "linearity",
    )  # fmt: skip


def hessian_is_ggn_plus_residual(bench: Bench) -> Iterator[Measure]:
    """H v = GGN v + Σ r ∂²z v, three routes; v·GGN v ≥ 0."""
    if not bench.plan.directions:
        return
    batch, v = batch_of(bench), _direction(bench, 0)
    H, GGN = _hessian_along(bench, 0), _products(bench, batch, "ggn", v)
    made = of_batch(batch, bench.parameters)
    R = exact.operator(made, wrt=_wrt(bench), kind="residual") @ _flat(v)
    # H has the terms of both, and GGN those of its own route
    yield rounded(GGN.here + R, H.here, partial(sizes, [], [H, GGN]), bench.budget, "H v")
    square, terms = float(_flat(v) @ GGN.here), partial(along, _flat(v))
    yield rounded(min(0.0, square), 0, partial(GGN.size, part=terms), bench.budget, "v GGN v ≥ 0")


def ggn_is_the_expected_fisher(bench: Bench) -> Iterator[Measure]:
    """v·GGN v, forward first, is Σ_t Σ_v p (∇log p · v)², backward only."""
    if not bench.plan.enumerated:
        return
    batch = few_terms(bench)
    made = of_batch(batch, bench.parameters)
    v = {name: x for name, x in _direction(bench, 3).items() if name in made.linear}
    GGN_v, x = _products(bench, batch, "ggn", v), exact.fisher_along(made, vector=v)
    scale = partial(GGN_v.size, part=partial(along, _flat(v)))
    yield rounded(_flat(v) @ GGN_v.here, x @ x, scale, bench.budget, "v F v")


def last_block_has_no_cross_terms(bench: Bench) -> Iterator[Measure]:
    """In the last block F = F_tok for q, o, gate, up, down.

    Along random matrices X: Σ_c (Σ_s g_s X a_s)² = Σ_c Σ_s (g_s X a_s)².
    """
    if not bench.plan.enumerated or bench.config.pool is Pool.MEAN:
        return
    batch = few_terms(bench)
    made = of_batch(batch, bench.parameters)
    at = f"blocks.{bench.config.layers - 1}."
    for layer in ("attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        name = f"{at}{layer}.weight"
        if name not in made.linear:
            continue
        X = bench.rng(4).normal(size=made.parameters[name].shape)
        F, F_tok = 0.0, 0.0
        for a_TI, g_CTO in exact.rows(made, wrt=name):
            along = np.einsum("cto,to->ct", g_CTO, a_TI @ X.T)
            F += float((along.sum(axis=1) ** 2).sum())
            F_tok += float((along**2).sum())
        # every cotangent is of one position, so that the sums have one term that is not 0
        cotangents = bench.plan.enumerated * bench.config.vocabulary
        budget = tolerance.gamma(4 * (batch.label_BT.shape[1] + cotangents), np.float64)
        yield measure(F, F_tok, F_tok, budget, name)


def scale_invariance(bench: Bench) -> Iterator[Measure]:
    """Scale-free W at eps = 0: <W, ∇W> = 0, GGN·W = 0, H·W = −∇W.

    At once for all of a block: with any c, GGN Σ c_n W_n = 0, H Σ c_n W_n = −(c_n ∇W_n)_n.
    """
    batch, at = batch_of(bench, eps=0.0), f"blocks.{bench.config.layers - 1}."
    names = [f"{at}{layer}.weight" for layer in scale_free(bench.config)]
    W = {name: bench.parameters[name] for name in bench.plan.directions if name in names}
    if not W or _reads_zeros(bench, batch):
        return
    c = dict(zip(W, bench.rng(5).choice([-1.0, 1.0], len(W)), strict=True))
    d = _gradients(bench, batch, ",".join(W))
    v = {name: c[name] * x for name, x in W.items()}
    GGN_v, H_v = (_products(bench, batch, kind, v) for kind in ("ggn", "hessian"))
    end = 0
    for name, x in W.items():
        begin, end = end, end + x.size
        one = partial(_part, begin, end)
        along = partial(_along_part, begin, end, x.ravel())
        slope = (x.ravel() * one(d.here)).sum()
        yield rounded(slope, 0, partial(d.size, part=along), bench.budget, f"<W, ∇W> of {name}")
        size = partial(GGN_v.size, part=one)
        yield rounded(one(GGN_v.here), 0, size, bench.budget, f"GGN·W of {name}")
        scale = partial(sizes, [], [d, H_v], part=one)
        yield rounded(one(H_v.here), -c[name] * one(d.here), scale, bench.budget, f"H·W of {name}")


def _part(begin: int, end: int, x: Array) -> Array:
    return x[begin:end]


def _along_part(begin: int, end: int, v: Array, x: Array) -> Array:
    return along(v, x[begin:end])


def _reads_zeros(bench: Bench, batch: Batch) -> bool:
    """Does any norm read a row of zeros, which none without eps can scale?"""
    seen = []

    def norm_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
        seen.append(bool(((x * x).mean(axis=-1) == 0).any()))
        return DEFINITIONS.rms_norm_forward(x, gain, max(eps, LEAST))

    ops = replace(DEFINITIONS, rms_norm_forward=norm_forward)
    real = np.ones(batch.segment_BT.shape, bool)
    layout = transformer.layout_of(batch.config, real, batch.segment_BT)
    transformer.forward(batch.config, bench.parameters, batch.inputs, layout, ops)
    return any(seen)


def scale_free(config: ModelConfig) -> list[str]:
    """Layers of a block whose outputs a norm will scale back: nothing but products in between."""
    free = []
    if config.qk_norm is not QKNorm.NONE and config.qkv_clip is None:
        free += [name for name in ("q", "k") if not config.has_bias(name)]
    if config.norm_place is not NormPlace.PRE:
        if not config.has_bias("o"):
            free += ["o"] + ["v"] * (config.qkv_clip is None and not config.has_bias("v"))
        if not config.has_bias("down"):
            free += ["down"] + ["up"] * (config.gated and not config.has_bias("up"))
    return [f"attn.{name}" if name in "qkvo" else f"mlp.{name}" for name in free]


def kl_is_the_quadratic_form(bench: Bench) -> Iterator[Measure]:
    """KL(p_θ ‖ p_{θ+d}) is ½ d·F d for small d.

    (KL(+t) + KL(−t)) / 2t² at two steps, extrapolated, is good to t⁴. A step is small where half
    of it says the same; the first that is small is taken.
    """
    kinked = bench.config.activation is Activation.RELU or bench.config.qkv_clip is not None
    if not bench.plan.directions or kinked:  # a step, however small, may cross a kink
        return
    batch, d = batch_of(bench, sequences=1), _direction(bench, 6)
    made = of_batch(batch, bench.parameters)
    quadratic = float(_flat(d) @ _flat(exact.ggnvp(made, wrt=_wrt(bench), vector=d))) / 2
    if quadratic <= 0:
        return
    z, _ = made.forward(made.parameters)

    def kl(step: float) -> float:
        moved = {name: made.parameters[name] + step * d[name] for name in d}
        change = made.forward(overlaid(moved, made.parameters))[0] - z
        seen = norm(change) > tolerance.eps(np.float64) * norm(z) / LIKE
        return _kl(z, change) if seen else math.nan

    def curved(step: float) -> float:
        return (kl(step) + kl(-step)) / (2 * step * step)

    # about a millionth of a nat, and of every parameter a thousandth at most
    t = min(1e-3 / math.sqrt(quadratic), 1e-3)
    found = [curved(t), curved(t / 2)]
    for _ in range(STEPS):
        t /= 2
        found.append(curved(t / 2))
        wide, narrow = ((4 * b - a) / 3 for a, b in pairwise(found[-3:]))
        if abs(wide - narrow) <= LIKE * abs(narrow):
            yield measure(narrow, quadratic, quadratic, SHAPE, "½ d F d")
            return


def _kl(z: Array, step: Array) -> float:
    """KL of softmax(z) and softmax(z + step), summed over rows, from the step alone."""
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    x = step - (p * step).sum(axis=1, keepdims=True)
    # log Σ p eˣ with Σ p x = 0; eˣ − 1 − x is x²/2 to three terms where it cancels
    small = np.abs(x) < 1e-3
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    over = np.where(small, series, np.expm1(x) - x)
    return float(np.log1p((p * over).sum(axis=1)).sum())
