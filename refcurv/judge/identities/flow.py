"""What flows through the model: gradients, symmetries, causality, and the order of rotary rows.

Proof: tests/test_budgets.py::test_a_budget_sees_a_fault_that_a_hundred_budgets_hide
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature import exact
from refcurv.curvature.exact.problems import of_batch
from refcurv.curvature.exact.products import STEP
from refcurv.judge.bench import Bench, flow
from refcurv.judge.identities.measures import (
    Measure,
    along,
    batch_of,
    exactly,
    few_terms,
    measure,
    numbered_blocks,
    overlaid,
    reached_rows,
    rounded,
    sizes,
)
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import QKNorm
from refcurv.model.layers import ACTIVATIONS, lengths, rope_frequencies, windowed
from refcurv.model.transformer import Tap
from refcurv.passes.fast import FAST
from refcurv.passes.forward import nats


def fast_is_the_definition(bench: Bench) -> Iterator[Measure]:
    """Kernels give each weight the gradient Σ_s g_s a_sᵀ."""
    fast, _ = flow(bench.config, bench.parameters, bench.batch, bench.layout, FAST)
    for name in bench.taps:
        if name != "head":
            runs = bench.runs_of_taps(partial(_slope, name))
            yield rounded(_slope(name, fast), runs.here, runs.size, bench.budget, f"{name}.weight")


def _slope(layer: str, taps: Mapping[str, Tap]) -> Array:
    return _outer(taps[layer].g, taps[layer].a)


def _outer(g: Array, a: Array) -> Array:
    return np.asarray(g.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1]))


def weight_slopes(bench: Bench) -> Iterator[Measure]:
    """Σ_s <g_s, W a_s> = <W, ∇W>, the gradient of W by the definitions."""
    made = of_batch(batch_of(bench, len(bench.real)), bench.parameters)
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
        scale = partial(sizes, [math.sqrt(squares)], [runs])
        yield rounded((W * gradient[weight]).sum(), through, scale, bench.budget, weight)


def _slope_along(layer: str, W: Array, taps: Mapping[str, Tap]) -> Array:
    """The terms of <W, ∇W> by entries of W, and by outputs."""
    tap = taps[layer]
    return np.append(along(W, _slope(layer, taps)), tap.g * (tap.a @ W.T))


def last_layer_in_closed_form(bench: Bench) -> Iterator[Measure]:
    """The head's F along random X is Σ_t Var_p(X h_t)."""
    head = bench.config.weight_of("head")
    if not bench.plan.enumerated or bench.config.tied:
        return
    batch = few_terms(bench)
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
    yield measure(x @ x, variance, scale, budget, head)


def head_slopes_sum_to_zero(bench: Bench) -> Iterator[Measure]:
    """Output gradients of the head sum to zero over the vocabulary."""
    if bench.config.logit_cap is not None:  # it is the capped logits' that do
        return
    g = bench.taps["head"].g[bench.batch.label_BT >= 0]
    budget = tolerance.gamma(4 * g.shape[-1], np.float64)
    yield measure(g.sum(axis=-1), 0, np.abs(g).sum(axis=-1), budget, "head")


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
    yield measure(square, want, want * (1 + terms), budget)


def unreached_positions(bench: Bench) -> Iterator[Measure]:
    """A position that reaches no label has no gradient: exactly 0."""
    reached = reached_rows(bench)
    if reached.all():
        return
    for name, tap in bench.taps.items():
        if tap.g.shape[:2] == reached.shape:  # neither a pooled head nor patches
            yield exactly(not tap.g[~reached].any(), name)


def first_queries(bench: Bench) -> Iterator[Measure]:
    """A query that sees one key has no gradient: exactly 0."""
    for i, at in numbered_blocks(bench.config):
        layout, window = bench.layout, bench.config.window(i)
        if window:
            layout = windowed(layout, window)
        alone = layout.first_BT == layout.last_BT
        if alone.any():
            yield exactly(not bench.taps[f"{at}attn.q"].g[alone].any(), f"{at}attn.q")


def rotated_key_slopes(bench: Bench) -> Iterator[Measure]:
    """Rotated key gradients sum to 0 over a segment: Σ_s R_s g_s = 0.

    The rotation is made here anew: pairs (j, j + R/2) as complex numbers, θ^(-2j/R) a turn. Without
    rotary positions and norms of keys it is the layer's own gradients that sum to 0.
    """
    config = bench.config
    if config.score_cap is not None:  # scores are not shift invariant then
        return
    R = config.rope_width or config.head_width
    for i, at in numbered_blocks(config):
        rope = config.rope(i)
        if rope is None:
            if config.qk_norm is QKNorm.NONE and config.qkv_clip is None:
                yield _sums_to_zero(bench, i, bench.taps[f"{at}attn.k"].g)
            continue
        if i not in bench.key_slopes:
            continue
        theta, scaling = rope
        turn = theta ** (-np.arange(0, R, 2) / R)
        if scaling is not None:
            wide = np.dtype(np.float64)
            turn = rope_frequencies(R, theta, scaling, wide, lengths(bench.layout))
        angle = bench.layout.position_BT[:, :, None, None] * turn
        d_k = bench.key_slopes[i][1]
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
    return measure(np.array(sums), 0, np.array(sizes), budget, f"blocks.{i}.attn.k")


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
    parameters = overlaid(copied, bench.parameters)
    found, _ = flow(wide, parameters, bench.batch, bench.layout)
    for name in (f"blocks.{config.layers - 1}.attn.{x}" for x in ("k", "v")):
        g = bench.taps[name].g
        copies = found[name].g.reshape(*g.shape[:2], K, R, E)
        # each copy normalises by the same root, so a full-width norm's slope is shared too
        runs = bench.runs_of_taps(partial(_output_slope, name))
        scale = partial(sizes, [norm(copies)], [runs])
        yield rounded(copies.sum(axis=3).reshape(g.shape), g, scale, bench.budget, name)


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
        yield measure(got, want, terms, budget, f"norm {n + 1} of {len(bench.norms)}, from the top")


def gated_slopes(bench: Bench) -> Iterator[Measure]:
    """MLP: g_up z_up = g_h h, g_gate = g_h z_up f'; ungated g_up = g_h f'.

    f' is the complex step of f, Im f(z + i h)/h.
    """
    budget = tolerance.gamma(4 * max(bench.config.width, bench.config.mlp_width), np.float64)
    f = ACTIVATIONS[bench.config.activation]
    for _, at in numbered_blocks(bench.config):
        (up, z_up, size_up), down = _outputs(bench, f"{at}mlp.up"), bench.taps[f"{at}mlp.down"]
        W_down = bench.parameters[f"{at}mlp.down.weight"]
        g_h, size_h = down.g @ W_down, np.abs(down.g) @ np.abs(W_down)
        if not bench.config.gated:
            slope = f(z_up + 1j * STEP)[0].imag / STEP
            yield measure(up.g, g_h * slope, size_h * (size_up + 1), budget, f"{at}mlp.up")
            continue
        gate, z_gate, size_gate = _outputs(bench, f"{at}mlp.gate")
        scale = size_h * np.abs(down.a) + np.abs(up.g) * size_up
        yield measure(up.g * z_up, g_h * down.a, scale, budget, f"{at}mlp.up")
        slope = f(z_gate + 1j * STEP)[0].imag / STEP
        scale = size_h * size_up * (size_gate + 1)
        yield measure(gate.g, g_h * z_up * slope, scale, budget, f"{at}mlp.gate")


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
    for _, at in numbered_blocks(bench.config):
        for one, other in (("mlp.gate", "mlp.up"), ("attn.q", "attn.k"), ("attn.q", "attn.v")):
            if at + one not in bench.taps:
                continue
            a, b = bench.taps[at + one].a, bench.taps[at + other].a
            yield exactly(a.tobytes() == b.tobytes(), f"{at}{one}, {other}")


def causality(bench: Bench) -> Iterator[Measure]:
    """Another last token changes no earlier position, bit for bit."""
    if not bench.config.causal or bench.real.shape[1] < 2:
        return
    token = bench.batch.inputs.copy()
    token[:, -1] = (token[:, -1] + 1) % bench.config.vocabulary
    final = _final(bench, token, bench.real, bench.batch.segment_BT)
    yield exactly(bool((final[:, :-1] == bench.final[:, :-1]).all()), "what the head reads")


def padding(bench: Bench) -> Iterator[Measure]:
    """Padding at the right changes no real position."""
    if bench.config.image is not None:
        return
    token = np.pad(bench.batch.inputs, ((0, 0), (0, 3)))
    real = np.pad(bench.real, ((0, 0), (0, 3)))
    segment = np.pad(bench.batch.segment_BT, ((0, 0), (0, 3)), mode="edge")
    got, want = _final(bench, token, real, segment)[:, :-3], bench.final
    runs = bench.runs_of_taps(lambda taps: taps["head"].a[bench.real])
    yield rounded(got[bench.real], want[bench.real], runs.size, bench.budget, "what the head reads")


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
    yield rounded(got, want, runs.size, bench.budget, "what the head reads")


def _final(bench: Bench, token: Array, real: Array, segment: Array) -> Array:
    """What the head reads of other tokens or another layout."""
    lowest = bench.config.layers
    layout = transformer.layout_of(bench.config, real, segment)
    return transformer.forward(bench.config, bench.parameters, token, layout, lowest=lowest)[0]


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
        for p in (bench.parameters, overlaid(turned, bench.parameters))
    )
    fall = here - there
    error = float(fall.std()) / math.sqrt(len(fall))
    counts = np.bincount(b.label_BT[labelled]).astype(float)
    share = counts[counts > 0] / counts.sum()
    counting = float(-(share * np.log(share)).sum())
    sure = fall.mean() > 6 * error and there.mean() < counting
    yield Measure(max(0.0, float(fall.mean() / here.mean())) if sure else 0.0, 0.05, "q and k")
