"""Identities whose two sides are enclosed on tiny models: thirty digits agree.

The rows a and g, the nats and the gradients are those of the transformer over balls. Each identity
has a formula of its own. `audit --certify` proves others on the user's model (test_proofs.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from strategies import Case, case
from test_planted_bugs import planted

from refcurv.algebra.balls import Balls, bits, exact, joined
from refcurv.algebra.eigen_enclosures import enclose, refined
from refcurv.certified.cuts import decided, edited
from refcurv.certified.layers import BALLS, softmax
from refcurv.judge.enclosure import Few, Flow, flow
from refcurv.judge.identities.proved import equal
from refcurv.law.checks import Array

TINY: dict[str, Any] = dict(
    layers=1, width=2, heads=1, kv_heads=1, head_width=2, mlp_width=3, vocabulary=3
)
UP = "blocks.0.mlp.up"


@pytest.fixture(autouse=True)
def precision() -> Any:
    with bits(250):
        yield


def same(left: Any, right: Any, *terms: Any) -> bool:
    """Do thirty digits agree, counted from the terms?"""
    return equal("", left, right, *terms).digits(0.0) >= 30


def tiny(length: int = 6, batch: int = 1, **changes: Any) -> Case:
    return case(batch=batch, length=length, **(TINY | changes))


def ran(one: Case, label: Array | None = None, theta: dict[str, Any] | None = None) -> Flow:
    """Forward and backward over balls, of other labels or other parameters where given."""
    label = one.label if label is None else label
    own = {name: exact(x) for name, x in one.parameters.items()}
    return flow(one.config, own | (theta or {}), Few(one.token, one.layout, label, label >= 0))


@cache
def rows(layer: str = UP, length: int = 6) -> tuple[Balls, Balls]:
    """a and g of a layer."""
    tap = ran(tiny(length)).taps[layer]
    a, g = tap.a[0], tap.g[0]
    return a[: length - 1], g[: length - 1]  # the last position reaches no label


def outer(x: Balls, y: Balls) -> Balls:
    """vec(x_s y_sᵀ) of each row s, row-major (VEC)."""
    each = x.reshape(len(x), -1, 1) * y.reshape(len(y), 1, -1)
    return each.reshape(len(x), -1)


def kron(G: Balls, A: Balls) -> Balls:
    n, m = len(G), len(A)
    product = G.reshape(n, 1, n, 1) * A.reshape(1, m, 1, m)
    return product.reshape(n * m, n * m)


def trace(S: Balls) -> Balls:
    return (S * exact(np.eye(len(S)))).sum()


def square(x: Balls) -> Balls:
    return (x * x).sum()


def proved_above(x: Balls) -> bool:
    return bool(x.above(0).all())


# ------------------------------------------------------------------ the Fisher's blocks


def one_datum() -> tuple[list[Flow], Balls]:
    """A sequence of one token under each label, and the model's probabilities of these."""
    one = tiny(1, biases=("up",))
    made = [ran(one, np.array([[c]])) for c in range(3)]
    return made, softmax(made[0].logits, np.ones((1, 3), bool))[0]


def test_O1_O47_one_datum_makes_kfac_exact() -> None:
    """F = Σ p vec(D) vec(D)ᵀ of the weight is G ⊗ a aᵀ, and with the bias of [a; 1]."""
    made, p = one_datum()
    a, gs = made[0].taps[UP].a[0], [one.taps[UP].g[0] for one in made]
    joint = joined([a, exact(np.ones((1, 1)))], axis=1)
    F: Any = 0
    joint_F: Any = 0
    G: Any = 0
    for c, one in enumerate(made):
        D, b = one.gradient[f"{UP}.weight"], one.gradient[f"{UP}.bias"]
        both = joined([D, b.reshape(-1, 1)], axis=1).reshape(1, -1)
        F = F + p[c] * (D.reshape(-1, 1) @ D.reshape(1, -1))
        joint_F = joint_F + p[c] * (both.T @ both)
        G = G + p[c] * (gs[c].T @ gs[c])
    assert same(F, kron(G, a.T @ a)) and same(joint_F, kron(G, joint.T @ joint))
    assert not same(F, kron(G, a.T @ a) + kron(G, a.T @ a) * 2.0**-60)


def test_O40_gradients_have_mean_zero_over_the_models_labels() -> None:
    made, p = one_datum()
    for name in made[0].gradient:
        mean = sum((p[c] * one.gradient[name] for c, one in enumerate(made)), start=0)
        assert same(mean, None, made[0].taps["head"].g, *(one.gradient[name] for one in made))
    assert not same(made[0].gradient[f"{UP}.weight"], None)


def test_O19_O20_sums_over_one_side_are_the_partial_traces() -> None:
    """F_tok is a sum of vec vecᵀ; its marginals weigh a aᵀ and g gᵀ; tr A is mean ‖a‖²."""
    a, g = rows()
    (O, I), R = (g.shape[1], a.shape[1]), outer(g, a)
    F = (R.T @ R).reshape(O, I, O, I)
    over_g = sum((F[o, :, o, :] for o in range(O)), start=0)
    over_a = sum((F[:, i, :, i] for i in range(I)), start=0)
    a2, g2 = (a * a).sum(axis=1, keepdims=True), (g * g).sum(axis=1, keepdims=True)
    assert same(over_g, (a * g2).T @ a) and same(over_a, (g * a2).T @ g)
    assert same(trace(a.T @ a), a2.sum()) and same(trace(g.T @ g), g2.sum())
    assert not same(over_g, a.T @ a)


def test_O21_O22_lambda_keeps_the_trace_and_is_the_best_diagonal() -> None:
    """ΣΛ = tr F, and ‖F − K‖² = ‖F − UΛUᵀ‖² + ‖Λ − λ μᵀ‖²."""
    a, g = rows()
    n, R = len(a), outer(g, a)
    A, G, F = a.T @ a / n, g.T @ g / n, R.T @ R / n
    one, two = enclose(A, refined(A)), enclose(G, refined(G))
    U = kron_of_columns(two.vectors, one.vectors)
    along = R @ U
    Lambda = (along * along).sum(axis=0) / n
    assert same(Lambda.sum(), trace(F))
    K = kron(G, A)
    keys = (two.values.reshape(-1, 1) * one.values.reshape(1, -1)).reshape(-1)
    best = square(F - (U * Lambda) @ U.T)
    assert same(square(F - K), best + square(Lambda - keys)) and proved_above(square(F - K) - best)
    assert not same(square(F - K), best)


def kron_of_columns(X: Balls, Y: Balls) -> Balls:
    """X ⊗ Y of any two matrices."""
    product = X.reshape(X.shape[0], 1, X.shape[1], 1) * Y.reshape(1, Y.shape[0], 1, Y.shape[1])
    return product.reshape(X.shape[0] * Y.shape[0], -1)


def test_O23_the_spectrum_majorises_lambda() -> None:
    """Schur and Horn, Hadamard: in any orthonormal basis."""
    a, g = rows("blocks.0.attn.q", 7)
    R = outer(g, a)
    F = R.T @ R
    U = kron_of_columns(enclose(s := g.T @ g, refined(s)).vectors,
                        enclose(t := a.T @ a, refined(t)).vectors)  # fmt: skip
    along = R @ U
    Lambda, values = (along * along).sum(axis=0), enclose(F, refined(F)).values
    order = Lambda.midpoints().descending()
    for k in range(1, len(order)):
        assert proved_above((values[:k].sum() - Lambda[order[:k]].sum()).reshape(1))
    assert same(values.sum(), Lambda.sum())
    assert proved_above((Lambda.log().sum() - values.log().sum()).reshape(1))


def test_O24_no_kronecker_fit_is_below_the_floor() -> None:
    """‖F − K‖² ≥ Σ_{k ≥ 2} σ_k² of the rearranged F; a step from I gives Shampoo's factor."""
    a, g = rows()
    gg, aa = outer(g, g), outer(a, a)
    rearranged, R = gg.T @ aa, outer(g, a)
    F, S = R.T @ R, rearranged @ rearranged.T
    values = enclose(S, refined(S)).values
    assert same(square(F), values.sum())
    K = kron(g.T @ g, a.T @ a) / len(a)
    assert proved_above((square(F - K) - values[1:].sum()).reshape(1))
    step = rearranged @ exact(np.eye(a.shape[1]).reshape(-1, 1))
    assert same(step.reshape(g.shape[1], -1), (g * (a * a).sum(axis=1, keepdims=True)).T @ g)


def test_O25_O26_ranks_and_signs() -> None:
    """rank A ≤ n, rank F ≤ Σ (V − 1), rank K = rank A · rank G: the other eigenvalues are 0."""
    a, g = rows("blocks.0.mlp.down", 3)  # two rows of three inputs
    A, G = a.T @ a, g.T @ g
    made, p = one_datum()
    gradients = [one.gradient["head.weight"].reshape(1, -1) for one in made]
    F = sum((p[c] * (D.T @ D) for c, D in enumerate(gradients)), start=0)
    assert 1 <= rank(A) <= len(a) < len(A) and 1 <= rank(F) <= 2 < len(F)
    assert rank(kron(G, A)) == rank(A) * rank(G) < len(G) * len(A)


def rank(S: Balls) -> int:
    """How many eigenvalues are proved to be above 0; the others are 0 to thirty digits."""
    values = enclose(S, refined(S)).values
    found = int((values.least() > 0).sum())
    assert found == len(values) or same(values[found:], None, values)
    assert same(S, S.T)
    return found


def test_O27_more_data_make_each_eigenvalue_larger() -> None:
    a, _ = rows()
    few, more = (enclose(S, refined(S)).values for S in (a[:3].T @ a[:3], a.T @ a))
    assert proved_above(more - few)


def test_O42_sums_add_over_disjoint_data() -> None:
    """A batch of two sequences, and each alone."""
    one = tiny(4, batch=2)
    parts = [replace(one, token=one.token[n : n + 1], label=one.label[n : n + 1],
                     real=one.real[n : n + 1], segment=one.segment[n : n + 1])
             for n in (0, 1)]  # fmt: skip
    whole, halves = ran(one), [ran(part) for part in parts]
    for side in ("a", "g"):
        x = getattr(whole.taps[UP], side).reshape(8, -1)
        y = [getattr(half.taps[UP], side)[0] for half in halves]
        assert same(x.T @ x, y[0].T @ y[0] + y[1].T @ y[1])
        assert not same(x.T @ x, y[0].T @ y[0])


# ------------------------------------------------------------------ the loss


def test_O43_O44_a_weighted_loss_scales_g_and_its_square_G() -> None:
    """By w, or by 1/n, the mean over n labels."""
    one = tiny(4)
    right, plain = BALLS.cross_entropy, ran(one)
    for w in (3.0, 1 / exact(np.array(3))):

        def weighted(z: Any, label: Any, w: Any = w) -> Any:
            nats, slope = right(z, label)
            return nats, slope * w

        with planted(BALLS, "cross_entropy", weighted):
            other = ran(one)
        g, h = (made.taps[UP].g[0] for made in (plain, other))
        assert same(h, g * w) and same(h.T @ h, g.T @ g * w * w) and not same(h.T @ h, g.T @ g * w)


# ------------------------------------------------------------------ other parameters, one function


def test_O45_factors_follow_an_orthogonal_change_of_inputs_and_outputs() -> None:
    """v' = R v and o' = o Rᵀ: the same function. R is a reflection, of fractions."""
    one, u = tiny(), exact(np.array([[3.0], [1.0]]))
    R = exact(np.eye(2)) - 2 * (u @ u.T) / 10
    W = {n: exact(one.parameters[f"blocks.0.attn.{n}.weight"]) for n in "vo"}
    theta = {"blocks.0.attn.v.weight": R @ W["v"], "blocks.0.attn.o.weight": W["o"] @ R.T}
    plain, other = ran(one), ran(one, theta=theta)
    assert same(other.nats, plain.nats)
    a, b = (made.taps["blocks.0.attn.o"].a[0] for made in (plain, other))
    assert same(b.T @ b, R @ (a.T @ a) @ R.T) and not same(b.T @ b, a.T @ a)
    g, h = (made.taps["blocks.0.attn.v"].g[0] for made in (plain, other))
    assert same(h.T @ h, R @ (g.T @ g) @ R.T)
    g, h = (made.taps["blocks.0.attn.o"].g[0] for made in (plain, other))
    assert same(h.T @ h, g.T @ g)


def test_O46_permuted_hidden_units() -> None:
    one, turn = tiny(), np.array([2, 0, 1])
    names = {f"blocks.0.mlp.{n}.weight" for n in ("gate", "up")}
    moved = {n: x[turn] if n in names else x[:, turn] if "mlp.down" in n else x
             for n, x in one.parameters.items()}  # fmt: skip
    plain, other = ran(one), ran(replace(one, parameters=moved))
    for side, layer in (("a", "blocks.0.mlp.down"), ("g", UP)):
        x, y = (getattr(made.taps[layer], side)[0] for made in (plain, other))
        S, T = x.T @ x, y.T @ y
        assert same(T, S[turn][:, turn]) and not same(T, S)


def test_O48_a_tied_matrix_has_two_uses() -> None:
    """Its gradient is that of its two uses in an untied twin: F has both, and cross terms."""
    one = tiny(tied=True)
    untied = {**one.parameters, "head.weight": one.parameters["embed.weight"]}
    apart = replace(one, config=replace(one.config, tied=False), parameters=untied)
    whole, parts = ran(one).gradient["embed.weight"], ran(apart).gradient
    E, H = (parts[name].reshape(-1, 1) for name in ("embed.weight", "head.weight"))
    D = whole.reshape(-1, 1)
    assert same(D, E + H) and same(D @ D.T, E @ E.T + H @ H.T + E @ H.T + H @ E.T)
    assert not same(D @ D.T, E @ E.T + H @ H.T)


def test_O49_the_gradient_of_a_gain_is_the_sum_of_g_and_x_hat() -> None:
    """So its Fisher is of Σ_t g ∘ x̂: no Kronecker form."""
    made, one = ran(tiny()), tiny()
    x, _, d_y, _ = made.norms[0]
    x_hat = x / ((x * x).mean(axis=-1, keepdims=True) + one.config.norm_eps).sqrt()
    s = (d_y * x_hat).reshape(-1, x.shape[-1]).sum(axis=0)
    assert same(made.gradient["final_norm.weight"], s)
    assert not same(made.gradient["final_norm.weight"], (d_y * x).reshape(-1, 2).sum(axis=0))


# ------------------------------------------------------------------ the cut and the edit


@cache
def spectra() -> tuple[Any, Any, Array]:
    """Of A and G of a layer, and its weight."""
    with bits(250):
        a, g = rows()
        A, G = a.T @ a / len(a), g.T @ g / len(g)
        W = tiny().parameters[f"{UP}.weight"]
        return enclose(A, refined(A)), enclose(G, refined(G)), W


def test_O62_the_mass_is_the_product_of_traces_and_no_rectangle_is_smaller() -> None:
    """Σ λ_i μ_j = tr G tr A; a rectangle that holds the share has as many pairs at least."""
    A, G, _ = spectra()
    a, g = rows()
    keys = G.values.reshape(-1, 1) * A.values.reshape(1, -1)
    assert same(keys.sum(), trace(a.T @ a) * trace(g.T @ g) / len(a) ** 2)
    for rho in (0.3, 0.6, 0.9, 0.99):
        kept, dropped = decided(G.values, A.values, rho, "up")
        assert (kept ^ dropped).all()
        for n in range(len(G.values) + 1):
            for m in range(len(A.values) + 1):
                enough = (keys[:n, :m].sum() - exact(np.array(rho)) * keys.sum()).above(0)
                assert not enough or n * m >= kept.sum()


def test_O59_powers_of_two_change_no_pair() -> None:
    A, G, _ = spectra()
    for rho in (0.3, 0.9):
        one = decided(G.values, A.values, rho, "up")
        two = decided(G.values * 2.0**40, A.values * 2.0**-70, rho, "up")
        assert all((x == y).all() for x, y in zip(one, two, strict=True))


def test_O54_O60_O61_the_edit() -> None:
    """A projection that the transpose shares, and whose damage is what was predicted."""
    A, G, W = spectra()
    a, g = rows()
    kept, dropped = decided(G.values, A.values, 0.7, "up")
    assert (kept ^ dropped).all() and kept.any() and dropped.any()
    W_new, weight = edited(W, G, A, kept), exact(W)
    assert same(W_new, edited(W.T, A, G, kept.T).T)
    change = weight - W_new
    assert same(square(weight), square(W_new) + square(change))
    C = G.vectors.T @ weight @ A.vectors
    keys = G.values.reshape(-1, 1) * A.values.reshape(1, -1)
    predicted = (keys * C * C * exact(dropped)).sum() / 2
    real = (change * ((g.T @ g) @ change @ (a.T @ a))).sum() / (2 * len(a) ** 2)
    assert same(predicted, real) and not same((keys * C * C).sum() / 2, real)


def test_digits_of_a_wrong_side_are_none() -> None:
    """What is off by 1e-25 is seen by `same`."""
    x = exact(np.arange(1.0, 4.0)) / 3
    assert same(x * 3, exact(np.arange(1.0, 4.0))) and not same(x, x + x * 1e-25)
