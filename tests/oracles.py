"""A second, naive implementation of the method: loops over positions and heads, one sequence.

It imports nothing of refcurv but the law. Everything runs in the dtype of its arguments, `logits`,
`nats` and `loss` on objects too (`digits.Digits`: as many digits as one asks mpmath for); in
longdouble its derivatives are good to about 1e-13, and to 2e-11 where the function bends sharply.
`config` is anything with the attributes of a ModelConfig, `parameters` a mapping of arrays by
name. The caller cuts the padding off; sums over sequences are his too. Where the model reads
images, an image (C, H, W) stands in a sequence's place.

A sequence has loss positions t, row positions s, labels v, and nats[t, v] = −log p_t(v); a model
that pools has the one loss position 0, and the patch layer's rows are the patches. What one
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


def reached(
    label: np.ndarray, real: np.ndarray, segment: np.ndarray, causal: bool = True
) -> np.ndarray:
    """ROWS: real positions from which a label of their segment is reached: causal, at or behind."""
    out = np.zeros(label.shape, dtype=bool)
    for b, t in np.ndindex(label.shape):
        out[b, t] = real[b, t] and any(
            label[b, s] >= 0 and segment[b, s] == segment[b, t]
            for s in range(t if causal else 0, label.shape[1])
        )
    return out


# ------------------------------------------------------------------ functions of one vector


def norm(x: Array, gain: Array, eps: float) -> Array:
    """RMSNorm: gain · x / sqrt(mean(x²) + eps)."""
    return gain * x / np.sqrt((x @ x) / len(x) + eps)


def layer_norm(x: Array, gain: Array, eps: float) -> Array:
    """LayerNorm without its bias: gain · (x − mean) / sqrt(variance + eps)."""
    mean = sum(x) / len(x)
    variance = sum((one - mean) ** 2 for one in x) / len(x)
    return gain * (x - mean) / np.sqrt(variance + eps)


def silu(z: Array) -> Array:
    """z / (1 + exp(−z))."""
    return z / (1 + np.exp(-z))


def gelu(z: Array) -> Array:
    """z Φ(z), Φ the normal distribution function."""
    root = np.sqrt(number_of(z)(2))
    return z * np.array([1 + erf(one / root) for one in z], z.dtype) / 2


def gelu_tanh(z: Array) -> Array:
    """z/2 (1 + tanh(√(2/π) (z + 0.044715 z³)))."""
    number = number_of(z)
    return z / 2 * (1 + np.tanh(np.sqrt(2 / pi(number)) * (z + number(0.044715) * z**3)))


def relu(z: Array) -> Array:
    """z where it is positive, else 0."""
    return np.array([max(one, one * 0) for one in z])


def erf(x: Any) -> Any:
    """2/√π ∫₀ˣ exp(−t²) dt: Taylor's alternating series, beyond 2 Laplace's continued fraction."""
    if not isinstance(x, np.floating):
        return x.erf()
    root, eps = np.sqrt(pi(type(x))), np.finfo(type(x)).eps
    if abs(x) < 2:  # Σ (−1)ⁿ x²ⁿ⁺¹ / n! (2n + 1); terms up to 2.3
        power, total, n = x, x, 0
        while abs(power) > eps * abs(x) / 8:
            n += 1
            power = -power * x * x / n
            total += power / (2 * n + 1)
        return 2 * total / root
    # 1 − erf(x) = exp(−x²)/√π · 1 / (x + (1/2) / (x + (2/2) / (x + (3/2) / ...)))
    y = tail = abs(x)
    for n in range(100, 0, -1):
        tail = y + type(x)(n) / 2 / tail
    return np.copysign(1 - np.exp(-y * y) / (root * tail), x)


def number_of(x: Array) -> Any:
    """The kind of number that an array holds: a dtype's, or the class of its objects."""
    return x.dtype.type if x.dtype != object else type(x.flat[0])


def pi(number: Any) -> Any:
    """π in that dtype."""
    return 4 * np.arctan(number(1))


def activated(name: str, z: Array) -> Array:
    """The activation function of that name."""
    return {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}[name](z)


def soft_cap(x: Any, cap: float | None) -> Any:
    """cap · tanh(x / cap)."""
    return x if cap is None else cap * np.tanh(x / cap)


def clipped(y: Array, bound: float | None) -> Array:
    """Every entry into ±bound."""
    if bound is None:
        return y
    top = number_of(y)(bound)
    return np.array([min(max(one, -top), top) for one in y], y.dtype)


# ------------------------------------------------------------------ positions


def frequency(j: int, width: int, theta: float, scaling: Any, number: Any, length: int = 0) -> Any:
    """By what angle pair j of `width` rotary entries turns from one position to the next.

    `length`: how many positions the text has.
    """
    f = number(theta) ** (number(-2 * j) / width)
    if scaling is None:
        return f
    if scaling.kind == "longrope":
        divisor = scaling.long if length > scaling.original else scaling.short
        return f / number(divisor[j])
    if scaling.kind == "dynamic":  # another base: bloc97 and emozilla's
        if length <= scaling.original or width == 2:
            return f
        factor = number(scaling.factor)
        grown = factor * length / scaling.original - (factor - 1)
        base = number(theta) * grown ** (number(width) / (width - 2))
        return base ** (number(-2 * j) / width)
    if scaling.kind == "linear":
        return f / scaling.factor
    return llama3(f, scaling) if scaling.kind == "llama3" else yarn(j, f, width, theta, scaling)


def llama3(f: Any, scaling: Any) -> Any:
    """Long waves are stretched by the factor, short ones stay, with a ramp between (Llama 3.1)."""
    number, wave = type(f), 2 * pi(type(f)) / f
    slow, fast = number(scaling.slow), number(scaling.fast)
    if wave > scaling.original / slow:
        return f / scaling.factor
    if wave < scaling.original / fast:
        return f
    smooth = (scaling.original / wave - slow) / (fast - slow)
    return (1 - smooth) * f / scaling.factor + smooth * f


def yarn(j: int, f: Any, width: int, theta: float, scaling: Any) -> Any:
    """Peng et al. 2023 (arXiv 2309.00071), with the ramp over the pairs, as Qwen and DeepSeek do.

    The pairs up to that which turns `fast` times in the trained context stay, those from the one
    that turns `slow` times are stretched.
    """
    number = type(f)

    def pair(turns: float) -> Any:
        return (
            width
            * np.log(scaling.original / (turns * 2 * pi(number)))
            / (2 * np.log(number(theta)))
        )

    low, high = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, number(0)), min(high, number(width - 1))
    if low == high:
        high += number(0.001)
    keeps = 1 - min(max((j - low) / (high - low), 0), 1)
    return f / scaling.factor * (1 - keeps) + f * keeps


def rotate(
    x: Array, position: int, theta: float, width: int = 0, scaling: Any = None, length: int = 0
) -> Array:
    """Rotary positions on one head: of its first `width` entries (0: of all) pairs
    (j, j + width/2) turn by position · frequency j; the rest stays.
    """
    width = width or len(x)
    size = 1 if scaling is None else scaling.attention
    out = x.copy()
    for j in range(width // 2):
        angle = position * frequency(j, width, theta, scaling, number_of(x), length)
        c, s, u, v = size * np.cos(angle), size * np.sin(angle), x[j], x[j + width // 2]
        out[j], out[j + width // 2] = u * c - v * s, u * s + v * c
    return out


def sees(config: Any, i: int, segment: Sequence[int], t: int, s: int) -> bool:
    """May position t of block i attend to position s?"""
    if segment[s] != segment[t]:
        return False
    if not config.causal:
        return True
    window = config.windows[i] if config.windows else 0
    return s <= t and (window == 0 or t - s < window)


# ------------------------------------------------------------------ the transformer


def attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    scale: float | None = None,
    cap: float | None = None,
) -> Array:
    """One sequence, one number at a time: (T, H, E) with head h reading key-value head h div R."""
    T, H, E = q.shape
    R, number = H // k.shape[1], number_of(q)
    by = 1 / np.sqrt(number(E)) if scale is None else number(scale)
    out = np.zeros_like(q)
    for t in range(T):
        for h in range(H):
            keys = [s for s in range(k.shape[0]) if visible[t, s]]
            if not keys:
                continue
            score = [soft_cap(by * (q[t, h] @ k[s, h // R]), cap) for s in keys]
            weight = [np.exp(x - max(score)) for x in score]
            for e in range(E):
                total = sum(w * v[s, h // R, e] for w, s in zip(weight, keys, strict=True))
                out[t, h, e] = total / sum(weight)
    return out


def patches(image: Any, pixel: Array) -> list[Array]:
    """The image (C, H, W) cut row by row into squares, each read by channel, row and column."""
    size, out = image.patch, []
    for top in range(0, image.height, size):
        for left in range(0, image.width, size):
            out.append(
                np.array(
                    [
                        pixel[c, top + row, left + column]
                        for c in range(image.channels)
                        for row in range(size)
                        for column in range(size)
                    ]
                )
            )
    return out


@dataclass(frozen=True)
class Transformer:
    """One sequence's way through the model; vectors are kept in lists over positions."""

    config: Any
    parameters: Mapping[str, Array]
    segment: Sequence[int]
    probe: Mapping[Place, Array]
    record: MutableMapping[Place, Array]

    def linear(self, layer: str, t: int, a: Array) -> Array:
        """y = W a + b, plus the probe's vector; the input is written into the record."""
        self.record[layer, t] = a
        weight = "embed" if layer == "head" and self.config.tied else layer
        y = self.parameters[weight + ".weight"] @ a
        if layer.rpartition(".")[2] in self.config.biases:
            y = y + self.parameters[layer + ".bias"]
        return y + self.probe[layer, t] if (layer, t) in self.probe else y

    def norm(self, name: str, x: Array) -> Array:
        """RMSNorm or LayerNorm with the gain and bias of that name, where there are any."""
        config, gain = self.config, np.ones_like(x)
        if config.norm_gain:
            gain = self.parameters[name + ".weight"] + (1 if config.norm_offset else 0)
        y = (norm if config.norm == "rms" else layer_norm)(x, gain, config.norm_eps)
        return y + self.parameters[name + ".bias"] if config.norm_bias else y

    def position(self, t: int) -> int:
        """How many positions of its own segment stand before t."""
        return sum(self.segment[s] == self.segment[t] for s in range(t))

    def embedded(self, token_T: Any) -> list[Array]:
        """What the first block reads: scaled embeddings, or specials and patches; and positions."""
        config, P = self.config, self.parameters
        if config.image is None:
            x = [P["embed.weight"][token] * config.embed_scale for token in token_T]
        else:
            x = [P[name + ".weight"] for name in config.image.specials]
            pixel = token_T.astype(P["patch.weight"].dtype)
            cut = patches(config.image, pixel)
            x += [self.linear("patch", n, patch) for n, patch in enumerate(cut)]
        if config.learned_positions:
            skip, P_TD = config.position_offset, P["position.weight"]
            x = [one + P_TD[skip + self.position(t)] for t, one in enumerate(x)]
        return x

    def heads(self, at: str, name: str, t: int, a: Array) -> list[Array]:
        """q, k or v of position t by heads, clipped; q and k normalised (all, or each), turned."""
        config = self.config
        y = clipped(self.linear(at + name, t, a), config.qkv_clip)
        if name != "v" and config.qk_norm == "full":
            y = self.norm(f"{at}{name}_norm", y)
        heads = list(y.reshape(-1, config.head_width))
        if name != "v" and config.qk_norm == "head":
            heads = [self.norm(f"{at}{name}_norm", head) for head in heads]
        i = int(at.split(".")[1])
        kind = config.rotary[i] if config.rotary else "main"
        if name == "v" or kind == "none" or config.rope_theta is None:
            return heads
        theta = config.local_theta if kind == "local" else config.rope_theta
        scaling = None if kind == "local" else config.rope_scaling
        length = sum(s == self.segment[t] for s in self.segment)
        turning = theta, config.rope_width or 0, scaling, length
        return [rotate(head, self.position(t), *turning) for head in heads]

    def attn(self, i: int, x: list[Array]) -> list[Array]:
        """o · attention over what each position sees."""
        T, at, config = range(len(x)), f"blocks.{i}.attn.", self.config
        q, k, v = (np.array([self.heads(at, name, t, x[t]) for t in T]) for name in "qkv")
        visible = np.array([[sees(config, i, self.segment, t, s) for s in T] for t in T])
        context = attention(q, k, v, visible, config.score_scale, config.score_cap)
        return [self.linear(at + "o", t, context[t].ravel()) for t in T]

    def mlp(self, i: int, x: list[Array]) -> list[Array]:
        """down · (f(gate · x) × (up · x)), or down · f(up · x), position by position."""
        at, f, out = f"blocks.{i}.mlp.", self.config.activation, []
        for t, a in enumerate(x):
            up = self.linear(at + "up", t, a)
            if self.config.gated:
                h = activated(f, self.linear(at + "gate", t, a)) * up
            else:
                h = activated(f, up)
            out.append(self.linear(at + "down", t, h))
        return out

    def before(self, name: str, x: list[Array]) -> list[Array]:
        """The norm before attention or MLP."""
        if self.config.norm_place == "post":
            return x
        return [self.norm(name + "_norm", one) for one in x]

    def behind(self, name: str, x: list[Array]) -> list[Array]:
        """The norm behind attention or MLP."""
        if self.config.norm_place == "pre":
            return x
        part = "_post_norm" if self.config.norm_place == "both" else "_norm"
        return [self.norm(name + part, one) for one in x]

    def block(self, i: int, x: list[Array]) -> list[Array]:
        """x + attention + MLP, which reads the sum so far, or x too, by itself or as normalised."""
        at = f"blocks.{i}."
        a = self.before(at + "attn", x)
        y = plus(x, self.behind(at + "attn", self.attn(i, a)))
        read = x if self.config.residual == "parallel" else y
        m = a if self.config.residual == "shared" else self.before(at + "mlp", read)
        return plus(y, self.behind(at + "mlp", self.mlp(i, m)))

    def pooled(self, x: list[Array]) -> list[Array]:
        """What the head reads: every position, the first, or the mean of all."""
        return {"none": x, "cls": x[:1], "mean": [sum(x) / len(x)]}[self.config.pool]


def plus(x: list[Array], y: list[Array]) -> list[Array]:
    """Position by position."""
    return [one + two for one, two in zip(x, y, strict=True)]


def logits(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Any,
    segment_T: Sequence[int] | None = None,
    probe: Mapping[Place, Array] | None = None,
    record: MutableMapping[Place, Array] | None = None,
) -> Array:
    """(T, V) of one sequence, (1, V) of one image: input → blocks → final norm → pool → head.

    `probe` adds vectors to outputs of linear layers, y_s = W a_s + b + probe[layer, s]; an empty
    dict given as `record` is filled with the a_s.
    """
    if config.image is not None:
        segment = [0] * (len(config.image.specials) + len(patches(config.image, token_T)))
    else:
        segment = [0] * len(token_T) if segment_T is None else list(segment_T)
    record = {} if record is None else record
    model = Transformer(config, parameters, segment, probe or {}, record)
    x = model.embedded(token_T)
    for i in range(config.layers):
        x = model.block(i, x)
    final = model.pooled([model.norm("final_norm", one) for one in x])
    return np.array(
        [soft_cap(model.linear("head", t, one), config.logit_cap) for t, one in enumerate(final)]
    )


def nats(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Any,
    segment_T: Sequence[int] | None = None,
    probe: Mapping[Place, Array] | None = None,
) -> Array:
    """(T, V): −log softmax(logits); the probabilities are exp of minus this."""
    z_TV = logits(config, parameters, token_T, segment_T, probe)
    return np.array([np.log(np.exp(z - max(z)).sum()) + max(z) - z for z in z_TV])


def loss(
    config: Any,
    parameters: Mapping[str, Array],
    token_T: Any,
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
    token_T: Any,
    segment_T: Sequence[int] | None = None,
) -> Rows:
    """Inputs by the record, output gradients by central differences on the probe."""
    record: dict[Place, Array] = {}
    logits(config, parameters, token_T, segment_T, None, record)
    S = range(sum(name == layer for name, _ in record))
    a_SI = np.array([record[layer, s] for s in S])
    width = config.vocabulary if layer == "head" else len(parameters[layer + ".weight"])

    def moved(delta_SO: Array) -> Array:
        return nats(config, parameters, token_T, segment_T, {(layer, s): delta_SO[s] for s in S})

    return Rows(a_SI, jacobian(moved, np.zeros((len(a_SI), width), a_SI.dtype)))


def worlds(
    p_TV: Array,
    label_T: Sequence[int],
    kind: str,
    per: str = "segment",
    drawn: Sequence[Any] = (),
    segment_T: Sequence[int] | None = None,
) -> list[World]:
    """FISHER: what is carried back, and how much its square counts; labelled positions only.

    `expected`: every entry of every position by itself, by its probability. `empirical`: the
    corpus's labels. `sampled`: each draw's labels, (T,). `signed`: each draw's signs ε, (T, V), as
    Σ_v ε_v √p_v nats[t, v]. The last three carry a segment at once, or with per="term" each t;
    without `segment_T` the sequence is one.
    """
    segment = [0] * len(label_T) if segment_T is None else segment_T
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
    assert per == "segment", per
    return [
        (weight, {at: c for t in labelled if segment[t] == s for at, c in draw[t].items()})
        for draw in terms
        for s in dict.fromkeys(segment)
    ]


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
    token_T: Any,
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
    token_T: Any,
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
    lam, mu = ([float(x) * 2.0 ** (1 - math.frexp(s[0])[1]) for x in s] for s in (lam, mu))
    lam = np.array(lam)
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
