"""A second, naive implementation of the method: loops over positions and heads, one sequence.

It imports nothing of refcurv but the law. Everything runs in the dtype of its arguments; in
longdouble its derivatives are good to about 1e-13, and to 2e-11 where the function bends sharply.
`config` is anything with the attributes of a ModelConfig, `parameters` a mapping of arrays by
name. The caller cuts the padding off; sums over sequences are his too.

A sequence has loss positions t, row positions s, labels v, and nats[t, v] = −log p_t(v). What one
backward pass carries is a World: (weight, {(t, v): c}) stands for the gradient of Σ c nats[t, v],
whose square counts by its weight. Every Fisher, F_tok and G below is a sum over worlds, and
`worlds` alone knows the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refcurv.law.conventions import WORD_BITS_KEPT

MASK = 2**64 - 1

Array = np.ndarray
Place = tuple[str, int]
"""A linear layer's name and a position."""

World = tuple[Any, Mapping[tuple[int, int], Any]]
"""A weight, and the coefficients of the nats[t, v] that one backward pass carries."""

# ------------------------------------------------------------------ labels


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011), written out on Python integers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k[0], b & MASK, (a >> 64) ^ x[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return x


def uniform(seed: int, draw: int, index: int, t: int) -> float:
    """SAMPLING: the uniform of position t of sequence `index`."""
    word = philox4x64([1 + t // 4, 0, draw, index], [seed, 0])[t % 4]
    return (word >> (64 - WORD_BITS_KEPT)) * 2.0**-WORD_BITS_KEPT


def draw_label(logits: np.ndarray, u: float) -> int:
    """SAMPLING: the first v with c_v > u·c_{V−1}, else the last with positive probability."""
    top = max(float(z) for z in logits)
    e = [float(np.exp(np.float64(z) - top)) for z in logits]
    c, total = [], 0.0
    for value in e:
        total += value
        c.append(total)
    for v, value in enumerate(c):
        if value > u * c[-1]:
            return v
    return max(v for v, value in enumerate(e) if value > 0)


def drawn_labels(logit_TV: Array, label_T: Array, seed: int, draw: int, index: int) -> list[int]:
    """SAMPLING: the labels of one sequence, drawn wherever the corpus has one."""
    return [
        draw_label(logit_TV[t], uniform(seed, draw, index, t)) if label_T[t] >= 0 else -1
        for t in range(len(label_T))
    ]


def signs(seed: int, draw: int, index: int, t: int, vocabulary: int) -> list[int]:
    """SAMPLING: the signs of position t of sequence `index`, one bit per entry."""
    out = []
    for v in range(vocabulary):
        n = v // 64
        word = philox4x64([1 + n // 4, 1 + t, draw, index], [seed, 0])[n % 4]
        out.append(1 if word >> v % 64 & 1 else -1)
    return out


def reached(label: np.ndarray, real: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """ROWS: real positions with a labelled one at or behind them in the same segment."""
    out = np.zeros(label.shape, dtype=bool)
    for b, t in np.ndindex(label.shape):
        out[b, t] = real[b, t] and any(
            label[b, s] >= 0 and segment[b, s] == segment[b, t] for s in range(t, label.shape[1])
        )
    return out


# ------------------------------------------------------------------ the decoder


def norm(x: Array, gain: Array, eps: float) -> Array:
    """RMSNorm of one vector: gain · x / sqrt(mean(x²) + eps)."""
    return gain * x / np.sqrt((x @ x) / len(x) + eps)


def silu(z: Array) -> Array:
    """z / (1 + exp(−z))."""
    return z / (1 + np.exp(-z))


def rotate(x: Array, position: int, theta: float) -> Array:
    """Rotary positions on one head: pairs (j, j + E/2) turn by position · theta^(-2j/E)."""
    number, E = x.dtype.type, len(x)
    out = np.zeros_like(x)
    for j in range(E // 2):
        angle = position * number(theta) ** (number(-2 * j) / E)
        c, s, u, v = np.cos(angle), np.sin(angle), x[j], x[j + E // 2]
        out[j], out[j + E // 2] = u * c - v * s, u * s + v * c
    return out


def attention(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """One sequence, one number at a time: (T, H, E) with head h reading key-value head h div R."""
    T, H, E = q.shape
    R = H // k.shape[1]
    out = np.zeros_like(q)
    for t in range(T):
        for h in range(H):
            keys = [s for s in range(k.shape[0]) if visible[t, s]]
            if not keys:
                continue
            score = [q[t, h] @ k[s, h // R] / np.sqrt(q.dtype.type(E)) for s in keys]
            weight = [np.exp(x - max(score)) for x in score]
            for e in range(E):
                total = sum(w * v[s, h // R, e] for w, s in zip(weight, keys, strict=True))
                out[t, h, e] = total / sum(weight)
    return out


@dataclass(frozen=True)
class Decoder:
    """One sequence's way through the blocks; vectors are kept in lists over positions."""

    config: Any
    parameters: Mapping[str, Array]
    segment: Sequence[int]
    probe: Mapping[Place, Array]
    record: MutableMapping[Place, Array]

    def linear(self, layer: str, t: int, a: Array) -> Array:
        """y = W a, plus the probe's vector; the input is written into the record."""
        self.record[layer, t] = a
        weight = "embed" if layer == "head" and self.config.tied else layer
        y = self.parameters[weight + ".weight"] @ a
        return y + self.probe[layer, t] if (layer, t) in self.probe else y

    def norm(self, name: str, x: Array) -> Array:
        """RMSNorm with the gain of that name."""
        return norm(x, self.parameters[name + ".weight"], self.config.norm_eps)

    def turned(self, name: str, t: int, y: Array) -> list[Array]:
        """Queries or keys of position t by heads: normalised (all, or each), then rotated."""
        if self.config.qk_norm == "full":
            y = self.norm(name, y)
        heads = list(y.reshape(-1, self.config.head_width))
        if self.config.qk_norm == "head":
            heads = [self.norm(name, head) for head in heads]
        position = sum(self.segment[s] == self.segment[t] for s in range(t))
        return [rotate(head, position, self.config.rope_theta) for head in heads]

    def attn(self, at: str, x: list[Array]) -> list[Array]:
        """o · attention over the earlier positions of the segment."""
        T, E = range(len(x)), self.config.head_width
        q = np.array([self.turned(at + "q_norm", t, self.linear(at + "q", t, x[t])) for t in T])
        k = np.array([self.turned(at + "k_norm", t, self.linear(at + "k", t, x[t])) for t in T])
        v = np.array([self.linear(at + "v", t, x[t]).reshape(-1, E) for t in T])
        visible = np.array([[s <= t and self.segment[s] == self.segment[t] for s in T] for t in T])
        context = attention(q, k, v, visible)
        return [self.linear(at + "o", t, context[t].ravel()) for t in T]

    def mlp(self, at: str, x: list[Array]) -> list[Array]:
        """down · (silu(gate · x) × (up · x)), position by position."""
        return [
            self.linear(
                at + "down", t, silu(self.linear(at + "gate", t, a)) * self.linear(at + "up", t, a)
            )
            for t, a in enumerate(x)
        ]

    def block(self, i: int, x: list[Array]) -> list[Array]:
        """x + f(norm(x)) or x + norm(f(x)), f first the attention and then the MLP."""
        for name, f in (("attn", self.attn), ("mlp", self.mlp)):
            at = f"blocks.{i}.{name}"
            if self.config.norm_place == "pre":
                update = f(at + ".", [self.norm(at + "_norm", one) for one in x])
            else:
                update = [self.norm(at + "_norm", one) for one in f(at + ".", x)]
            x = [one + more for one, more in zip(x, update, strict=True)]
        return x


def logits(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
    probe: Mapping[Place, Array] | None = None,
    record: MutableMapping[Place, Array] | None = None,
) -> Array:
    """(T, V) of one sequence: embed → blocks → final norm → head.

    `probe` adds vectors to outputs of linear layers, y_s = W a_s + probe[layer, s]; an empty dict
    given as `record` is filled with the a_s.
    """
    segment = [0] * len(token_T) if segment_T is None else list(segment_T)
    record = {} if record is None else record
    decoder = Decoder(config, parameters, segment, probe or {}, record)
    x = [parameters["embed.weight"][token] for token in token_T]
    for i in range(config.layers):
        x = decoder.block(i, x)
    final = [decoder.norm("final_norm", one) for one in x]
    return np.array([decoder.linear("head", t, one) for t, one in enumerate(final)])


def nats(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
    probe: Mapping[Place, Array] | None = None,
) -> Array:
    """(T, V): −log softmax(logits); the probabilities are exp of minus this."""
    z_TV = logits(config, parameters, token_T, segment_T, probe)
    return np.array([np.log(np.exp(z - max(z)).sum()) + max(z) - z for z in z_TV])


def loss(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Sequence[int],
    label_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
    probe: Mapping[Place, Array] | None = None,
) -> Any:
    """LOSS: the sum of nats[t, label_t] over labels >= 0."""
    nats_TV = nats(config, parameters, token_T, segment_T, probe)
    return sum(nats_TV[t, v] for t, v in enumerate(label_T) if v >= 0)


# ------------------------------------------------------------------ central differences


def jacobian(f: Callable[[Array], Any], x: Array, h: float | None = None) -> Array:
    """∂f/∂x, one entry e of x at a time: the shape of f, then that of x.

    (8 [f(x + h e) − f(x − h e)] − [f(x + 2h e) − f(x − 2h e)]) / 12h errs by h⁴ f⁗' / 30 and by
    u |f| / h. By default h = eps^(1/4), 1.8e-5 in longdouble. Observed there on gradients of small
    models, relative to their norm: 2e-14 to 5e-12, and 2e-11 beside a nearly vanishing norm.
    (The step h = 3e-7 with two points: 4e-13 to 3e-11, and 4e-9.)
    """
    h = np.finfo(x.dtype).eps ** x.dtype.type(0.25) if h is None else x.dtype.type(h)
    columns = []
    for index in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[index] = h
        near, far = f(x + e) - f(x - e), f(x + 2 * e) - f(x - 2 * e)
        columns.append((8 * near - far) / (12 * h))
    return np.stack(columns, axis=-1).reshape(np.shape(columns[0]) + x.shape)


def gradient(f: Callable[[Array], Any], x: Array, h: float | None = None) -> Array:
    """∂f/∂x of a number f, shaped like x; the Hessian is `jacobian` of a gradient function."""
    return jacobian(f, x, h)


def hessian(f: Callable[[Array], Any], x: Array, h: float | None = None) -> Array:
    """∂²f/∂x∂x of a number f of a vector x, by differences of differences of f alone.

    Errs by u |f| / h²; by default h = eps^(1/5), 1.6e-4 in longdouble. Observed there: 3e-12 to
    4e-9, and 3e-7 beside a nearly vanishing norm, where `jacobian` of a gradient errs by 2e-11.
    """
    h = np.finfo(x.dtype).eps ** x.dtype.type(0.2) if h is None else h
    return jacobian(lambda y: jacobian(f, y, h), x, h)


def flat(parameters: Mapping[str, Array], names: Sequence[str]) -> Array:
    """The named parameters as one vector, each row by row (VEC)."""
    return np.concatenate([parameters[name].ravel() for name in names])


def placed(parameters: Mapping[str, Array], names: Sequence[str], x: Array) -> dict[str, Array]:
    """The parameters with the named ones read from x, the reverse of `flat`."""
    out, begin = dict(parameters), 0
    for name in names:
        size = parameters[name].size
        out[name] = x[begin : begin + size].reshape(parameters[name].shape)
        begin += size
    return out


# ------------------------------------------------------------------ rows and worlds


class Rows(NamedTuple):
    """One linear layer on one sequence: inputs a_s, and g[t, v, s] = ∂ nats[t, v] / ∂ y_s."""

    a_SI: Array
    g_TVSO: Array


def rows(
    config: Any,
    parameters: Mapping[str, Array],
    layer: str,
    token_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
) -> Rows:
    """Inputs by the record, output gradients by central differences on the probe."""
    record: dict[Place, Array] = {}
    logits(config, parameters, token_T, segment_T, None, record)
    S = range(len(token_T))
    a_SI = np.array([record[layer, s] for s in S])
    width = config.vocabulary if layer == "head" else len(parameters[layer + ".weight"])

    def moved(delta_SO: Array) -> Array:
        return nats(config, parameters, token_T, segment_T, {(layer, s): delta_SO[s] for s in S})

    return Rows(a_SI, jacobian(moved, np.zeros((len(a_SI), width), a_SI.dtype)))


def worlds(
    p_TV: Array,
    label_T: Sequence[int],
    kind: str,
    per: str = "sequence",
    drawn: Sequence[Any] = (),
) -> list[World]:
    """FISHER: what is carried back, and how much its square counts; labelled positions only.

    `expected`: every entry of every position by itself, by its probability. `empirical`: the
    corpus's labels. `sampled`: each draw's labels, (T,). `signed`: each draw's signs ε, (T, V), as
    Σ_v ε_v √p_v nats[t, v]. The last three carry a sequence at once, or with per="term" each t.
    """
    labelled = [t for t, v in enumerate(label_T) if v >= 0]
    if kind == "expected":
        return [(p, {(t, v): 1}) for t in labelled for v, p in enumerate(p_TV[t])]
    if kind == "signed":
        terms = [{t: signed_root(t, p_TV[t], signs_TV[t]) for t in labelled} for signs_TV in drawn]
    else:
        sets = {"empirical": [label_T], "sampled": drawn}[kind]
        terms = [{t: {(t, labels[t]): 1} for t in labelled} for labels in sets]
    assert terms, f"worlds: {kind} needs what was drawn"
    weight = p_TV.dtype.type(1) / len(terms)
    if per == "term":
        return [(weight, one) for draw in terms for one in draw.values()]
    assert per == "sequence", per
    return [(weight, {at: c for one in draw.values() for at, c in one.items()}) for draw in terms]


def signed_root(t: int, p_V: Array, sign_V: Sequence[int]) -> dict[tuple[int, int], Any]:
    """What S ε carries at position t, up to its sign: Σ_v ε_v √p_v nats[t, v]."""
    return {(t, v): sign_V[v] * np.sqrt(p) for v, p in enumerate(p_V)}


def carried(slope: Array, back: Mapping[tuple[int, int], Any]) -> Array:
    """Σ c slope[t, v] over what is carried back; `slope` is (T, V, ...)."""
    return sum((c * slope[at] for at, c in back.items()), np.zeros_like(slope[0, 0]))


def weight_slopes(one: Rows) -> Array:
    """(T, V, OI): ∂ nats[t, v] / ∂ rvec(W) = rvec(Σ_s g[t, v, s] a_sᵀ)."""
    T, V, S, O = one.g_TVSO.shape
    out = np.zeros((T, V, O * one.a_SI.shape[1]), one.a_SI.dtype)
    for t, v, s in np.ndindex(T, V, S):
        out[t, v] += np.outer(one.g_TVSO[t, v, s], one.a_SI[s]).ravel()
    return out


def parameter_slopes(
    config: Any,
    parameters: Mapping[str, Array],
    names: Sequence[str],
    token_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
) -> Array:
    """(T, V, P): ∂ nats[t, v] / ∂ the named parameters, by central differences."""
    return jacobian(
        lambda x: nats(config, placed(parameters, names, x), token_T, segment_T),
        flat(parameters, names),
    )


# ------------------------------------------------------------------ curvature


def kron(G: Array, A: Array) -> Array:
    """KRON: (G ⊗ A)[o·I + i, p·I + j] = G[o, p] A[i, j]."""
    O, I = len(G), len(A)
    out = np.zeros((O * I, O * I), G.dtype)
    for o, p in np.ndindex(O, O):
        for i, j in np.ndindex(I, I):
            out[o * I + i, p * I + j] = G[o, p] * A[i, j]
    return out


def fisher(slope_TVP: Array, some: Sequence[World]) -> Array:
    """F = Σ weight · d dᵀ over worlds, d = Σ c slope[t, v]; of one sequence, they add."""
    P = slope_TVP.shape[-1]
    out = np.zeros((P, P), slope_TVP.dtype)
    for weight, back in some:
        d_P = carried(slope_TVP, back)
        out += weight * np.outer(d_P, d_P)
    return out


def f_tok(one: Rows, some: Sequence[World]) -> Array:
    """F_tok = Σ weight · Σ_s (g_s g_sᵀ) ⊗ (a_s a_sᵀ) over worlds; of one sequence, they add."""
    size = one.g_TVSO.shape[-1] * one.a_SI.shape[1]
    out = np.zeros((size, size), one.a_SI.dtype)
    for weight, back in some:
        for g, a in zip(carried(one.g_TVSO, back), one.a_SI, strict=True):
            out += weight * kron(np.outer(g, g), np.outer(a, a))
    return out


def factor_sums(one: Rows, some: Sequence[World], keep_S: Array) -> tuple[Array, Array, int]:
    """COUNTS: S_A = Σ_s a aᵀ, Σ weight · Σ_s g gᵀ (S_G over draws) and n, over the kept rows."""
    kept = [s for s, keep in enumerate(keep_S) if keep]
    I, O = one.a_SI.shape[1], one.g_TVSO.shape[-1]
    sum_A, sum_G = np.zeros((I, I), one.a_SI.dtype), np.zeros((O, O), one.a_SI.dtype)
    for s in kept:
        sum_A += np.outer(one.a_SI[s], one.a_SI[s])
    for weight, back in some:
        g_SO = carried(one.g_TVSO, back)
        for s in kept:
            sum_G += weight * np.outer(g_SO[s], g_SO[s])
    return sum_A, sum_G, len(kept)


def kfac(sum_A: Array, sum_G: Array, n: int) -> Array:
    """K = n (G ⊗ A) with A = S_A / n, G = S_G / n; the sums and n are those of all sequences."""
    return n * kron(sum_G / n, sum_A / n)


def ggn(
    config: Any,
    parameters: Mapping[str, Array],
    names: Sequence[str],
    token_T: Sequence[int],
    label_T: Sequence[int],
    segment_T: Sequence[int] | None = None,
) -> Array:
    """Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t over labelled t, J_t = ∂ logits_t / ∂ parameters."""
    J_TVP = jacobian(
        lambda x: logits(config, placed(parameters, names, x), token_T, segment_T),
        flat(parameters, names),
    )
    p_TV = np.exp(-nats(config, parameters, token_T, segment_T))
    P = J_TVP.shape[-1]
    out = np.zeros((P, P), J_TVP.dtype)
    for t in (t for t, v in enumerate(label_T) if v >= 0):
        for u, v in np.ndindex(J_TVP.shape[1], J_TVP.shape[1]):
            weight = p_TV[t, u] * (u == v) - p_TV[t, u] * p_TV[t, v]
            out += weight * np.outer(J_TVP[t, u], J_TVP[t, v])
    return out


def second_moment(rows: np.ndarray) -> np.ndarray:
    """Σ_r x_r x_rᵀ, one exactly rounded sum per entry."""
    n = rows.shape[1]
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            out[i, j] = math.fsum(float(x[i]) * float(x[j]) for x in rows)
    return out


# ------------------------------------------------------------------ the edit


def jacobi_eigh(M: Array, sweeps: int = 60) -> tuple[Array, Array]:
    """Cyclic Jacobi: turn planes (p, q) until M is diagonal; (values, U), ordered by ORDER."""
    assert (M == M.T).all(), "jacobi_eigh: not symmetric"
    M, U = M.copy(), np.eye(len(M), dtype=M.dtype)
    size, eps = np.sqrt(M.ravel() @ M.ravel()), np.finfo(M.dtype).eps
    for _ in range(sweeps):
        pairs = [(p, q) for q in range(len(M)) for p in range(q) if abs(M[p, q]) > eps**2 * size]
        if not pairs:
            break
        for p, q in pairs:
            turn_plane(M, U, p, q)
    else:
        raise ArithmeticError(f"jacobi_eigh: not diagonal after {sweeps} sweeps")
    order = sorted(range(len(M)), key=lambda i: -M[i, i])
    for i in order:
        largest = max(range(len(M)), key=lambda row: abs(U[row, i]))
        U[:, i] *= 1 if U[largest, i] > 0 else -1
    return np.array([M[i, i] for i in order]), U[:, order]


def turn_plane(M: Array, U: Array, p: int, q: int) -> None:
    """M ← Rᵀ M R and U ← U R in place, R the rotation of the plane (p, q) with M[p, q] → 0."""
    difference, twice = M[p, p] - M[q, q], 2 * M[p, q]
    if twice == 0:
        return
    # tan 2φ = twice / difference; of the two tan φ the smaller, at most 45 degrees
    t = twice / (abs(difference) + np.hypot(difference, twice))
    t = t if difference >= 0 else -t
    c = 1 / np.sqrt(1 + t * t)
    s = t * c
    for X in (M.T, M, U):  # columns of Mᵀ are the rows of M
        X[:, p], X[:, q] = c * X[:, p] + s * X[:, q], c * X[:, q] - s * X[:, p]
    M[p, q] = M[q, p] = 0


def selection(lam: np.ndarray, mu: np.ndarray, rho: float) -> np.ndarray:
    """SELECT by sorting every pair and adding one at a time; counts kept in each row."""
    counts = np.zeros(len(lam), dtype=np.int64)
    if rho == 1:
        return counts + len(mu)
    target = (rho * math.fsum(lam)) * math.fsum(mu)
    prefix = np.array([math.fsum(mu[:n]) for n in range(len(mu) + 1)])
    pairs = sorted(
        ((-(float(a) * float(b)), i, j) for i, a in enumerate(lam) for j, b in enumerate(mu))
    )
    for _, i, _ in pairs:
        if rho == 0 or math.fsum(lam * prefix[counts]) >= target:
            return counts
        counts[i] += 1
    return counts


def edited(W: Array, U_G: Array, U_A: Array, counts: Sequence[int]) -> Array:
    """W' = Σ (u_iᵀ W v_j) u_i v_jᵀ over the kept pairs, j < counts[i]."""
    out = np.zeros_like(W)
    for i, kept in enumerate(counts):
        for j in range(kept):
            u, v = U_G[:, i], U_A[:, j]
            out += (u @ W @ v) * np.outer(u, v)
    return out
