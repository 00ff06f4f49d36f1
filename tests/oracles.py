"""A second, naive implementation: loops and integers. It imports nothing of refcurv but the law."""

from __future__ import annotations

import math

import numpy as np

from refcurv.law.conventions import WORD_BITS_KEPT

MASK = 2**64 - 1


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


def second_moment(rows: np.ndarray) -> np.ndarray:
    """Σ_r x_r x_rᵀ, one exactly rounded sum per entry."""
    n = rows.shape[1]
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            out[i, j] = math.fsum(float(x[i]) * float(x[j]) for x in rows)
    return out


def reached(label: np.ndarray, real: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """ROWS: real positions with a labelled one at or behind them in the same segment."""
    out = np.zeros(label.shape, dtype=bool)
    for b, t in np.ndindex(label.shape):
        out[b, t] = real[b, t] and any(
            label[b, s] >= 0 and segment[b, s] == segment[b, t] for s in range(t, label.shape[1])
        )
    return out


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


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One sequence, one number at a time: (T, H, E) with head h reading key-value head h div R."""
    T, H, E = q.shape
    R = H // k.shape[1]
    out = np.zeros((T, H, E))
    for t in range(T):
        for h in range(H):
            keys = [s for s in range(k.shape[0]) if visible[t, s]]
            score = [
                math.fsum(q[t, h, e] * k[s, h // R, e] for e in range(E)) / math.sqrt(E)
                for s in keys
            ]
            weight = [math.exp(x - max(score)) for x in score]
            for e in range(E):
                total = math.fsum(w * v[s, h // R, e] for w, s in zip(weight, keys, strict=True))
                out[t, h, e] = total / math.fsum(weight) if keys else 0.0
    return out


def rotate(x: np.ndarray, position: int, theta: float) -> list[float]:
    """Rotary positions on one head: pairs (j, j + E/2) turn by position · theta^(-2j/E)."""
    E = len(x)
    out = [0.0] * E
    for j in range(E // 2):
        angle = position * theta ** (-2 * j / E)
        z = complex(x[j], x[j + E // 2]) * complex(math.cos(angle), math.sin(angle))
        out[j], out[j + E // 2] = z.real, z.imag
    return out
