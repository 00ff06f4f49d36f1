"""Identities whose two sides are real numbers, proved on balls: both sides, and their difference.

Each has a formula of its own beside what the transformer made (METHOD, Identities). Two balls that
do not overlap prove that the sides differ.

Proof: tests/test_proofs.py::test_every_identity_is_proved,
    ::test_a_wrong_factor_is_caught
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra.balls import Balls, chosen, exact, joined, zeros
from refcurv.algebra.duals import Duals
from refcurv.algebra.eigen_enclosures import enclose, refined
from refcurv.certified.layers import BALLS, activation, hessian_product, softmax
from refcurv.certified.numbers import gradient
from refcurv.judge.enclosure import Enclosure, Numbers
from refcurv.judge.identities.curvature import scale_free
from refcurv.judge.identities.measures import numbered_blocks
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig, QKNorm
from refcurv.model.layers import windowed
from refcurv.model.transformer import Cotangent, Tap


@dataclass(frozen=True, slots=True)
class Equal:
    """Two sides that must be one.

    Fields: where; left, right, balls; size, of the terms of both; below, whether a term is not 0,
    and yet all are too small for a float64 of their size; of, what stands in their place.
    """

    where: str
    left: Balls
    right: Balls
    size: float
    below: bool = False
    of: str = ""

    @property
    def counted(self) -> str:
        """From what digits count, "" for the terms."""
        return self.of if self.size or self.below else "the head's output gradients"

    def digits(self, scale: float) -> float:
        """How many decimal digits of the terms are proved to agree.

        −∞ where the sides are proved to differ, ∞ where they are one number exactly. Where all
        terms may be 0, as attention's gradient is with one key, digits count from `scale`.
        """
        apart = self.left - self.right
        if not _may_be_zero(apart):
            return -math.inf
        far = float(apart.most().max(initial=0.0))
        if not far:
            return math.inf
        size = 0.0 if self.below else self.size or scale
        return math.log10(size) - math.log10(far) if size and far < math.inf else 0.0


def equal(where: str, left: Balls, right: Balls | None, *terms: Balls, of: str = "") -> Equal:
    """The two sides, None for 0; sizes count from the largest entry of the sides and `terms`."""
    other = zeros(left.shape) if right is None else right
    every = (left, other, *terms)
    size = max(float(x.least().max(initial=0.0)) for x in every)
    return Equal(where, left, other, size, not size and not all(map(_may_be_zero, every)), of)


def _may_be_zero(x: Balls) -> bool:
    """Asked of the balls: a bound as float64 is 0 of numbers that float64 has not."""
    return bool(x.contains(np.zeros(x.shape)).all())


Proof = Callable[[Enclosure], Iterator[Equal]]

OTHERS = "the layer's other output gradients"
"""What stands in the place of terms, where a gradient is 0 by theory at a position."""


# ------------------------------------------------------------------ the head


def head_slopes_sum_to_zero(run: Enclosure) -> Iterator[Equal]:
    """Output gradients of the head sum to zero over the vocabulary."""
    if run.config.logit_cap is None:
        g = run.plain.taps["head"].g
        yield equal("head", _sum(g), None, _balls(g))


def head_slopes_by_label(run: Enclosure) -> Iterator[Equal]:
    """‖g‖² of the head is 1 − 2 p_y + Σ p² at every label, and p_y is exp(−nats)."""
    label_N = _labels(run)
    p = softmax(run.plain.logits, np.ones(run.plain.logits.shape, bool))
    own = p[np.arange(len(label_N)), label_N]
    yield equal("nats", (-run.plain.nats).exp(), own)
    if run.config.logit_cap is None:
        g = _balls(run.plain.taps["head"].g)
        yield equal("head", _sum(g * g), 1 - 2 * own + _sum(p * p))


def last_layer_in_closed_form(run: Enclosure) -> Iterator[Equal]:
    """The head's H X is Σ_t (diag p − p pᵀ) X h hᵀ, its GGN's."""
    config = run.config
    if config.tied or config.logit_cap is not None:
        return
    X, h = run.direction(2)[config.weight_of("head")], _balls(run.plain.taps["head"].a)
    sent = hessian_product(run.plain.logits, h @ X.T, _labels(run))
    yield equal(config.weight_of("head"), run.head_along(X), sent.T @ h)


def _labels(run: Enclosure) -> Array:
    label = run.few.label_BT
    return label[label >= 0]


# ------------------------------------------------------------------ derivatives


def gradient_by_duals(run: Enclosure) -> Iterator[Equal]:
    """<∇L, v> by the backward is the derivative of L along v by the forward."""
    moved, v = run.along(0), run.direction(0)
    yield equal("**", _along(run.plain.gradient, v), moved.nats.derivative.sum())


def hessian_is_ggn_plus_residual(run: Enclosure) -> Iterator[Equal]:
    """H v = Jᵀ (diag p − p pᵀ) J v + Σ r ∂²z v, r being p − onehot."""
    config, made, label = run.config, run.along(0), run.few.label_BT
    Jv, label_N, moved = made.logits.derivative, _labels(run), run.moved(0)
    r: Numbers = BALLS.cross_entropy(run.plain.logits, label_N)[1]
    still: Numbers = Duals(r, zeros(r.shape))
    bent = run.steps(run.theta, run.plain, label, lambda _, z: hessian_product(z, Jv, label_N))
    residual = gradient(config, moved, run.steps(moved, made, label, lambda *_: still))
    for name, d in gradient(config, run.theta, bent).items():
        yield equal(name, made.gradient[name].derivative, d + residual[name].derivative, d)


def hessian_is_symmetric(run: Enclosure) -> Iterator[Equal]:
    """u·Hv = v·Hu."""
    u, v = run.direction(0), run.direction(1)
    H_u, H_v = ({name: d.derivative for name, d in run.along(n).gradient.items()} for n in (0, 1))
    yield equal("**", _along(H_v, u), _along(H_u, v))


def _along(gradient: Mapping[str, Numbers], v: Mapping[str, Numbers]) -> Numbers:
    """<gradient, v>."""
    parts = [(gradient[name] * v[name]).sum().reshape(1) for name in gradient]
    return joined(parts).sum()


def weight_slopes(run: Enclosure) -> Iterator[Equal]:
    """Σ_s <g_s, W a_s> = <W, ∇W>."""
    last = f"blocks.{run.config.layers - 1}."
    for name, tap in run.plain.taps.items():
        if name.startswith(last):
            W = run.theta[f"{name}.weight"]
            through = (_balls(tap.g) * (_balls(tap.a) @ W.T)).sum()
            yield equal(name, (W * run.plain.gradient[f"{name}.weight"]).sum(), through)


def scale_invariance(run: Enclosure) -> Iterator[Equal]:
    """Scale-free W at eps = 0: <W, ∇W> = 0."""
    at = f"blocks.{run.config.layers - 1}."
    squares = [_sum(x * x) for x, *_ in run.plain.norms]
    if any(one.contains(np.zeros(one.shape)).any() for one in squares):
        return  # no norm without eps scales a row of zeros
    for layer in scale_free(run.config):
        name = f"{at}{layer}.weight"
        slopes = run.theta[name] * run.without_eps.gradient[name]
        yield equal(name, slopes.sum(), None, slopes)


# ------------------------------------------------------------------ factors


def factors_are_the_sums(run: Enclosure) -> Iterator[Equal]:
    """tr A is mean ‖a‖², and tr K − tr F_tok is −n Cov(‖a‖², ‖g‖²), over rows."""
    for name, a, g in _rows(run):
        n, one, two = len(a), _sum(a * a), _sum(g * g)
        tr_A, tr_G = (_trace(x.T @ x) for x in (a, g))
        yield equal(f"A of {name}", tr_A, one.sum())
        yield equal(f"G of {name}", tr_G, two.sum())
        spread = ((one - one.sum() / n) * (two - two.sum() / n)).sum()
        yield equal(f"tr K of {name}", tr_A * tr_G / n, (one * two).sum() - spread)


def last_block_has_no_cross_terms(run: Enclosure) -> Iterator[Equal]:
    """Last block: q, o, gate, up, down reach their own logits only, so F = F_tok."""
    labelled = np.flatnonzero(run.few.label_BT[0] >= 0)
    if run.config.image is not None or not len(labelled):
        return
    last, below = (f"blocks.{run.config.layers - n}." for n in (1, 2))
    names = {last + layer for layer in ("attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    for t in {int(labelled[0]), int(labelled[len(labelled) // 2])}:
        label = np.where(np.arange(run.few.label_BT.shape[1]) == t, run.few.label_BT, -1)
        sent = _slope_of(label[label >= 0])
        for step in run.steps(run.theta, run.plain, label, sent):
            if step.name.startswith(below):
                break
            if isinstance(step, Tap) and step.name in names:
                g = _balls(step.g)
                yield equal(step.name, g[label < 0], None, g, of=OTHERS)


def _slope_of(label_N: Array) -> Cotangent:
    return lambda _, z: BALLS.cross_entropy(z, label_N)[1]


def bases_recompose(run: Enclosure) -> Iterator[Equal]:
    """UᵀAU = diag(λ) but inside a cluster, UᵀU = 1, tr A = Σλ; λ = 0 beyond the rows."""
    rows = list(_rows(run))
    if not rows:
        return
    name, *both = min(rows, key=lambda one: one[1].shape[1] + one[2].shape[1])
    for side, x in zip("AG", both, strict=True):
        S, where = x.T @ x, f"{side} of {name}"
        one = enclose(S, refined(S))
        U, values, clusters = one.vectors, one.values, one.clusters
        of = np.repeat(range(len(clusters)), [stop - start for start, stop in clusters])
        alone = np.diag(np.bincount(of)[of] == 1)  # a cluster's columns are one basis of many
        known = alone | (of != of[:, None])
        yield equal(where, (U.T @ S @ U)[known], chosen(alone, values, 0)[known], values)
        yield equal(f"U_{where}", U.T @ U, exact(np.eye(len(values))))
        yield equal(f"tr {where}", _trace(S), values.sum())
        if len(values) > len(x):
            yield equal(f"rank of {where}", values[len(x) :], None, values)


def _rows(run: Enclosure) -> Iterator[tuple[str, Numbers, Numbers]]:
    """Layers of the last block with their rows a and g (ROWS)."""
    reached = run.few.reached_BT
    for name, tap in run.plain.taps.items():
        if name.startswith(f"blocks.{run.config.layers - 1}.") and reached.any():
            a, g = _balls(tap.a), _balls(tap.g)
            if g.shape[:2] == reached.shape:
                yield name, a[reached], g[reached]


def _trace(S: Numbers) -> Numbers:
    return (S * exact(np.eye(len(S)))).sum()


# ------------------------------------------------------------------ attention


def unreached_positions(run: Enclosure) -> Iterator[Equal]:
    """A position that reaches no label has no gradient: exactly 0."""
    off = ~run.few.reached_BT
    for name, tap in run.plain.taps.items():
        if off.any() and tap.g.shape[:2] == off.shape:
            yield equal(name, _balls(tap.g)[off], None, _balls(tap.g), of=OTHERS)


def first_queries(run: Enclosure) -> Iterator[Equal]:
    """A query that sees one key has no gradient."""
    for i, at in numbered_blocks(run.config):
        layout, window = run.few.layout, run.config.window(i)
        layout = windowed(layout, window) if window else layout
        alone, g = layout.first_BT == layout.last_BT, _balls(run.plain.taps[f"{at}attn.q"].g)
        if alone.any():
            yield equal(f"{at}attn.q", g[alone], None, g, of=OTHERS)


def rotated_key_slopes(run: Enclosure) -> Iterator[Equal]:
    """Rotated key gradients sum to 0 over a segment."""
    if run.config.score_cap is not None:  # scores are not shift invariant then
        return
    first_BT = run.few.layout.first_BT
    for i, d_k in run.plain.keys.items():
        for b, first_T in enumerate(first_BT):
            for begin in np.unique(first_T):
                one = d_k[b, first_T == begin]
                yield equal(f"blocks.{i}.attn.k", one.sum(axis=0), None, one)


def grouped_queries(run: Enclosure) -> Iterator[Equal]:
    """A key-value head has the summed gradient of its group's copies."""
    config = run.config
    R, K, E = config.heads // config.kv_heads, config.kv_heads, config.head_width
    if R == 1 or config.qk_norm is QKNorm.FULL:
        return
    copied = {
        name: np.repeat(x.reshape(K, E, *x.shape[1:]), R, axis=0).reshape(-1, *x.shape[1:])
        for name, x in run.parameters.items()
        if name.startswith("blocks.") and name.split(".")[3] in ("k", "v")
    }
    wide = Enclosure(replace(config, kv_heads=config.heads), {**run.parameters, **copied}, run.few)
    for name in (f"blocks.{config.layers - 1}.attn.{x}" for x in ("k", "v")):
        g, copies = _balls(run.plain.taps[name].g), _balls(wide.plain.taps[name].g)
        summed = copies.reshape(*g.shape[:2], K, R, E).sum(axis=3).reshape(g.shape)
        yield equal(name, summed, g)


# ------------------------------------------------------------------ norms and MLPs


def norm_defect(run: Enclosure) -> Iterator[Equal]:
    """Below each norm g_x·x = (g_ŷ·ŷ) eps/(ms + eps): eps inside."""
    calls, eps = run.plain.norms, exact(float(run.config.norm_eps))
    for n, (x, gain, d_y, d_x) in enumerate(calls):
        room = (x * x).mean(axis=-1, keepdims=True) + eps
        terms = d_y * gain * (x * room.rsqrt())
        want = (terms * eps / room).sum(axis=-1)
        yield equal(f"norm {n + 1} of {len(calls)}, from the top", _sum(d_x * x), want, terms)


def gated_slopes(run: Enclosure) -> Iterator[Equal]:
    """MLP: g_up z_up = g_h h, g_gate = g_h z_up f'; ungated g_up = g_h f'."""
    for _, at in numbered_blocks(run.config):
        up, down = (run.plain.taps[f"{at}mlp.{name}"] for name in ("up", "down"))
        g_h = _balls(down.g) @ run.theta[f"{at}mlp.down.weight"]
        z_up = _output(run, up)
        if not run.config.gated:
            yield equal(f"{at}mlp.up", _balls(up.g), g_h * _slope(run, z_up))
            continue
        gate = run.plain.taps[f"{at}mlp.gate"]
        yield equal(f"{at}mlp.up", _balls(up.g) * z_up, g_h * _balls(down.a))
        slope = _slope(run, _output(run, gate))
        yield equal(f"{at}mlp.gate", _balls(gate.g), g_h * z_up * slope)


def _output(run: Enclosure, tap: Tap) -> Numbers:
    return transformer.linear_forward(run.config, run.theta, tap.name, tap.a)


def _slope(run: Enclosure, z: Numbers) -> Numbers:
    """f', by a dual number, not by its formula."""
    moved: Numbers = Duals(z, zeros(z.shape) + 1)
    return activation(run.config.activation, moved)[0].derivative


def shared_inputs(run: Enclosure) -> Iterator[Equal]:
    """gate and up read the same input, and q, k, v."""
    for _, at in numbered_blocks(run.config):
        for one, other in (("mlp.gate", "mlp.up"), ("attn.q", "attn.k"), ("attn.q", "attn.v")):
            if at + one in run.plain.taps:
                a, b = (_balls(run.plain.taps[at + name].a) for name in (one, other))
                yield equal(f"{at}{one}, {other}", a, b)


# ------------------------------------------------------------------ positions


def causality(run: Enclosure) -> Iterator[Equal]:
    """Another last token changes no earlier position."""
    few, T = run.few, run.few.label_BT.shape[1]
    if run.config.image is None and run.config.causal and T > 1:
        token = few.inputs.copy()
        token[:, -1] = (token[:, -1] + 1) % run.config.vocabulary
        moved = run.final(token, few.layout)
        yield equal("what the head reads", moved[:, :-1], _balls(run.plain.final)[:, :-1])


def padding(run: Enclosure) -> Iterator[Equal]:
    """Padding at the right changes no real position."""
    few = run.few
    if run.config.image is not None or _longest(run.config) < few.inputs.shape[1] + 2:
        return
    real = few.layout.last_BT >= 0
    token, wide = (np.pad(x, ((0, 0), (0, 2))) for x in (few.inputs, real))
    segment = np.pad(few.layout.first_BT, ((0, 0), (0, 2)), mode="edge")
    moved = run.final(token, transformer.layout_of(run.config, wide, segment))
    yield equal("what the head reads", moved[:, :-2][real], _balls(run.plain.final)[real])


def _longest(config: ModelConfig) -> int:
    """Positions that the model can read."""
    return config.learned_positions or 2**30


def packing(run: Enclosure) -> Iterator[Equal]:
    """Documents packed as segments are what they are alone."""
    token = run.few.inputs
    half = 0 if run.config.image is not None else token.shape[1] // 2
    if not half:
        return
    token = token[:1, : 2 * half]
    layout = transformer.layout_of
    packed, alone = np.repeat([[0, 1]], half, axis=1), token.reshape(2, half)
    one = run.final(token, layout(run.config, np.ones(token.shape, bool), packed))
    none = np.zeros(alone.shape, int)
    two = run.final(alone, layout(run.config, np.ones(alone.shape, bool), none))
    yield equal("what the head reads", one.reshape(two.shape), two)


# ------------------------------------------------------------------ all


def _balls(x: Any) -> Numbers:
    """A Tap's array, which is one of balls here."""
    return x


def _sum(x: Numbers) -> Numbers:
    return x.sum(axis=-1)


PROOFS: Mapping[str, Proof] = MappingProxyType(
    {
        "P4": bases_recompose,
        "O8": last_layer_in_closed_form,
        "O9": hessian_is_ggn_plus_residual,
        "O14": hessian_is_symmetric,
        "O15": gradient_by_duals,
        "O16": head_slopes_sum_to_zero,
        "O18": factors_are_the_sums,
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
        "O51": padding,
        "O52": packing,
    }
)
"""Every identity that is proved on balls, by its id."""
