"""The identities that hold on any model, as checks: each measures its error and derives its budget.

The ids are those of the oracles (O) and of the method's statements (P). An error is relative to
the size of the terms that the identity sums, never to a result that may vanish: the magnitudes of
the products where both sides are made of what was written down, and where two passes are compared
what roundings anywhere in a pass can do (`judge.roundings`). A check yields one `Measure` for each
place where it looked, or none where its subject does not occur in the model.

Proof: tests/test_budgets.py::test_a_budget_sees_a_fault_that_a_hundred_budgets_hide
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature import exact
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.exact.problems import Batch, of_batch
from refcurv.curvature.exact.products import STEP
from refcurv.curvature.factors import Factors
from refcurv.editing.projection import project
from refcurv.judge.bench import Bench, flow
from refcurv.judge.roundings import RUNS, Runs
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL
from refcurv.model import transformer
from refcurv.model.config import Activation, ModelConfig, NormPlace, Pool, QKNorm
from refcurv.model.layers import ACTIVATIONS, DEFINITIONS, Saved, rope_frequencies, windowed
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.fast import FAST
from refcurv.passes.forward import nats

RHO = 0.8
"""The share of mass at which an edit is checked."""

NORMAL = float(np.finfo(np.float64).tiny)
"""The smallest number with all its digits: what is sharpest lies above it, or nothing is cut."""

LEAST = NORMAL / float(np.finfo(np.float64).eps)
"""Below it squares and products lose digits to underflow, in part or altogether."""

LIKE = 1e-4
"""How nearly two steps must say the same, each further above the rounding of logits than that."""

STEPS = 12
"""Times that a step is halved before it is given up to find one that is small."""

SHAPE = 1e-3
"""Budget of an identity that holds in the limit of small steps, here after one extrapolation."""


@dataclass(frozen=True, slots=True)
class Measure:
    """error, relative; budget, what rounding explains; where."""

    error: float
    budget: float
    where: str = ""


Check = Callable[[Bench], Iterator[Measure]]


def _measure(
    got: ArrayLike, want: ArrayLike, scale: ArrayLike, budget: float, where: str = ""
) -> Measure:
    """|got − want| / |scale| in Frobenius norm; infinite between shapes.

    What underflows loses digits that no scale knows of, so a scale is at least LEAST.
    """
    if np.shape(want) not in ((), np.shape(got)):
        return Measure(math.inf, budget, f"{where}: {np.shape(got)} for {np.shape(want)}")
    error = float(norm(np.abs(np.asarray(got) - np.asarray(want))))
    return Measure(error / max(float(norm(np.asarray(scale))), LEAST), budget, where)


def _rounded(
    got: ArrayLike,
    want: ArrayLike,
    scale: Callable[[int], ArrayLike],
    budget: float,
    where: str,
) -> Measure:
    """`_measure` of what whole passes made; scale(n) are its terms by n shaken runs.

    One run will do, but where the error is beyond budget: it may have moved too little by chance.
    """
    one = _measure(got, want, scale(1), budget, where)
    if one.error <= budget:
        return one
    return _measure(got, want, scale(RUNS), budget, where)


def _sizes(
    others: list[float],
    terms: list[Runs],
    runs: int,
    part: Callable[[Array], Array] = np.asarray,
) -> list[float]:
    """|terms| of several results, by so many runs, beside others."""
    return [*others, *(x.size(runs, part) for x in terms)]


def _exactly(same: bool, where: str = "") -> Measure:
    """Equality in every bit: error 0, or infinite."""
    return Measure(0.0 if same else math.inf, 0.0, where)


def _over(changed: Mapping[str, Array], parameters: Parameters) -> Parameters:
    """The parameters with some replaced; the others stay as lazy as they are."""
    return ChainMap(dict(changed), parameters)  # type: ignore[arg-type]


def _blocks(config: ModelConfig) -> Iterator[tuple[int, str]]:
    return ((i, f"blocks.{i}.") for i in range(config.layers))


# ------------------------------------------------------------------ what flows


def fast_is_the_definition(bench: Bench) -> Iterator[Measure]:
    """Kernels give each weight the gradient Σ_s g_s a_sᵀ."""
    fast, _ = flow(bench.config, bench.parameters, bench.batch, bench.layout, FAST)
    for name in bench.taps:
        if name != "head":
            runs = bench.runs_of_taps(partial(_slope, name))
            yield _rounded(_slope(name, fast), runs.here, runs.size, bench.budget, f"{name}.weight")


def _slope(layer: str, taps: Mapping[str, Tap]) -> Array:
    return _outer(taps[layer].g, taps[layer].a)


def _outer(g: Array, a: Array) -> Array:
    return np.asarray(g.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1]))


def weight_slopes(bench: Bench) -> Iterator[Measure]:
    """Σ_s <g_s, W a_s> = <W, ∇W>, the gradient of W by the definitions."""
    made = of_batch(_batch(bench, len(bench.real)), bench.parameters)
    weights = {bench.config.weight_of(name): name for name in bench.taps}
    names = [w for w in weights if w in bench.plan.directions and w in made.linear]
    if not names:
        return
    gradient = exact.gradient(made, wrt=",".join(names))
    for weight in names:
        W, tap = bench.parameters[weight], bench.taps[weights[weight]]
        through = float((tap.g * (tap.a @ W.T)).sum())
        squares = float(((tap.g * tap.g) * ((tap.a * tap.a) @ (W * W).T)).sum())
        runs = bench.runs_of_taps(partial(_slope_along, weights[weight], W))
        scale = partial(_sizes, [math.sqrt(squares)], [runs])
        yield _rounded((W * gradient[weight]).sum(), through, scale, bench.budget, weight)


def _slope_along(layer: str, W: Array, taps: Mapping[str, Tap]) -> Array:
    """The terms of <W, ∇W> by entries of W, and by outputs."""
    tap = taps[layer]
    return np.append(_along(W, _slope(layer, taps)), tap.g * (tap.a @ W.T))


def _along(v: Array, x: Array) -> Array:
    """The terms of <v, x>, and their sum: roundings of one entry, and of many at once."""
    terms = np.ravel(v * x)
    return np.append(terms, terms.sum())


def last_layer_in_closed_form(bench: Bench) -> Iterator[Measure]:
    """The head's F along random X is Σ_t Var_p(X h_t)."""
    head = bench.config.weight_of("head")
    if not bench.plan.enumerated or bench.config.tied:
        return
    batch = _few_terms(bench)
    made = of_batch(batch, bench.parameters)
    X = bench.rng(7).normal(size=made.parameters[head].shape)
    z, (final, _, output) = made.forward(made.parameters)
    h = final[batch.label_BT >= 0]
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    y, terms = (
        transformer.uncapped(bench.config, output, x) for x in (h @ X.T, np.abs(h) @ np.abs(X).T)
    )
    # the variance about the likeliest entry, of which p may leave nothing to the others
    top = np.arange(len(z)), z.argmax(axis=1)
    off, size = y - y[top][:, None], terms + terms[top][:, None]
    mean = (p * off).sum(axis=1, keepdims=True)
    variance = (p * (off - mean) ** 2).sum()
    x = exact.fisher_along(made, vector={head: X})
    rest = p.copy()
    rest[top] = 0
    scale = (rest * size * size).sum() + (p[top] * (rest * size).sum(axis=1) ** 2).sum()
    budget = tolerance.gamma(8 * sum(X.shape), np.float64)
    yield _measure(x @ x, variance, scale, budget, head)


def head_slopes_sum_to_zero(bench: Bench) -> Iterator[Measure]:
    """Output gradients of the head sum to zero over the vocabulary."""
    if bench.config.logit_cap is not None:  # it is the capped logits' that do
        return
    g = bench.taps["head"].g[bench.batch.label_BT >= 0]
    budget = tolerance.gamma(4 * g.shape[-1], np.float64)
    yield _measure(g.sum(axis=-1), 0, np.abs(g).sum(axis=-1), budget, "head")


def head_slopes_by_label(bench: Bench) -> Iterator[Measure]:
    """‖g‖² of the head is (1 − p_y)² + Σ_{v≠y} p_v² at every label."""
    if bench.config.logit_cap is not None:
        return
    b, t = np.nonzero(bench.batch.label_BT >= 0)
    n, own = np.arange(len(b)), bench.batch.label_BT[b, t]
    z = bench.logits[b, t]
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    p[n, own] = 0
    p[n, own] = p.sum(axis=-1)  # 1 − p_y
    square = (bench.taps["head"].g[b, t] ** 2).sum(axis=-1)
    want = (p * p).sum(axis=-1)
    # a logit is rounded at the size of its terms, and so p by as much of itself
    W, h = bench.parameters[bench.config.weight_of("head")], bench.final[b, t]
    terms = (np.abs(h) @ np.abs(W).T).max(axis=-1) + np.abs(z).max(axis=-1)
    budget = tolerance.gamma(8 * sum(W.shape), np.float64)
    yield _measure(square, want, want * (1 + terms), budget)


def unreached_positions(bench: Bench) -> Iterator[Measure]:
    """A position that reaches no label has no gradient: exactly 0."""
    reached = _reached(bench)
    if reached.all():
        return
    for name, tap in bench.taps.items():
        if tap.g.shape[:2] == reached.shape:  # neither a pooled head nor patches
            yield _exactly(not tap.g[~reached].any(), name)


def _reached(bench: Bench) -> Array:
    """ROWS, by loops of its own: positions from which a label of their segment is reached."""
    label, segment = bench.batch.label_BT, bench.batch.segment_BT
    if bench.config.image is not None:
        return np.repeat(label >= 0, segment.shape[1], axis=1)
    out = label >= 0
    for t in range(out.shape[1] - 2, -1, -1):
        out[:, t] |= out[:, t + 1] & (segment[:, t] == segment[:, t + 1])
    for t in range(1, out.shape[1] if not bench.config.causal else 0):
        out[:, t] |= out[:, t - 1] & (segment[:, t] == segment[:, t - 1])
    return np.asarray(out & bench.real)


def first_queries(bench: Bench) -> Iterator[Measure]:
    """A query that sees one key has no gradient: exactly 0."""
    for i, at in _blocks(bench.config):
        layout, window = bench.layout, bench.config.window(i)
        if window:
            layout = windowed(layout, window)
        alone = layout.first_BT == layout.last_BT
        if alone.any():
            yield _exactly(not bench.taps[f"{at}attn.q"].g[alone].any(), f"{at}attn.q")


def rotated_key_slopes(bench: Bench) -> Iterator[Measure]:
    """Rotated key gradients sum to 0 over a segment: Σ_s R_s g_s = 0.

    The rotation is made here anew: pairs (j, j + R/2) as complex numbers, θ^(-2j/R) a turn. Without
    rotary positions and norms of keys it is the layer's own gradients that sum to 0.
    """
    config = bench.config
    if config.score_cap is not None:  # scores are not shift invariant then
        return
    if config.rope_theta is None:
        for i, at in _blocks(config):
            if config.qk_norm is QKNorm.NONE and config.qkv_clip is None:
                yield _sums_to_zero(bench, i, bench.taps[f"{at}attn.k"].g)
        return
    R = config.rope_width or config.head_width
    if config.rope_scaling is None:
        turn = config.rope_theta ** (-np.arange(0, R, 2) / R)
    else:
        turn = rope_frequencies(R, config.rope_theta, config.rope_scaling, np.dtype(np.float64))
    angle = bench.layout.position_BT[:, :, None, None] * turn
    for i, (_, d_k) in bench.key_slopes.items():
        z = (d_k[..., : R // 2] + 1j * d_k[..., R // 2 : R]) * np.exp(1j * angle)
        yield _sums_to_zero(bench, i, np.concatenate([z, d_k[..., R:]], axis=-1))


def _sums_to_zero(bench: Bench, i: int, x_BT: Array) -> Measure:
    """Σ x over each segment is 0, beside the magnitudes of all that x sums."""
    config, segment_BT = bench.config, bench.layout.first_BT
    B, T = segment_BT.shape
    terms_BT, x_BT = (x.reshape(B, T, -1) for x in (bench.key_terms[i], x_BT))
    if config.rope_scaling is not None:
        terms_BT = terms_BT * max(1.0, config.rope_scaling.attention)
    sums, sizes = [], []
    for b in range(B):
        for one in np.unique(segment_BT[b]):
            sums.append(x_BT[b, segment_BT[b] == one].sum(axis=0))
            sizes.append(terms_BT[b, segment_BT[b] == one].sum(axis=0))
    # a sum over keys of sums over queries and heads; and angles of T radians
    summed = T * (2 + config.heads // config.kv_heads) + 2 * config.head_width + T
    budget = tolerance.gamma(4 * summed, np.float64)
    return _measure(np.array(sums), 0, np.array(sizes), budget, f"blocks.{i}.attn.k")


def grouped_queries(bench: Bench) -> Iterator[Measure]:
    """A key-value head has the summed gradient of its group's copies.

    Every query head gets a copy of its own; head h reads head h div R.
    """
    config = bench.config
    R, K, E = config.heads // config.kv_heads, config.kv_heads, config.head_width
    if R == 1 or not bench.plan.resident:
        return
    copied = {}
    layers = ("k", "v", "k_norm") if config.qk_norm is QKNorm.FULL else ("k", "v")
    for name in config.parameter_shapes():
        if name.startswith("blocks.") and name.split(".")[3] in layers:
            W = bench.parameters[name]
            by_head = np.repeat(W.reshape(K, E, *W.shape[1:]), R, axis=0)
            copied[name] = by_head.reshape(-1, *W.shape[1:])
    wide = replace(config, kv_heads=config.heads)
    parameters = _over(copied, bench.parameters)
    found, _ = flow(wide, parameters, bench.batch, bench.layout)
    for name in (f"blocks.{config.layers - 1}.attn.{x}" for x in ("k", "v")):
        g = bench.taps[name].g
        copies = found[name].g.reshape(*g.shape[:2], K, R, E)
        # each copy normalises by the same root, so a full-width norm's slope is shared too
        runs = bench.runs_of_taps(partial(_output_slope, name))
        scale = partial(_sizes, [norm(copies)], [runs])
        yield _rounded(copies.sum(axis=3).reshape(g.shape), g, scale, bench.budget, name)


def _output_slope(layer: str, taps: Mapping[str, Tap]) -> Array:
    return taps[layer].g


def norm_defect(bench: Bench) -> Iterator[Measure]:
    """Below each norm g_x·x = (g_ŷ·ŷ) eps/(ms + eps): eps inside."""
    eps = bench.config.norm_eps
    for n, call in enumerate(bench.norms):
        ms = (call.x * call.x).mean(axis=1)
        x_hat = call.x / np.sqrt(ms + eps)[:, None]
        want = (call.d_y * call.gain * x_hat).sum(axis=1) * eps / (ms + eps)
        got = (call.d_x * call.x).sum(axis=1)
        # the terms that cancel in d_x: r d_ŷ and r x̂ mean(d_ŷ x̂)
        d_hat = np.abs(call.d_y * call.gain)
        terms = (d_hat * np.abs(x_hat)).sum(axis=1) * (1 + (x_hat * x_hat).mean(axis=1))
        budget = tolerance.gamma(8 * call.x.shape[1], np.float64)
        yield _measure(
            got, want, terms, budget, f"norm {n + 1} of {len(bench.norms)}, from the top"
        )


def gated_slopes(bench: Bench) -> Iterator[Measure]:
    """MLP: g_up z_up = g_h h, g_gate = g_h z_up f'; ungated g_up = g_h f'.

    f' is the complex step of f, Im f(z + i h)/h.
    """
    budget = tolerance.gamma(4 * max(bench.config.width, bench.config.mlp_width), np.float64)
    f = ACTIVATIONS[bench.config.activation]
    for _, at in _blocks(bench.config):
        (up, z_up, size_up), down = _outputs(bench, f"{at}mlp.up"), bench.taps[f"{at}mlp.down"]
        W_down = bench.parameters[f"{at}mlp.down.weight"]
        g_h, size_h = down.g @ W_down, np.abs(down.g) @ np.abs(W_down)
        if not bench.config.gated:
            slope = f(z_up + 1j * STEP)[0].imag / STEP
            yield _measure(up.g, g_h * slope, size_h * (size_up + 1), budget, f"{at}mlp.up")
            continue
        gate, z_gate, size_gate = _outputs(bench, f"{at}mlp.gate")
        scale = size_h * np.abs(down.a) + np.abs(up.g) * size_up
        yield _measure(up.g * z_up, g_h * down.a, scale, budget, f"{at}mlp.up")
        slope = f(z_gate + 1j * STEP)[0].imag / STEP
        scale = size_h * size_up * (size_gate + 1)
        yield _measure(gate.g, g_h * z_up * slope, scale, budget, f"{at}mlp.gate")


def _outputs(bench: Bench, layer: str) -> tuple[Tap, Array, Array]:
    """A layer's Tap, its outputs y = W a + b, and the sizes of the terms that they sum."""
    tap, W = bench.taps[layer], bench.parameters[f"{layer}.weight"]
    y, size = tap.a @ W.T, np.abs(tap.a) @ np.abs(W).T
    if bench.config.has_bias(layer):
        b = bench.parameters[f"{layer}.bias"]
        y, size = y + b, size + np.abs(b)
    return tap, y, size


def shared_inputs(bench: Bench) -> Iterator[Measure]:
    """gate and up read the same input, and q, k, v: bit for bit."""
    for _, at in _blocks(bench.config):
        for one, other in (("mlp.gate", "mlp.up"), ("attn.q", "attn.k"), ("attn.q", "attn.v")):
            if at + one not in bench.taps:
                continue
            a, b = bench.taps[at + one].a, bench.taps[at + other].a
            yield _exactly(a.tobytes() == b.tobytes(), f"{at}{one}, {other}")


def causality(bench: Bench) -> Iterator[Measure]:
    """Another last token changes no earlier position, bit for bit."""
    if not bench.config.causal or bench.real.shape[1] < 2:
        return
    token = bench.batch.inputs.copy()
    token[:, -1] = (token[:, -1] + 1) % bench.config.vocabulary
    final = _final(bench, token, bench.real, bench.batch.segment_BT)
    yield _exactly(bool((final[:, :-1] == bench.final[:, :-1]).all()), "what the head reads")


def padding(bench: Bench) -> Iterator[Measure]:
    """Padding at the right changes no real position."""
    if bench.config.image is not None:
        return
    token = np.pad(bench.batch.inputs, ((0, 0), (0, 3)))
    real = np.pad(bench.real, ((0, 0), (0, 3)))
    segment = np.pad(bench.batch.segment_BT, ((0, 0), (0, 3)), mode="edge")
    got, want = _final(bench, token, real, segment)[:, :-3], bench.final
    runs = bench.runs_of_taps(lambda taps: taps["head"].a[bench.real])
    yield _rounded(
        got[bench.real], want[bench.real], runs.size, bench.budget, "what the head reads"
    )


def packing(bench: Bench) -> Iterator[Measure]:
    """Documents packed as segments are what they are alone."""
    if (
        bench.config.image is not None
        or len(bench.real) < 2
        or bench.batch.segment_BT[:2].any()
        or not bench.real[:2].all()
    ):
        return
    token = bench.batch.inputs[:2].reshape(1, -1)
    segment = np.repeat([[0, 1]], bench.real.shape[1], axis=1)
    got = _final(bench, token, np.ones(token.shape, bool), segment)
    runs = bench.runs_of_taps(lambda taps: taps["head"].a[:2])
    want = bench.final[:2].reshape(got.shape)
    yield _rounded(got, want, runs.size, bench.budget, "what the head reads")


def _final(bench: Bench, token: Array, real: Array, segment: Array) -> Array:
    """What the head reads of other tokens or another layout."""
    lowest = bench.config.layers
    layout = transformer.layout_of(bench.config, real, segment)
    return transformer.forward(bench.config, bench.parameters, token, layout, lowest=lowest)[0]


# ------------------------------------------------------------------ curvature, in random directions


def _batch(bench: Bench, sequences: int = 2, eps: float | None = None) -> Batch:
    """The first sequences."""
    b, config = bench.batch, bench.config
    if eps is not None:
        config = replace(config, norm_eps=eps)
    return Batch(config, *(x[:sequences] for x in (b.inputs, b.label_BT, b.segment_BT, b.index_B)))


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
        bench.hessians[salt] = _products(bench, _batch(bench), "hessian", _direction(bench, salt))
    return bench.hessians[salt]


def _gradients(bench: Bench, batch: Batch, wrt: str) -> Runs:
    return bench.runs(lambda p: _flat(exact.gradient(of_batch(batch, p), wrt=wrt)))


def gradient_by_complex_step(bench: Bench) -> Iterator[Measure]:
    """<∇L, v> by the backward is Im L(θ + i h v)/h by the forward."""
    if not bench.plan.directions:
        return
    batch = _batch(bench)
    made, backward = of_batch(batch, bench.parameters), _gradients(bench, batch, _wrt(bench))
    for salt in range(3):
        v = _direction(bench, salt)
        forward = exact.derivative(made, vector=v)
        scale = partial(backward.size, part=partial(_along, _flat(v)))
        yield _rounded(
            forward, backward.here @ _flat(v), scale, bench.budget, f"direction {salt + 1}"
        )


def hessian_is_symmetric_and_linear(bench: Bench) -> Iterator[Measure]:
    """u·Hv = v·Hu, and H(2u − 3v) = 2Hu − 3Hv."""
    if not bench.plan.directions:
        return
    u, v = _direction(bench, 0), _direction(bench, 1)
    both = {name: 2 * u[name] - 3 * v[name] for name in u}
    H_u, H_v = (_hessian_along(bench, salt) for salt in (0, 1))
    made = of_batch(_batch(bench), bench.parameters)
    H_both = _flat(exact.hvp(made, wrt=_wrt(bench), vector=both))
    along_u, along_v = (partial(_along, _flat(x)) for x in (u, v))
    yield _rounded(
        _flat(u) @ H_v.here, _flat(v) @ H_u.here,
        lambda n: [H_v.size(n, along_u), H_u.size(n, along_v)], bench.budget, "symmetry",
    )  # fmt: skip
    yield _rounded(
        H_both, 2 * H_u.here - 3 * H_v.here, lambda n: [2 * H_u.size(n), 3 * H_v.size(n)],
        bench.budget, "linearity",
    )  # fmt: skip


def hessian_is_ggn_plus_residual(bench: Bench) -> Iterator[Measure]:
    """H v = GGN v + Σ r ∂²z v, three routes; v·GGN v ≥ 0."""
    if not bench.plan.directions:
        return
    batch, v = _batch(bench), _direction(bench, 0)
    H, GGN = _hessian_along(bench, 0), _products(bench, batch, "ggn", v)
    made = of_batch(batch, bench.parameters)
    R = exact.operator(made, wrt=_wrt(bench), kind="residual") @ _flat(v)
    # H has the terms of both, and GGN those of its own route
    yield _rounded(GGN.here + R, H.here, partial(_sizes, [], [H, GGN]), bench.budget, "H v")
    square, along = float(_flat(v) @ GGN.here), partial(_along, _flat(v))
    yield _rounded(min(0.0, square), 0, partial(GGN.size, part=along), bench.budget, "v GGN v ≥ 0")


def ggn_is_the_expected_fisher(bench: Bench) -> Iterator[Measure]:
    """v·GGN v, forward first, is Σ_t Σ_v p (∇log p · v)², backward only."""
    if not bench.plan.enumerated:
        return
    batch = _few_terms(bench)
    made = of_batch(batch, bench.parameters)
    v = {name: x for name, x in _direction(bench, 3).items() if name in made.linear}
    GGN_v, x = _products(bench, batch, "ggn", v), exact.fisher_along(made, vector=v)
    scale = partial(GGN_v.size, part=partial(_along, _flat(v)))
    yield _rounded(_flat(v) @ GGN_v.here, x @ x, scale, bench.budget, "v F v")


def _few_terms(bench: Bench) -> Batch:
    """One short sequence with as many loss positions as the plan enumerates, or one image."""
    b, n = bench.batch, bench.plan.enumerated
    if bench.config.image is not None:
        return Batch(bench.config, b.inputs[:1], b.label_BT[:1], b.segment_BT[:1], b.index_B[:1])
    covering = np.flatnonzero(b.label_BT[0] >= 0)[:n][-1] + 1
    width = min(max(2 * n + 1, covering), b.inputs.shape[1])
    label = b.label_BT[:1, :width].copy()
    label[:, : np.flatnonzero(label[0] >= 0)[-n:][0]] = NO_LABEL
    part = (b.inputs[:1, :width], label, b.segment_BT[:1, :width], b.index_B[:1])
    return Batch(bench.config, *part)


def last_block_has_no_cross_terms(bench: Bench) -> Iterator[Measure]:
    """In the last block F = F_tok for q, o, gate, up, down.

    Along random matrices X: Σ_c (Σ_s g_s X a_s)² = Σ_c Σ_s (g_s X a_s)².
    """
    if not bench.plan.enumerated or bench.config.pool is Pool.MEAN:
        return
    batch = _few_terms(bench)
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
        yield _measure(F, F_tok, F_tok, budget, name)


def scale_invariance(bench: Bench) -> Iterator[Measure]:
    """Scale-free W at eps = 0: <W, ∇W> = 0, GGN·W = 0, H·W = −∇W.

    At once for all of a block: with any c, GGN Σ c_n W_n = 0, H Σ c_n W_n = −(c_n ∇W_n)_n.
    """
    batch, at = _batch(bench, eps=0.0), f"blocks.{bench.config.layers - 1}."
    names = [f"{at}{layer}.weight" for layer in _scale_free(bench.config)]
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
        yield _rounded(slope, 0, partial(d.size, part=along), bench.budget, f"<W, ∇W> of {name}")
        size = partial(GGN_v.size, part=one)
        yield _rounded(one(GGN_v.here), 0, size, bench.budget, f"GGN·W of {name}")
        scale = partial(_sizes, [], [d, H_v], part=one)
        yield _rounded(one(H_v.here), -c[name] * one(d.here), scale, bench.budget, f"H·W of {name}")


def _part(begin: int, end: int, x: Array) -> Array:
    return x[begin:end]


def _along_part(begin: int, end: int, v: Array, x: Array) -> Array:
    return _along(v, x[begin:end])


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


def _scale_free(config: ModelConfig) -> list[str]:
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
    batch, d = _batch(bench, sequences=1), _direction(bench, 6)
    made = of_batch(batch, bench.parameters)
    quadratic = float(_flat(d) @ _flat(exact.ggnvp(made, wrt=_wrt(bench), vector=d))) / 2
    if quadratic <= 0:
        return
    z, _ = made.forward(made.parameters)

    def kl(step: float) -> float:
        moved = {name: made.parameters[name] + step * d[name] for name in d}
        change = made.forward(_over(moved, made.parameters))[0] - z
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
            yield _measure(narrow, quadratic, quadratic, SHAPE, "½ d F d")
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


# ------------------------------------------------------------------ factors, bases, edits


def factors_are_the_sums(bench: Bench) -> Iterator[Measure]:
    """A, G are sums over rows; tr K − tr F_tok = −n Cov(‖a‖², ‖g‖²)."""
    factors = bench.empirical
    if factors is None:
        return
    reached = _reached(bench)
    for name, factor in factors.items():
        tap = bench.taps[name]
        a, g = tap.a[reached], tap.g[reached]
        yield _exactly(factor.n_A == factor.n_G == len(a), f"rows of {name}")
        A, G = (bench.runs_of_taps(partial(_gram, name, x, reached)) for x in "ag")
        yield _rounded(factor.sum_A, A.here, A.size, bench.budget, f"A of {name}")
        yield _rounded(factor.sum_G, G.here, G.size, bench.budget, f"G of {name}")
        traces = np.trace(factor.A) * np.trace(factor.G) * factor.n_A
        square_a, square_g = (a * a).sum(axis=1), (g * g).sum(axis=1)
        covariance = ((square_a - square_a.mean()) * (square_g - square_g.mean())).sum()
        want = (square_a * square_g).sum() - covariance
        off_a, off_g = (bench.runs_of_taps(partial(_squares, name, x, reached)) for x in "ag")
        scale = partial(_trace_terms, off_a, off_g)
        yield _rounded(traces, want, scale, bench.budget, f"tr K of {name}")


def _gram(layer: str, side: str, rows: Array, taps: Mapping[str, Tap]) -> Array:
    x = getattr(taps[layer], side)[rows]
    return np.asarray(x.T @ x)


def _trace_terms(square_a: Runs, square_g: Runs, runs: int) -> list[float]:
    """Of Σ ‖a‖² Σ ‖g‖², and of as much that is taken from it."""
    a, g = square_a.here.sum(), square_g.here.sum()
    return [2 * a * square_g.size(runs), 2 * g * square_a.size(runs)]


def _squares(layer: str, side: str, rows: Array, taps: Mapping[str, Tap]) -> Array:
    x = getattr(taps[layer], side)[rows]
    return np.asarray((x * x).sum(axis=1))


def factors_add(bench: Bench) -> Iterator[Measure]:
    """Sums of factors add over disjoint data, and only grow."""
    half, whole, reached = len(bench.real) // 2, bench.empirical, _reached(bench)
    if not half or whole is None:
        return
    one, two = (bench.collect("empirical", p) for p in (slice(half), slice(half, None)))
    if one is None or two is None:
        return
    for name, factor in whole.items():
        A, G = (bench.runs_of_taps(partial(_gram, name, x, reached)) for x in "ag")
        for side, runs in (("sum_A", A), ("sum_G", G)):
            got = getattr(one[name], side) + getattr(two[name], side)
            yield _rounded(got, getattr(factor, side), runs.size, bench.budget, f"{side} of {name}")
        grown = np.linalg.eigvalsh(factor.sum_A - one[name].sum_A)[0]
        budget = bench.budget + tolerance.eigenpair(len(factor.sum_A))
        yield _rounded(min(0.0, float(grown)), 0, A.size, budget, f"growth of A of {name}")


def factors_are_second_moments(bench: Bench) -> Iterator[Measure]:
    """A and G are symmetric, ≥ 0, of rank at most the rows."""
    factors = bench.sampled
    if factors is None:
        return
    for name, factor in factors.items():
        for side, M in (("A", factor.A), ("G", factor.G)):
            yield _exactly(bool((M == M.T).all()), f"symmetry of {side} of {name}")
            values = np.linalg.eigvalsh(M)[::-1]
            floor = tolerance.negative(len(M), factors.shard_rows, np.float64)
            top = max(float(values[0]), LEAST)
            yield Measure(max(0.0, -float(values[-1]) / top), floor, f"{side} ≥ 0 of {name}")
            beyond = values[factor.n_A :] if factor.n_A < len(M) else np.zeros(1)
            yield Measure(float(np.abs(beyond).max()) / top, floor, f"rank of {side} of {name}")


def _bases(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    if bench.sampled is not None and bench.bases is not None:
        for name, basis in bench.bases.items():
            yield name, bench.sampled, basis


def _curved(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    """The bases of layers that have any curvature to take a share of."""
    return (found for found in _bases(bench) if found[2].lam[0] * found[2].mu[0] >= NORMAL)


def bases_recompose(bench: Bench) -> Iterator[Measure]:
    """U diag(λ) Uᵀ is the factor, UᵀU = 1, eigenvalues descend."""
    for name, factors, basis in _bases(bench):
        for side, M, U, values in (
            ("A", factors[name].A, basis.U_A, basis.mu),
            ("G", factors[name].G, basis.U_G, basis.lam),
        ):
            raised = tolerance.negative(len(M), factors.shard_rows, np.float64)
            budget = tolerance.eigenpair(len(M)) + raised
            yield _measure((U * values) @ U.T, M, M, budget, f"{side} of {name}")
            one = np.eye(len(M))
            yield _measure(U.T @ U, one, one, tolerance.eigenpair(len(M)), f"U_{side} of {name}")
            yield _exactly(bool((np.diff(values) <= 0).all()), f"order of {side} of {name}")


def edits_project(bench: Bench) -> Iterator[Measure]:
    """The edit is an orthogonal projection on a staircase.

    Twice is once; ‖W‖² = ‖W'‖² + ‖W − W'‖²; ρ = 1 keeps all; smaller ρ keeps a subset.
    """
    for name, _, basis in _curved(bench):
        W = bench.parameters[bench.config.weight_of(name)]
        budget = 4 * tolerance.eigenpair(max(W.shape))
        stairs = cut(basis.lam, basis.mu, RHO, name)
        edited = project(W, basis, stairs.counts)
        yield _measure(project(edited, basis, stairs.counts), edited, W, budget, f"twice, {name}")
        square = (W * W).sum()
        split = (edited * edited).sum() + ((W - edited) ** 2).sum()
        yield _measure(split, square, square, 2 * budget, f"Pythagoras, {name}")
        whole = project(W, basis, np.full(len(basis.lam), len(basis.mu)))
        yield _measure(whole, W, W, budget, f"ρ = 1, {name}")
        fewer = cut(basis.lam, basis.mu, RHO / 2, name)
        nested = (fewer.counts <= stairs.counts).all() and (np.diff(stairs.counts) <= 0).all()
        yield _exactly(bool(nested), f"staircase, {name}")
        enough = stairs.mass >= RHO * stairs.total * (1 - tolerance.gamma(4, np.float64))
        last = stairs.mass - stairs.last < RHO * stairs.total * (
            1 + tolerance.gamma(64, np.float64)
        )
        yield _exactly(bool(enough and last), f"just enough, {name}")


def predicted_damage(bench: Bench) -> Iterator[Measure]:
    """½ Σ_dropped λ_i μ_j C_ij² = ½ <ΔW, G ΔW A>."""
    for name, factors, basis in _curved(bench):
        W = bench.parameters[bench.config.weight_of(name)]
        stairs = cut(basis.lam, basis.mu, RHO, name)
        C = basis.U_G.T @ W @ basis.U_A
        dropped = np.arange(W.shape[1]) >= stairs.counts[:, None]
        if not dropped.any():
            continue
        predicted = (np.outer(basis.lam, basis.mu) * C * C)[dropped].sum() / 2
        change = W - project(W, basis, stairs.counts)
        quadratic = (change * (factors[name].G @ change @ factors[name].A)).sum() / 2
        budget = 8 * tolerance.eigenpair(max(W.shape))
        budget += 2 * tolerance.negative(max(W.shape), factors.shard_rows, np.float64)
        # the change is rounded at the size of W, and may hold as much of what was kept
        far, off = norm(change), budget * norm(W)
        top, first_out = basis.lam[0] * basis.mu[0], stairs.first_out
        scale = top * (far * far + off * off / budget) + first_out * far * norm(W)
        yield _measure(predicted, quadratic, scale, budget, name)


# ------------------------------------------------------------------ the file


def rotary_rows(bench: Bench) -> Iterator[Measure]:
    """Reading rows of q and k as interleaved pairs makes it no better.

    No identity knows how a file was written, but a trained model does: read the other way, its
    loss must not fall by more than 6 standard errors and 5 %, to below what a count of tokens
    would give. The error is the fall, as a share; the budget, 5 %.
    """
    b, config = bench.batch, bench.config
    E, turned = config.head_width, {}
    R = config.rope_width or E
    order = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2), np.arange(R, E)])
    for name in config.parameter_shapes() if bench.plan.resident and config.rope_theta else ():
        if name.startswith("blocks.") and name.split(".")[3] in ("q", "k", "q_norm", "k_norm"):
            W = bench.parameters[name]
            turned[name] = W.reshape(-1, E, *W.shape[1:])[:, order].reshape(W.shape)
    if not turned:
        return
    labelled = b.label_BT >= 0
    if labelled.sum() < 32:  # too few to tell a standard error
        return
    here, there = (
        nats(config, p, b.inputs, b.label_BT, bench.layout)[labelled]
        for p in (bench.parameters, _over(turned, bench.parameters))
    )
    fall = here - there
    error = float(fall.std()) / math.sqrt(len(fall))
    counts = np.bincount(b.label_BT[labelled]).astype(float)
    share = counts[counts > 0] / counts.sum()
    counting = float(-(share * np.log(share)).sum())
    sure = fall.mean() > 6 * error and there.mean() < counting
    yield Measure(max(0.0, float(fall.mean() / here.mean())) if sure else 0.0, 0.05, "q and k")


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "R6": fast_is_the_definition,
        "O8": last_layer_in_closed_form,
        "O9": hessian_is_ggn_plus_residual,
        "O11": ggn_is_the_expected_fisher,
        "O14": hessian_is_symmetric_and_linear,
        "O15": gradient_by_complex_step,
        "O16": head_slopes_sum_to_zero,
        "O17": kl_is_the_quadratic_form,
        "O18": factors_are_the_sums,
        "O26": factors_are_second_moments,
        "O29": weight_slopes,
        "O30": unreached_positions,
        "O31": first_queries,
        "O32": rotated_key_slopes,
        "O33": grouped_queries,
        "O34": norm_defect,
        "O35": scale_invariance,
        "O36": gated_slopes,
        "O37": shared_inputs,
        "O38": last_block_has_no_cross_terms,
        "O39": causality,
        "O41": head_slopes_by_label,
        "O42": factors_add,
        "O51": padding,
        "O52": packing,
        "O54": edits_project,
        "O61": predicted_damage,
        "P4": bases_recompose,
        "B51": rotary_rows,
    }
)
"""Every check by its id: oracles, statements of the method, the house's rule R6, and a bug, B51."""
