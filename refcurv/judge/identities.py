"""The identities that hold on any model, as checks: each measures its error and derives its budget.

The ids are those of the oracles (O) and of the method's statements (P). An error is relative to
the size of the terms that the identity sums, never to a result that may vanish. A check yields one
`Measure` for each place where it looked, or none where its subject does not occur in the model.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.staircase import cut
from refcurv.curvature import exact
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factors
from refcurv.curvature.problem import Batch, Problem, of_batch
from refcurv.editing.projection import project
from refcurv.judge.bench import Bench, flow
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL
from refcurv.model import transformer
from refcurv.model.config import Activation, ModelConfig, NormPlace, Pool, QKNorm
from refcurv.model.layers import ACTIVATIONS, rope_frequencies
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.fast import FAST
from refcurv.passes.memory import nats

RHO = 0.8
"""The share of mass at which an edit is checked."""

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
    """|got − want| / |scale| in Frobenius norm; infinite without a scale, or between shapes."""
    if np.shape(want) not in ((), np.shape(got)):
        return Measure(math.inf, budget, f"{where}: {np.shape(got)} for {np.shape(want)}")
    error = float(np.linalg.norm(np.asarray(got) - np.asarray(want)))
    size = float(np.linalg.norm(scale))
    return Measure(error / size if size else (math.inf if error else 0.0), budget, where)


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
    for name, tap in bench.taps.items():
        if name != "head":
            d, d_fast = (_outer(x.g, x.a) for x in (tap, fast[name]))
            terms = _outer(np.abs(tap.g), np.abs(tap.a))
            yield _measure(d_fast, d, terms, bench.first_order, f"{name}.weight")


def _outer(g: Array, a: Array) -> Array:
    return np.asarray(g.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1]))


def weight_slopes(bench: Bench) -> Iterator[Measure]:
    """Σ_s <g_s, W a_s> = <W, ∇W>, the gradient of W by the definitions."""
    made = _problem(bench, len(bench.real))
    weights = {bench.config.weight_of(name): name for name in bench.taps}
    names = [w for w in weights if w in bench.plan.directions and w in made.linear]
    if not names:
        return
    gradient = exact.gradient(made, wrt=",".join(names))
    for weight in names:
        W, tap = bench.parameters[weight], bench.taps[weights[weight]]
        through = float((tap.g * (tap.a @ W.T)).sum())
        size = float((np.abs(tap.g) * (np.abs(tap.a) @ np.abs(W).T)).sum())
        yield _measure((W * gradient[weight]).sum(), through, size, bench.first_order, weight)


def last_layer_in_closed_form(bench: Bench) -> Iterator[Measure]:
    """The head's F along random X is Σ_t Var_p(X h_t)."""
    head = bench.config.weight_of("head")
    if not bench.plan.enumerated or bench.config.tied:
        return
    batch = _few_terms(bench)
    made = of_batch(batch, bench.parameters)
    X = bench.rng(7).normal(size=made.parameters[head].shape)
    z, (final, *_) = made.forward(made.parameters)
    h = final[batch.label_BT >= 0]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    y = transformer.uncapped(bench.config, z, h @ X.T)
    variance = (p * y * y).sum(axis=1) - (p * y).sum(axis=1) ** 2
    x = exact.fisher_along(made, vector={head: X})
    yield _measure(x @ x, variance.sum(), (p * y * y).sum(), bench.second_order, head)


def head_slopes_sum_to_zero(bench: Bench) -> Iterator[Measure]:
    """Output gradients of the head sum to zero over the vocabulary."""
    if bench.config.logit_cap is not None:  # it is the capped logits' that do
        return
    g = bench.taps["head"].g[bench.batch.label_BT >= 0]
    terms = np.full(len(g), 2.0)  # g = p − onehot
    yield _measure(g.sum(axis=-1), 0, terms, tolerance.gamma(2 * g.shape[-1], np.float64), "head")


def head_slopes_by_label(bench: Bench) -> Iterator[Measure]:
    """‖g‖² of the head is 1 − 2 p_y + Σ p² at every labelled position."""
    if bench.config.logit_cap is not None:
        return
    b, t = np.nonzero(bench.batch.label_BT >= 0)
    z = bench.logits[b, t]
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    own = p[np.arange(len(p)), bench.batch.label_BT[b, t]]
    square = (bench.taps["head"].g[b, t] ** 2).sum(axis=-1)
    want = 1 - 2 * own + (p * p).sum(axis=-1)
    yield _measure(square, want, np.ones(len(p)), tolerance.gamma(8 * z.shape[-1], np.float64))


def unreached_positions(bench: Bench) -> Iterator[Measure]:
    """A position that reaches no label has no gradient: exactly 0."""
    if bench.config.image is not None:  # every one reaches its image's
        return
    reached = _reached(bench)
    for name, tap in bench.taps.items():
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
    """The first query of a segment has no gradient: exactly 0."""
    if not bench.config.causal:
        return
    first = bench.layout.first_BT == bench.layout.last_BT
    for _, at in _blocks(bench.config):
        yield _exactly(not bench.taps[f"{at}attn.q"].g[first].any(), f"{at}attn.q")


def rotated_key_slopes(bench: Bench) -> Iterator[Measure]:
    """Rotated key gradients sum to 0 over a segment: Σ_s R_s g_s = 0.

    The rotation is made here anew: pairs (j, j + R/2) as complex numbers, θ^(-2j/R) a turn. Without
    rotary positions and norms of keys it is the layer's own gradients that sum to 0.
    """
    config, segment = bench.config, bench.layout.first_BT
    if config.score_cap is not None:  # scores are not shift invariant then
        return
    if config.rope_theta is None:
        for i, at in _blocks(config):
            if config.qk_norm is QKNorm.NONE and config.qkv_clip is None:
                yield _sums_to_zero(bench.taps[f"{at}attn.k"].g, segment, bench, i)
        return
    R = config.rope_width or config.head_width
    if config.rope_scaling is None:
        turn = config.rope_theta ** (-np.arange(0, R, 2) / R)
    else:
        turn = rope_frequencies(R, config.rope_theta, config.rope_scaling, np.dtype(np.float64))
    angle = bench.layout.position_BT[:, :, None, None] * turn
    for i, (_, d_k) in bench.key_slopes.items():
        z = (d_k[..., : R // 2] + 1j * d_k[..., R // 2 : R]) * np.exp(1j * angle)
        yield _sums_to_zero(np.concatenate([z, d_k[..., R:]], axis=-1), segment, bench, i)


def _sums_to_zero(x_BT: Array, segment_BT: Array, bench: Bench, i: int) -> Measure:
    """Σ x over each segment is 0, beside Σ |x|."""
    sums, sizes = [], []
    for b in range(len(segment_BT)):
        for one in np.unique(segment_BT[b]):
            member = x_BT[b, segment_BT[b] == one]
            sums.append(member.sum(axis=0).ravel())
            sizes.append(np.abs(member).sum(axis=0).ravel())
    return _measure(np.array(sums), 0, np.array(sizes), bench.first_order, f"blocks.{i}.attn.k")


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
        scale = np.abs(copies).sum(axis=3)
        # each copy normalises by the same root, so a full-width norm's slope is shared too
        yield _measure(copies.sum(axis=3).reshape(g.shape), g, scale, R * bench.first_order, name)


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
            slope = f(z_up + 1j * exact.STEP)[0].imag / exact.STEP
            yield _measure(up.g, g_h * slope, size_h * (size_up + 1), budget, f"{at}mlp.up")
            continue
        gate, z_gate, size_gate = _outputs(bench, f"{at}mlp.gate")
        scale = size_h * size_up + np.abs(up.g * z_up)
        yield _measure(up.g * z_up, g_h * down.a, scale, budget, f"{at}mlp.up")
        slope = f(z_gate + 1j * exact.STEP)[0].imag / exact.STEP
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
    if not bench.config.causal:
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
    yield _measure(got[bench.real], want[bench.real], want[bench.real], bench.first_order)


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
    want = bench.final[:2].reshape(got.shape)
    yield _measure(got, want, want, bench.first_order)


def _final(bench: Bench, token: Array, real: Array, segment: Array) -> Array:
    """What the head reads of other tokens or another layout."""
    lowest = bench.config.layers
    layout = transformer.layout_of(bench.config, real, segment)
    return transformer.forward(bench.config, bench.parameters, token, layout, lowest=lowest)[0]


# ------------------------------------------------------------------ curvature, in random directions


def _problem(bench: Bench, sequences: int = 2, eps: float | None = None) -> Problem:
    """The first sequences, as a Problem that reads its parameters where it needs them."""
    b, config = bench.batch, bench.config
    if eps is not None:
        config = replace(config, norm_eps=eps)
    few = (x[:sequences] for x in (b.inputs, b.label_BT, b.segment_BT, b.index_B))
    return of_batch(Batch(config, *few), bench.parameters)


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


def _wrt(bench: Bench) -> str:
    return ",".join(bench.plan.directions)


def gradient_by_complex_step(bench: Bench) -> Iterator[Measure]:
    """<∇L, v> by the backward is Im L(θ + i h v)/h by the forward."""
    made, names = _problem(bench), list(bench.plan.directions)
    if not names:
        return
    gradient = _flat(exact.gradient(made, wrt=_wrt(bench)))
    for salt in range(3):
        v = _direction(bench, salt)
        slope = exact.derivative(made, vector=v)
        scale = np.linalg.norm(gradient) * np.linalg.norm(_flat(v))
        # the loss itself is rounded at its own size
        z, _ = made.forward(made.parameters)
        loss = float(np.abs(made.loss.terms(z)[0]).sum())
        yield _measure(slope, gradient @ _flat(v), np.array([scale, loss]), bench.first_order,
                       f"direction {salt + 1}")  # fmt: skip


def hessian_is_symmetric_and_linear(bench: Bench) -> Iterator[Measure]:
    """u·Hv = v·Hu, and H(2u − 3v) = 2Hu − 3Hv."""
    if not bench.plan.directions:
        return
    made, u, v = _problem(bench), _direction(bench, 0), _direction(bench, 1)
    both = {name: 2 * u[name] - 3 * v[name] for name in u}
    H_u, H_v, H_both = (_flat(exact.hvp(made, wrt=_wrt(bench), vector=x)) for x in (u, v, both))
    size = np.linalg.norm(_flat(u)) * np.linalg.norm(H_v) + np.linalg.norm(
        _flat(v)
    ) * np.linalg.norm(H_u)
    yield _measure(_flat(u) @ H_v, _flat(v) @ H_u, size, bench.second_order, "symmetry")
    yield _measure(H_both, 2 * H_u - 3 * H_v, 2 * np.abs(H_u) + 3 * np.abs(H_v),
                   bench.second_order, "linearity")  # fmt: skip


def hessian_is_ggn_plus_residual(bench: Bench) -> Iterator[Measure]:
    """H v = GGN v + Σ r ∂²z v, three routes; v·GGN v ≥ 0."""
    if not bench.plan.directions:
        return
    made, v = _problem(bench), _direction(bench, 2)
    H, GGN, R = (exact.operator(made, wrt=_wrt(bench), kind=kind) @ _flat(v)
                 for kind in exact.PRODUCTS)  # fmt: skip
    yield _measure(GGN + R, H, np.abs(GGN) + np.abs(R), bench.second_order, "H v")
    size = np.linalg.norm(GGN) * np.linalg.norm(_flat(v))
    negative = max(0.0, -float(_flat(v) @ GGN) / float(size)) if size else 0.0
    yield Measure(negative, bench.second_order, "v GGN v ≥ 0")


def ggn_is_the_expected_fisher(bench: Bench) -> Iterator[Measure]:
    """v·GGN v, forward first, is Σ_t Σ_v p (∇log p · v)², backward only."""
    if not bench.plan.enumerated:
        return
    made = of_batch(_few_terms(bench), bench.parameters)
    v = {name: x for name, x in _direction(bench, 3).items() if name in made.linear}
    GGN_v = _flat(exact.ggnvp(made, wrt=",".join(v), vector=v))
    x = exact.fisher_along(made, vector=v)
    square = float(x @ x)
    yield _measure(_flat(v) @ GGN_v, square, square, bench.second_order, "v F v")


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
    made = of_batch(_few_terms(bench), bench.parameters)
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
        yield _measure(F, F_tok, F_tok, bench.second_order, name)


def scale_invariance(bench: Bench) -> Iterator[Measure]:
    """Scale-free W at eps = 0: <W, ∇W> = 0, GGN·W = 0, H·W = −∇W."""
    if bench.config.activation is Activation.RELU and bench.config.norm_place is not NormPlace.PRE:
        return  # a dead MLP's output is 0, which no norm without eps can scale
    made = _problem(bench, eps=0.0)
    at = f"blocks.{bench.config.layers - 1}."
    for name in (f"{at}{layer}.weight" for layer in _scale_free(bench.config)):
        if name not in bench.plan.directions:
            continue
        W = {name: bench.parameters[name]}
        length = np.linalg.norm(W[name])
        d = exact.gradient(made, wrt=name)[name]
        yield _measure((W[name] * d).sum(), 0, length * np.linalg.norm(d), bench.first_order,
                       f"<W, ∇W> of {name}")  # fmt: skip
        X = bench.rng(5).normal(size=W[name].shape)
        X *= length / np.linalg.norm(X)
        size, size_H = (
            np.linalg.norm(product(made, wrt=name, vector={name: X})[name])
            for product in (exact.ggnvp, exact.hvp)
        )
        GGN_W = exact.ggnvp(made, wrt=name, vector=W)[name]
        yield _measure(GGN_W, 0, size, bench.second_order, f"GGN·W of {name}")
        H_W = exact.hvp(made, wrt=name, vector=W)[name]
        yield _measure(H_W, -d, np.array([np.linalg.norm(d), size_H]), bench.second_order,
                       f"H·W of {name}")  # fmt: skip


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

    (KL(+t) + KL(−t)) / 2t² at two steps, extrapolated, is good to t⁴.
    """
    kinked = bench.config.activation is Activation.RELU or bench.config.qkv_clip is not None
    if not bench.plan.directions or kinked:  # a step, however small, may cross a kink
        return
    made, d = _problem(bench, sequences=1), _direction(bench, 6)
    quadratic = float(_flat(d) @ _flat(exact.ggnvp(made, wrt=_wrt(bench), vector=d))) / 2
    if quadratic <= 0:
        return
    t = 1e-3 / math.sqrt(quadratic)  # about a millionth of a nat

    def kl(step: float) -> float:
        moved = {name: made.parameters[name] + step * d[name] for name in d}
        z, y = (made.forward(p)[0] for p in (made.parameters, _over(moved, made.parameters)))
        log_p, log_q = (x - x.max(axis=1, keepdims=True) for x in (z, y))
        log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (log_p, log_q))
        return float((np.exp(log_p) * (log_p - log_q)).sum())

    wide, narrow = ((kl(s) + kl(-s)) / (2 * s * s) for s in (t, t / 2))
    yield _measure((4 * narrow - wide) / 3, quadratic, quadratic, SHAPE, "½ d F d")


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
        yield _measure(factor.sum_A, a.T @ a, (a * a).sum(), 2 * bench.first_order, f"A of {name}")
        yield _measure(factor.sum_G, g.T @ g, (g * g).sum(), 2 * bench.first_order, f"G of {name}")
        traces = np.trace(factor.A) * np.trace(factor.G) * factor.n_A
        square_a, square_g = (a * a).sum(axis=1), (g * g).sum(axis=1)
        covariance = ((square_a - square_a.mean()) * (square_g - square_g.mean())).sum()
        yield _measure(traces, (square_a * square_g).sum() - covariance, traces,
                       4 * bench.first_order, f"tr K of {name}")  # fmt: skip


def factors_add(bench: Bench) -> Iterator[Measure]:
    """Sums of factors add over disjoint data, and only grow."""
    half, whole = len(bench.real) // 2, bench.empirical
    if not half or whole is None:
        return
    one, two = (bench.collect("empirical", p) for p in (slice(half), slice(half, None)))
    if one is None or two is None:
        return
    for name, factor in whole.items():
        for side in ("sum_A", "sum_G"):
            total = getattr(factor, side)
            got = getattr(one[name], side) + getattr(two[name], side)
            yield _measure(got, total, np.trace(total), 2 * bench.first_order, f"{side} of {name}")
        grown = np.linalg.eigvalsh(factor.sum_A - one[name].sum_A)[0] / np.trace(factor.sum_A)
        yield Measure(max(0.0, -float(grown)), 2 * bench.first_order, f"growth of A of {name}")


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
            top = max(float(values[0]), 1e-300)
            yield Measure(max(0.0, -float(values[-1]) / top), floor, f"{side} ≥ 0 of {name}")
            beyond = values[factor.n_A :] if factor.n_A < len(M) else np.zeros(1)
            yield Measure(float(np.abs(beyond).max()) / top, floor, f"rank of {side} of {name}")


def _bases(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    if bench.sampled is not None and bench.bases is not None:
        for name, basis in bench.bases.items():
            yield name, bench.sampled, basis


def _curved(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    """The bases of layers that have any curvature to take a share of."""
    return (found for found in _bases(bench) if found[2].lam[0] * found[2].mu[0])


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
        predicted = (np.outer(basis.lam, basis.mu) * C * C)[dropped].sum() / 2
        change = W - project(W, basis, stairs.counts)
        quadratic = (change * (factors[name].G @ change @ factors[name].A)).sum() / 2
        size = basis.lam[0] * basis.mu[0] * (change * change).sum()
        yield _measure(predicted, quadratic, size, 8 * tolerance.eigenpair(max(W.shape)), name)


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
