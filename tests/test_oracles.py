"""The oracles, judged by hand numbers and by each other; then the package, judged by them."""

from __future__ import annotations

import ast
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import budgets
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, few, random_parameters
from test_transformer import ANY, budget

import refcurv as rc
from refcurv.law import tolerance
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import Image, NormPlace, QKNorm, RopeScaling
from refcurv.model.gradient import head_backward, loss_and_gradient
from refcurv.passes.shards import shards
from refcurv.passes.sweep import Sweep, sweep

WIDE = np.longdouble
EPS = float(np.finfo(WIDE).eps)

DIFFERENCE = 1024 * EPS ** (3 / 4)
"""`oracles.jacobian`, h = eps^(1/4): h⁴ f⁗' / 30 and u f / h, together within 1024 of f'.

6.1e-12 in longdouble; observed at most 27 % of it (where f bends sharply: a query or key whose
gradient nearly cancels), else below 3 %. The nearest wrong Fisher is 0.05 away.
"""

SECOND = 1024 * EPS ** (3 / 5)
"""`oracles.hessian`, h = eps^(1/5): u f / h², within 1024 of f''; 4.2e-9, observed 0.5 % of it."""


def tiny(seed: int = 0, length: int = 4, **changes: Any) -> Case:
    """One sequence; grouped queries, four labels, one block."""
    small = dict(vocabulary=4, width=4, layers=1, heads=2, kv_heads=1, mlp_width=3, norm_eps=1e-3)
    return case(seed, batch=1, length=length, **(small | changes))


def documents(one: Case, segment: Sequence[int], label: Sequence[int]) -> Case:
    """The same sequence, cut into documents, with labels of its own."""
    own = np.array([segment]), np.array([label])
    return Case(one.config, one.parameters, one.token, one.real, *own)


def picture(image: Image, patch_nI: np.ndarray) -> np.ndarray:
    """The image (C, H, W) that these patches were cut from, one pixel at a time."""
    pixel = np.zeros((image.channels, image.height, image.width))
    across = image.width // image.patch
    for c, y, x in np.ndindex(pixel.shape):
        n = y // image.patch * across + x // image.patch
        inside = y % image.patch * image.patch + x % image.patch
        pixel[c, y, x] = patch_nI[n, c * image.patch**2 + inside]
    return pixel


class One:
    """What the oracles say of a one-sequence or one-image case, in longdouble."""

    def __init__(self, one: Case) -> None:
        self.config, self.parameters = one.config, one.astype(WIDE)
        self.token, self.segment, self.label = one.token[0], one.segment[0], one.label[0]
        if one.config.image is not None:
            self.token = picture(one.config.image, one.token[0])
        self.record: dict[oracles.Place, np.ndarray] = {}
        self.logits = self.forward(self.parameters, self.record)
        self.p = np.exp(-oracles.nats(self.config, self.parameters, self.token, self.segment))
        label = np.broadcast_to(one.label, one.real.shape)  # of an image: one
        causal = one.config.causal
        self.reached = oracles.reached(label, one.real, one.segment, causal)[0]
        self.layers = list(one.config.linear_layers())
        self.rows = cache(self._rows)

    def forward(self, parameters: dict[str, np.ndarray], record: Any = None) -> np.ndarray:
        return oracles.logits(self.config, parameters, self.token, self.segment, record=record)

    def inputs(self, layer: str, parameters: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """What the layer reads, row by row."""
        record = self.record
        if parameters is not None:
            self.forward(parameters, record := {})
        return np.array([a for (name, _), a in record.items() if name == layer])

    def _rows(self, layer: str) -> oracles.Rows:
        return oracles.rows(self.config, self.parameters, layer, self.token, self.segment)

    def kept(self, layer: str) -> np.ndarray:
        """Which of its rows count: patches stand behind the specials, a pooled head alone."""
        return self.reached[len(self.reached) - len(self.inputs(layer)) :]

    def worlds(self, kind: str, per: str = "segment", drawn: Any = ()) -> list[oracles.World]:
        return oracles.worlds(self.p, self.label, kind, per, drawn)

    def fisher(self, layer: str, some: list[oracles.World]) -> np.ndarray:
        return oracles.fisher(oracles.weight_slopes(self.rows(layer)), some)

    def kfac(self, layer: str, some: list[oracles.World]) -> np.ndarray:
        return oracles.kfac(*oracles.factor_sums(self.rows(layer), some, self.kept(layer)))

    def ggn(self, names: Sequence[str]) -> np.ndarray:
        return oracles.ggn(
            self.config, self.parameters, names, self.token, self.label, self.segment
        )

    def loss(self, names: Sequence[str]) -> Callable[[np.ndarray], Any]:
        return lambda x: oracles.loss(
            self.config,
            oracles.placed(self.parameters, names, x),
            self.token,
            self.label,
            self.segment,
        )

    def gradient(self, name: str) -> np.ndarray:
        x = oracles.flat(self.parameters, [name])
        return oracles.gradient(self.loss([name]), x).reshape(self.parameters[name].shape)


@cache
def post_norm() -> One:
    """OLMo-2's order: two documents, a label missing inside, the last position without one."""
    return One(documents(tiny(), [0, 0, 0, 1], [2, -1, 1, 3]))


@cache
def pre_norm() -> One:
    return One(tiny(3, norm_place=NormPlace.PRE, qk_norm=QKNorm.HEAD, tied=True))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# ------------------------------------------------------------------ what they may stand on


def foreign(source: str) -> list[str]:
    """Imports of `source` that are neither the standard library, NumPy nor the law."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name) and node.id in ("__import__", "importlib", "eval", "exec"):
            names.append(node.id)
    own = sys.stdlib_module_names | {"numpy"}
    return [n for n in names if n.split(".")[0] not in own and not f"{n}.".startswith(LAW)]


LAW = "refcurv.law."


def test_oracles_import_nothing_of_the_package_but_the_law() -> None:
    assert foreign(Path(oracles.__file__).read_text()) == []
    for planted in (
        "from refcurv.model import layers",
        "import refcurv",
        "from refcurv import law",
        "def f():\n    import refcurv.lawless",
        "from . import strategies",
        "__import__('refcurv')",
    ):
        assert foreign(planted), planted


# ------------------------------------------------------------------ hand numbers


def test_norms_and_activations_by_hand() -> None:
    x = np.array([1.0, 7.0])
    assert np.allclose(oracles.norm(x, np.array([1.0, 2.0]), 0.0), [0.2, 2.8])
    assert np.allclose(oracles.norm(np.array([1.0, 1.0]), np.ones(2), 3.0), [0.5, 0.5])
    # mean 4, variance 9
    assert np.allclose(oracles.layer_norm(x, np.array([1.0, 2.0]), 0.0), [-1, 2])
    assert np.allclose(oracles.layer_norm(x, np.ones(2), 16.0), [-0.6, 0.6])
    assert np.allclose(oracles.silu(np.array([0.0, math.log(3)])), [0, 0.75 * math.log(3)])
    z = np.array([-3.0, -0.1, 0.0, 0.5, 2.0])
    assert (oracles.relu(z) == [0, 0, 0, 0.5, 2]).all()
    want = [one * (1 + math.erf(one / math.sqrt(2))) / 2 for one in z]
    assert np.allclose(oracles.gelu(z), want, rtol=1e-15, atol=0)
    inside = [math.sqrt(2 / math.pi) * (one + 0.044715 * one**3) for one in z]
    want = [one * (1 + math.tanh(u)) / 2 for one, u in zip(z, inside, strict=True)]
    assert np.allclose(oracles.gelu_tanh(z), want, rtol=1e-14, atol=0)
    assert oracles.soft_cap(3.0, 2.0) == 2 * np.tanh(1.5)
    assert (oracles.clipped(z, 1.0) == [-1, -0.1, 0, 0.5, 1]).all()


def test_erf_in_longdouble() -> None:
    """Its differences are 2/√π exp(−x²), across the change of method at 2, and it is odd."""
    for at in (0, 0.3, 1.9999, 2, 2.5, 5):
        x = np.array([at], dtype=WIDE)
        want = 2 / np.sqrt(oracles.pi(WIDE)) * np.exp(-x * x)
        slope = oracles.gradient(lambda x: oracles.erf(x[0]), x)
        assert_within(slope, want, DIFFERENCE, want + oracles.erf(x[0]) / 1024, f"erf'({at})")
        assert oracles.erf(-x[0]) == -oracles.erf(x[0])
    # erf(1) and erf(3), Abramowitz & Stegun 7.1 to 20 digits
    for at, digits in ((1, "0.84270079294971486934"), (3, "0.99997790950300141456")):
        assert abs(oracles.erf(WIDE(at)) - WIDE(digits)) <= 4 * EPS
    assert abs(math.erf(0.7) - oracles.erf(WIDE(0.7))) <= np.finfo(np.float64).eps


def test_rotary_by_hand() -> None:
    """E = 4, theta = 100: pair (0, 2) turns by t, pair (1, 3) by t/10."""
    x = np.array([1.0, 0.0, 0.0, 1.0])
    want = [math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)]
    assert np.allclose(oracles.rotate(x, 2, 100.0), want, rtol=1e-15)
    # of 6 entries the first 4
    got = oracles.rotate(np.array([1.0, 0.0, 0.0, 1.0, 5.0, 7.0]), 2, 100.0, 4)
    assert np.allclose(got, [*want, 5, 7], rtol=1e-15)
    linear = RopeScaling(kind="linear", factor=4.0, attention=3.0)
    want = [3 * math.cos(0.5), -3 * math.sin(0.05), 3 * math.sin(0.5), 3 * math.cos(0.05)]
    assert np.allclose(oracles.rotate(x, 2, 100.0, scaling=linear), want, rtol=1e-15)


def test_who_sees_whom_by_hand() -> None:
    segment, config = [0, 0, 0, 1, 1], SimpleNamespace(causal=True, windows=(2, 0))

    def seen(i: int) -> list[str]:
        S = range(5)
        return [
            "".join("x" if oracles.sees(config, i, segment, t, s) else "." for s in S) for t in S
        ]

    assert seen(0) == ["x....", "xx...", ".xx..", "...x.", "...xx"]
    assert seen(1) == ["x....", "xx...", "xxx..", "...x.", "...xx"]
    config.causal, config.windows = False, ()
    assert seen(0) == ["xxx..", "xxx..", "xxx..", "...xx", "...xx"]


def test_patches_by_hand() -> None:
    """Two channels of 2 x 4 pixels: two patches, each channel by channel and row by row."""
    image = Image(channels=2, height=2, width=4, patch=2)
    pixel = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]])
    left, right = oracles.patches(image, pixel)
    assert left.tolist() == [0, 1, 4, 5, 10, 11, 14, 15]
    assert right.tolist() == [2, 3, 6, 7, 12, 13, 16, 17]
    assert (picture(image, np.array([left, right])) == pixel).all()


def test_attention_by_hand() -> None:
    """E = 4, so scores are halved: (ln 3, 0) weighs the values 3/4 and 1/4."""
    q, k = np.zeros((2, 2, 4)), np.zeros((2, 1, 4))
    q[1, 1, 0], k[0, 0, 0] = 2 * math.log(3), 1
    v = np.array([[[8.0, 0, 0, 0]], [[0, 4.0, 0, 0]]])
    got = oracles.attention(q, k, v, np.tril(np.ones((2, 2), dtype=bool)))
    assert np.allclose(got[0], [[8, 0, 0, 0]] * 2)  # a key of its own
    assert np.allclose(got[1], [[4, 2, 0, 0], [6, 1, 0, 0]])  # a flat head, a peaked one


def test_the_blocks_by_hand() -> None:
    """q = k = 0 and v = o = 1: x_1 + the mean of the normed x_0, x_1 of its own document."""
    one = tiny(
        length=2, width=2, heads=1, head_width=2, mlp_width=1, norm_place=NormPlace.PRE,
        qk_norm=QKNorm.NONE, norm_eps=0.0, vocabulary=2,
    )  # fmt: skip
    P = {name: np.zeros_like(array) for name, array in one.parameters.items()}
    for name in ("attn.v", "attn.o"):
        P[f"blocks.0.{name}.weight"] = np.eye(2)
    for name in ("blocks.0.attn_norm", "blocks.0.mlp_norm", "final_norm"):
        P[f"{name}.weight"] = np.full(2, 5.0)
    P["embed.weight"], P["head.weight"] = np.array([[1.0, 7], [7, 1]]), np.eye(2)

    def final(segment: list[int]) -> np.ndarray:
        return oracles.logits(one.config, P, [0, 1], segment)

    # the norm leaves (1, 7) and (7, 1) as they are; position 1 reads the mean (4, 4) of both
    rms = math.sqrt((11**2 + 5**2) / 2)
    assert np.allclose(final([0, 0]), [[1, 7], [5 * 11 / rms, 5 * 5 / rms]])
    assert np.allclose(final([0, 1]), [[1, 7], [7, 1]])
    # MLP: silu(gate) up = silu(ln 3) · 2 = 1.5 ln 3 is added to the first coordinate of (2, 14)
    P["blocks.0.mlp.gate.weight"] = np.array([[math.log(3), 0.0]])
    P["blocks.0.mlp.up.weight"] = np.array([[2.0, 0.0]])
    P["blocks.0.mlp.down.weight"] = np.array([[1.0], [0.0]])
    x, y = 2 + 1.5 * math.log(3), 14
    rms = math.sqrt((x**2 + y**2) / 2)
    assert np.allclose(final([0, 1])[0], [5 * x / rms, 5 * y / rms])


def test_O8_softmax_regression_by_hand() -> None:
    """No blocks, a = (1, 7), p = (3/4, 1/4): F = (3/16) [[1, −1], [−1, 1]] ⊗ a aᵀ."""
    whole = tiny(vocabulary=2, norm_eps=0.0).config
    config = SimpleNamespace(**{f.name: getattr(whole, f.name) for f in fields(whole)})
    config.layers = 0
    P = {
        "embed.weight": np.array([[9.0, 9.0], [1.0, 7.0]]).astype(WIDE),
        "final_norm.weight": np.array([5.0, 5.0]).astype(WIDE),
        "head.weight": np.array([[math.log(3), 0.0], [0.0, 0.0]]).astype(WIDE),
    }
    nats = oracles.nats(config, P, [1])
    assert np.allclose(nats.astype(float), [[math.log(4 / 3), math.log(4)]], rtol=1e-15)
    assert oracles.loss(config, P, [1], [1]) == nats[0, 1]
    rows = oracles.rows(config, P, "head", [1])
    assert np.allclose(rows.a_SI.astype(float), [[1, 7]], rtol=1e-15)
    assert np.allclose(rows.g_TVSO[0, :, 0].astype(float), [[-0.25, 0.25], [0.75, -0.75]])
    want = np.array(
        [[3, 21, -3, -21], [21, 147, -21, -147], [-3, -21, 3, 21], [-21, -147, 21, 147]]
    ) / WIDE(16)
    worlds = oracles.worlds(np.exp(-nats), [0], "expected")
    assert [back for _, back in worlds] == [{(0, 0): 1}, {(0, 1): 1}]
    sums = oracles.factor_sums(rows, worlds, np.array([True]))
    for what, got in {
        "F": oracles.fisher(oracles.weight_slopes(rows), worlds),
        "F_tok": oracles.f_tok(rows, worlds),
        "K": oracles.kfac(*sums),
        "GGN": oracles.ggn(config, P, ["head.weight"], [1], [0]),
    }.items():
        assert_within(got, want, DIFFERENCE, want, what)


def test_kron_by_hand_and_by_numpy(rng: np.random.Generator) -> None:
    got = oracles.kron(np.array([[1, 2], [3, 4]]), np.array([[0, 1], [5, 6]]))
    assert (got == [[0, 1, 0, 2], [5, 6, 10, 12], [0, 3, 0, 4], [15, 18, 20, 24]]).all()
    G, A = rng.normal(size=(3, 3)), rng.normal(size=(2, 2))
    assert (oracles.kron(G, A) == np.kron(G, A)).all()


def test_differences_by_hand() -> None:
    """f = x³ y at (2, 3): gradient (36, 8), Hessian [[36, 12], [12, 0]]."""

    def f(x: np.ndarray) -> Any:
        return x[0] ** 3 * x[1]

    def slope(x: np.ndarray) -> np.ndarray:
        return np.array([3 * x[0] ** 2 * x[1], x[0] ** 3])

    x = np.array([2.0, 3.0], dtype=WIDE)
    H = np.array([[36.0, 12.0], [12.0, 0.0]])
    assert_within(oracles.gradient(f, x), [36, 8], DIFFERENCE, [36, 8], "gradient")
    assert_within(oracles.jacobian(slope, x), H, DIFFERENCE, H, "differences of a gradient")
    assert_within(oracles.hessian(f, x), H, SECOND, H, "differences of differences")
    M = np.arange(6.0).reshape(2, 3).astype(WIDE)
    got = oracles.jacobian(lambda W: np.outer(W @ [1, 2, 3], [1, 10]), M)
    assert got.shape == (2, 2, 2, 3)
    assert_within(got[1, 1], [[0, 0, 0], [10, 20, 30]], DIFFERENCE, 10, "shape of f, then of x")


def test_jacobi_by_hand() -> None:
    """ORDER: descending; the largest entry positive, the first one where two are as large."""
    values, U = oracles.jacobi_eigh(np.array([[2.0, -1.0], [-1.0, 2.0]]))
    assert np.allclose(values, [3, 1])
    assert np.allclose(U * math.sqrt(2), [[1, 1], [-1, 1]])
    values, U = oracles.jacobi_eigh(np.array([[0.0, 2.0], [2.0, 3.0]]))
    assert np.allclose(values, [4, -1])
    assert np.allclose(U * math.sqrt(5), [[1, 2], [2, -1]])
    values, U = oracles.jacobi_eigh(np.diag([1.0, 3.0, 2.0]))
    assert (values == [3, 2, 1]).all()
    assert (U == np.eye(3)[:, [1, 2, 0]]).all()
    with pytest.raises(AssertionError):
        oracles.jacobi_eigh(np.array([[1.0, 2.0], [0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [np.float64, WIDE], ids=["float64", "longdouble"])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_jacobi_diagonalises_and_agrees_with_numpy(dtype: Any, rank: int) -> None:
    """observed: 13 % of the budget; in longdouble |UᵀU − 1| is 1e-18 at most, entry by entry."""
    rng = np.random.default_rng(rank)
    X = rng.normal(size=(9, rank)).astype(dtype)
    M = X @ X.T
    M = (M + M.T) / 2
    values, U = oracles.jacobi_eigh(M)
    assert values.dtype == U.dtype == dtype
    within = tolerance.eigenpair(9, dtype)
    assert_within(U.T @ U, np.eye(9), within, np.eye(9), "orthogonality")
    assert_within(M @ U, U * values, within, M, "residual")
    want = np.linalg.eigvalsh(M.astype(np.float64))[::-1]
    assert_within(values, want, tolerance.eigenpair(9) + EPS, want, "values")
    assert (np.diff(values) <= 0).all()
    assert (np.take_along_axis(U, np.abs(U).argmax(axis=0)[None], axis=0) > 0).all()


def test_the_edit_by_hand(rng: np.random.Generator) -> None:
    W = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert (oracles.edited(W, np.eye(2), np.eye(3), [3, 1]) == [[1, 2, 3], [4, 0, 0]]).all()
    turned = oracles.edited(W, np.eye(2)[:, ::-1], np.eye(3), [2, 0])
    assert (turned == [[0, 0, 0], [4, 5, 0]]).all()  # the first column of U_G is e_2
    U_G, U_A = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (2, 3))
    once = oracles.edited(W, U_G, U_A, [2, 1])
    C = U_G.T @ W @ U_A * [[1, 1, 0], [1, 0, 0]]
    assert_within(once, U_G @ C @ U_A.T, tolerance.gamma(16, np.float64), W, "U_G (C ∘ M) U_Aᵀ")


def test_worlds_by_hand() -> None:
    p = np.array([[0.25, 0.75], [0.5, 0.5], [0.0625, 0.9375]])
    label, labels, signs = [1, -1, 0], [[0, -1, 0], [1, -1, 1]], [[[1, -1], [1, 1], [-1, -1]]]
    assert oracles.worlds(p, label, "expected") == [
        (0.25, {(0, 0): 1}), (0.75, {(0, 1): 1}), (0.0625, {(2, 0): 1}), (0.9375, {(2, 1): 1})
    ]  # fmt: skip
    assert oracles.worlds(p, label, "empirical") == [(1, {(0, 1): 1, (2, 0): 1})]
    assert oracles.worlds(p, label, "empirical", "term") == [(1, {(0, 1): 1}), (1, {(2, 0): 1})]
    assert oracles.worlds(p, label, "sampled", drawn=labels) == [
        (0.5, {(0, 0): 1, (2, 0): 1}), (0.5, {(0, 1): 1, (2, 1): 1})
    ]  # fmt: skip
    assert oracles.worlds(p, label, "sampled", "term", labels[1:]) == [
        (1, {(0, 1): 1}), (1, {(2, 1): 1})
    ]  # fmt: skip
    at_0 = {(0, 0): 0.5, (0, 1): -math.sqrt(0.75)}
    at_2 = {(2, 0): -0.25, (2, 1): -math.sqrt(0.9375)}
    assert oracles.worlds(p, label, "signed", drawn=signs) == [(1, at_0 | at_2)]
    assert oracles.worlds(p, label, "signed", "term", signs) == [(1, at_0), (1, at_2)]


def test_drawn_labels_and_signs_by_hand() -> None:
    """A flat row takes the half its uniform lies in; word 0 of a block is entries 0 to 63."""
    u = [oracles.uniform(5, 0, 3, t) for t in range(6)]
    got = oracles.drawn_labels(np.zeros((6, 2)), [1, 0, -1, 1, 1, 1], 5, 0, 3)
    assert got == [int(x >= 0.5) if t != 2 else -1 for t, x in enumerate(u)]
    assert {0, 1} <= set(got)
    words = oracles.philox4x64([1, 3, 1, 7], [5, 0]) + oracles.philox4x64([2, 3, 1, 7], [5, 0])
    bits = [word >> b & 1 for word in words for b in range(64)]
    assert oracles.signs(5, 1, 7, 2, 300) == [2 * bit - 1 for bit in bits[:300]]


# ------------------------------------------------------------------ judged by each other


@pytest.mark.parametrize("made", [post_norm, pre_norm])
def test_O29_gradient_of_W_is_the_sum_over_rows(made: Callable[[], One]) -> None:
    """Two ways of differentiating: through the probe and the record, and through W itself."""
    one = made()
    total = {}
    for layer in one.layers:
        rows = one.rows(layer)
        [(_, back)] = one.worlds("empirical")
        g_SO = oracles.carried(rows.g_TVSO, back)
        assert (g_SO[~one.reached] == 0).all()
        total[layer] = sum(np.outer(g, a) for g, a in zip(g_SO, rows.a_SI, strict=True))
    for layer in one.layers[:-1] if one.config.tied else one.layers:
        want = one.gradient(f"{layer}.weight")
        assert_within(total[layer], want, DIFFERENCE, want, layer)
    if one.config.tied:  # the embedding gets what the head gets, and more
        embedded = one.gradient("embed.weight") - total["head"]
        unseen = np.setdiff1d(np.arange(one.config.vocabulary), one.token)
        assert_within(embedded[unseen], np.zeros_like(embedded[unseen]), DIFFERENCE, 1, "unseen")
        assert np.abs(embedded[one.token[0]]).max() > 1e-3


@pytest.mark.parametrize("made", [post_norm, pre_norm])
def test_O11_expected_fisher_is_the_ggn(made: Callable[[], One]) -> None:
    """Per layer by the rows; over every parameter at once, tied or not, by the parameters."""
    one, names = made(), list(made().parameters)
    some = one.worlds("expected")
    slope = oracles.parameter_slopes(one.config, one.parameters, names, one.token, one.segment)
    F, ggn = oracles.fisher(slope, some), one.ggn(names)
    assert_within(F, ggn, DIFFERENCE, ggn, "all parameters")
    begin = 0
    for name in names:
        end, layer = begin + one.parameters[name].size, name.removesuffix(".weight")
        if layer in one.layers:
            block = ggn[begin:end, begin:end]
            assert_within(one.fisher(layer, some), block, 2 * DIFFERENCE, block, layer)
        begin = end
    assert apart(oracles.fisher(slope, one.worlds("empirical")), ggn) > 0.1


@cache
def small() -> One:
    """Positions 1 and 2 with three labels each: few enough to list all that can be drawn."""
    one = One(documents(tiny(2, length=3, vocabulary=3, width=3), [0] * 3, [-1, 0, 2]))
    assert len(set(one.token)) > 1  # else there is nothing to choose from
    return one


MIXING = pytest.mark.parametrize("layer", ["blocks.0.attn.k", "blocks.0.attn.v", "head"])


@MIXING
@pytest.mark.parametrize("per", ["segment", "term"])
def test_O12_sampling_averages_to_the_expected_fisher(layer: str, per: str) -> None:
    """Every joint label of the sequence, by its probability."""
    one = small()
    want = one.fisher(layer, one.worlds("expected"))
    got = np.zeros_like(want)
    for y in itertools.product(range(3), repeat=2):
        chance = one.p[1, y[0]] * one.p[2, y[1]]
        got += chance * one.fisher(layer, one.worlds("sampled", per, [[-1, *y]]))
    assert_within(got, want, DIFFERENCE, want, layer)


@pytest.mark.parametrize("layer", ["blocks.0.attn.k", "blocks.0.attn.v"])
def test_O13_signs_average_to_the_expected_fisher(layer: str) -> None:
    """Over all 64 sign patterns; one sign for every position does not: it adds cross terms."""
    one = small()
    want = one.fisher(layer, one.worlds("expected"))
    patterns = np.array(list(itertools.product([-1, 1], repeat=6))).reshape(-1, 2, 3)[:, [0, 0, 1]]
    got = one.fisher(layer, one.worlds("signed", drawn=patterns))
    assert_within(got, want, DIFFERENCE, want, layer)
    joint = patterns[:, [0, 1, 1]]
    assert apart(one.fisher(layer, one.worlds("signed", drawn=joint)), want) > 0.05
    assert apart(one.fisher(layer, one.worlds("signed", "term", joint)), want) < DIFFERENCE


@MIXING
def test_the_empirical_fisher_of_a_sequence_is_its_gradient_squared(layer: str) -> None:
    one = small()
    d = one.gradient(f"{layer}.weight").ravel()
    got = one.fisher(layer, one.worlds("empirical"))
    assert_within(got, np.outer(d, d), 2 * DIFFERENCE, np.outer(d, d), layer)
    assert apart(one.fisher(layer, one.worlds("empirical", "term")), np.outer(d, d)) > 0.05


@pytest.mark.parametrize("kind", ["expected", "empirical"])
def test_O1_one_position_makes_kfac_exact(kind: str) -> None:
    one = One(tiny(length=1, norm_place=NormPlace.PRE))
    one.label = [1]
    one.reached[:] = True
    for layer in one.layers:
        some = one.worlds(kind)
        F, K = one.fisher(layer, some), one.kfac(layer, some)
        if layer.endswith((".q", ".k")):  # one key: nothing to choose from
            assert np.abs(F).max() == np.abs(K).max() == 0
            continue
        assert_within(K, F, 16 * EPS, F, layer)
        tok = oracles.f_tok(one.rows(layer), some)
        assert_within(tok, F, 16 * EPS, F, layer)


def test_O38_in_the_last_block_positions_do_not_mix() -> None:
    one = post_norm()
    some = one.worlds("expected")
    for layer in one.layers:
        F, tok = one.fisher(layer, some), oracles.f_tok(one.rows(layer), some)
        if layer.endswith((".k", ".v")):
            assert apart(tok, F) > 0.05, layer
        else:
            assert_within(tok, F, 64 * EPS, F, layer)
        assert apart(one.kfac(layer, some), F) > 0.05, layer


def test_O18_O20_traces() -> None:
    one = post_norm()
    some = one.worlds("expected")
    for layer in one.layers:
        rows = one.rows(layer)
        a2 = (rows.a_SI**2).sum(axis=1)
        g2 = sum(w * (oracles.carried(rows.g_TVSO, x) ** 2).sum(axis=1) for w, x in some)
        assert_within(oracles.f_tok(rows, some).trace(), (a2 * g2).sum(), 64 * EPS, 1, layer)
        n = one.reached.sum()
        K = a2[one.reached].sum() * g2[one.reached].sum() / n
        assert_within(one.kfac(layer, some).trace(), K, 64 * EPS, K, layer)


def test_O10_hessian_of_the_head_is_its_ggn() -> None:
    """Not so for a gate; both by differences of the loss alone, and of its gradient."""
    one = One(documents(tiny(length=2, width=3, vocabulary=3, mlp_width=2), [0, 0], [1, 0]))
    for name, equal in (("head.weight", True), ("blocks.0.mlp.gate.weight", False)):
        f, x = one.loss([name]), oracles.flat(one.parameters, [name])
        H, ggn = oracles.hessian(f, x), one.ggn([name])
        assert_within(H, H.T, SECOND, H, name)
        if equal:
            assert_within(H, ggn, SECOND, ggn, name)
        else:
            assert apart(H, ggn) > 0.05


# ------------------------------------------------------------------ the package, judged


def moved(one: Case, f: Callable[[dict[str, np.ndarray]], np.ndarray], seed: int) -> np.ndarray:
    """|∂f| per unit of relative change in every parameter, plus |f|: the condition of f.

    A rounding in the forward is such a change of one product. The largest of four random ones.
    """
    rng, step, wide = np.random.default_rng(seed), WIDE(1e-9), one.astype(WIDE)
    here = f(wide)
    size = np.abs(here)
    for _ in range(4):
        near = {name: x * (1 + step * rng.choice([-1, 1], x.shape)) for name, x in wide.items()}
        size = np.maximum(size, np.abs(f(near) - here) / step)
    return size + np.abs(here)


def compare_logits(one: Case) -> float:
    """The package's logits and nats of the real positions are the oracle's.

    Returns the largest share of the budget.
    """
    share = 0.0
    for b, s in enumerate(sequences(one)):
        scale, real = moved(one, s.forward, b), one.real[b] if one.config.image is None else [True]
        nats = oracles.loss(s.config, s.parameters, s.token, s.label, s.segment)
        for dtype in (np.float64, WIDE):
            parameters, within = one.astype(dtype), budget(one, dtype) + budget(one, WIDE)
            final, _ = transformer.forward(one.config, parameters, one.token, one.layout)
            got = transformer.head_logits(one.config, parameters, final)
            assert got.dtype == dtype
            share = max(share, assert_within(got[b, real], s.logits, within, scale, "logits"))
            rows = one.config, parameters, final, one.label, one.label >= 0
            loss = transformer.drain(head_backward(*rows), lambda step: None)
            # log Σ exp z − z_v moves by at most twice what the logits move by
            assert_within(loss.nats_BT[b].sum(), nats, within, 2 * scale.sum(), "loss")
    return share


@few(20)
@given(ANY)
def test_the_forward_is_the_oracle(one: Case) -> None:
    """All architectures, padding, documents, float64, longdouble; observed 1.3 % of the budget."""
    compare_logits(one)


SEED = 2**40 + 7


def bend(s: One) -> float:
    """How far from where it bends the nearest argument of a ReLU or of the clip lies."""
    near, config = np.inf, s.config
    for (layer, _), a in s.record.items():
        name = layer.rpartition(".")[2]
        y = s.parameters[config.weight_of(layer)] @ a + s.parameters.get(f"{layer}.bias", 0)
        if name in ("q", "k", "v") and config.qkv_clip is not None:
            near = min(near, np.abs(np.abs(y) - config.qkv_clip).min())
        if name == ("gate" if config.gated else "up") and config.activation == "relu":
            near = min(near, np.abs(y).min())
    return float(near)


def corpus_of(one: Case, each: Sequence[One]) -> rc.Corpus:
    """A case's batch as a corpus: tokens, or the images that its patches were cut from."""
    if one.config.image is not None:
        return rc.Corpus(images=np.stack([s.token for s in each]), labels=one.label[:, 0])
    return rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)


def swept(
    one: Case, corpus: rc.Corpus, layer: str, kind: str, draws: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each backward pass of the package: a and g of the layer's kept rows, sequence by sequence."""
    [shard] = shards(corpus, one.config)
    taps: dict[int, list[transformer.Tap]] = {}
    job = Sweep(frozenset([layer]), Fisher(kind), SEED, draws)
    sweep(one.config, one.parameters, shard, job, lambda n, tap: taps.setdefault(n, []).append(tap))
    return [
        (np.concatenate([tap.a for tap in some]), np.concatenate([tap.g for tap in some]))
        for some in taps.values()
    ]


def drawn(s: One, kind: str, draws: int, index: int) -> list[Any]:
    """SAMPLING: what a Fisher that draws draws for sequence `index`."""
    if kind == "sampled":
        return [oracles.drawn_labels(s.logits, s.label, SEED, draw, index) for draw in range(draws)]
    T, V = range(len(s.label)), s.config.vocabulary
    return [[oracles.signs(SEED, draw, index, t, V) for t in T] for draw in range(draws)]


def along(s: One, layer: str, u: np.ndarray) -> np.ndarray:
    """(T, V, S): ∂ nats[t, v] / ∂ y_s along u.

    h = 2⁻²²: three norms of nearly vanishing vectors, one upon the other, bend within 1e-4.
    """

    def nats(x_S: np.ndarray) -> np.ndarray:
        probe = {(layer, n): x * u for n, x in enumerate(x_S)}
        return oracles.nats(s.config, s.parameters, s.token, s.segment, probe)

    return oracles.jacobian(nats, np.zeros(len(s.inputs(layer)), WIDE), h=2**-22)


def compare_rows_and_fishers(one: Case, layer: str, kind: str) -> None:
    """The layer's a, u·g, uᵀGu and (u ⊗ w)ᵀF(u ⊗ w) along random u and w, from kernels and loops.

    The error of a difference is DIFFERENCE of |g|, or of (1 + |z|) / 2: ten u of nats, over h.
    """
    if one.config.image is not None:  # as a corpus stores them
        one = replace(one, token=one.token.astype(np.float32).astype(np.float64))
    each, rng = sequences(one), np.random.default_rng(1)
    u, w = (rng.choice(np.array([-1.0, 1.0]), n) for n in one.config.linear_layers()[layer])
    draws = 2 if kind in ("sampled", "signed") else 1
    passes, begin = swept(one, corpus_of(one, each), layer, kind, draws), 0
    got, want, scale = np.zeros(2), np.zeros(2, WIDE), np.zeros(2)
    for b, s in enumerate(each):
        keep = s.kept(layer)
        rows, begin = slice(begin, begin + keep.sum()), begin + keep.sum()
        a_SI, near = s.inputs(layer), budget(one) + budget(one, WIDE)
        size = moved(one, lambda P, s=s: s.inputs(layer, P), b)
        slope = along(s, layer, u)
        noise = float((1 + np.abs(s.logits)).max(axis=1).sum()) / 2
        for weight, back in s.worlds(kind, drawn=drawn(s, kind, draws, b)):
            g_S = oracles.carried(slope, back)
            assert (g_S[~keep] == 0).all()
            want += weight * np.array([(g_S**2).sum(), (g_S @ (a_SI @ w)) ** 2])
        for a_NI, g_NO in passes:
            a, g = a_NI[rows], g_NO[rows]
            assert_within(a, a_SI[keep], near, size[keep], f"a of {layer}")
            if kind == "empirical":
                assert_within(g @ u, g_S[keep], DIFFERENCE, np.abs(g).sum(axis=1) + noise, layer)
            got += np.array([((g @ u) ** 2).sum(), ((g @ u) @ (a @ w)) ** 2]) / draws
            at_most = np.abs(g).sum(axis=1) + noise
            scale += [(at_most**2).sum(), (at_most @ np.abs(a).sum(axis=1)) ** 2]
    assert_within(got[0], want[0], 2 * DIFFERENCE, scale[0], f"uᵀGu of {layer}")
    assert_within(got[1], want[1], 2 * DIFFERENCE, scale[1], f"(u ⊗ w)ᵀF(u ⊗ w) of {layer}")


@pytest.mark.parametrize("kind", ["expected", "signed", "sampled", "empirical"])
@few(12)
@given(one=ANY, data=st.data())
def test_rows_and_fishers_are_the_oracle(kind: str, one: Case, data: st.DataObject) -> None:
    assume((one.label >= 0).any() and min(bend(s) for s in sequences(one)) > 1e-3)
    layer = data.draw(st.sampled_from(list(one.config.linear_layers())))
    compare_rows_and_fishers(one, layer, kind)


@pytest.mark.parametrize("place", list(NormPlace))
@pytest.mark.parametrize("qk_norm", list(QKNorm))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_architecture_is_the_oracle(place: NormPlace, qk_norm: QKNorm, tied: bool) -> None:
    one = padded(1, norm_place=place, qk_norm=qk_norm, tied=tied, heads=4, kv_heads=2)
    compare_logits(one)


def interleaved(x: np.ndarray, position: int, theta: float, *more: Any) -> np.ndarray:
    """Pairs (2j, 2j + 1)."""
    E = len(x)
    order = [*range(0, E, 2), *range(1, E, 2)]
    out = np.zeros_like(x)
    out[order] = ROTATE(x[order], position, theta, *more)
    return out


def eps_outside(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return gain * x / (np.sqrt((x * x).mean()) + eps)


def tiled(q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: Any) -> np.ndarray:
    """Query head h reads key-value head h mod K."""
    head = [h % k.shape[1] for h in range(q.shape[1])]
    return ATTENTION(q, k[:, head], v[:, head], *more)


def undivided(q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: Any) -> np.ndarray:
    return ATTENTION(q * 2, k, v, *more)  # sqrt(E) = 2


def across(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, *more: Any
) -> np.ndarray:
    return ATTENTION(q, k, v, np.tril(np.ones_like(visible)), *more)


def acausal(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, *more: Any
) -> np.ndarray:
    return ATTENTION(q, k, v, visible | visible.T, *more)


ROTATE, ATTENTION = oracles.rotate, oracles.attention


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rotate", interleaved),
        ("rotate", lambda x, position, theta, *more: ROTATE(x, -position, 2 * theta, *more)),
        ("norm", eps_outside),
        ("attention", tiled),
        ("attention", undivided),
        ("attention", across),
        ("attention", acausal),
        ("silu", lambda z: z * (z > 0)),
    ],
)
def test_another_convention_is_another_forward(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    """The smallest difference, of eps = 1e-3 outside the root, is 1e10 budgets in float64."""
    one = tiny(7, length=5, kv_heads=2, heads=4, head_width=4)
    one = documents(one, [0, 0, 0, 1, 1], [-1] * 5)
    assert compare_logits(one) < 0.1
    monkeypatch.setattr(oracles, name, wrong)
    with pytest.raises(AssertionError):
        compare_logits(one)


def padded(seed: int, **changes: Any) -> Case:
    """Two sequences: one of two documents, one padded."""
    small = dict(vocabulary=4, width=4, heads=2, kv_heads=1, mlp_width=3, norm_eps=1e-3)
    one = case(seed, batch=2, length=4, **(small | changes))
    real = np.array([[True] * 4, [True] * 3 + [False]])
    segment = np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    label = np.array([[2, 1, 3, -1], [-1, 0, -1, -1]])
    return Case(one.config, one.parameters, one.token, real, segment, label)


def sequences(one: Case) -> list[One]:
    """The sequences of a batch, without their padding, or the images."""
    image, out = one.config.image is not None, []
    for b, real in enumerate(one.real):
        arrays = (x[b : b + 1, real] for x in (one.real, one.segment))
        token, label = (
            x[b : b + 1] if image else x[b : b + 1, real] for x in (one.token, one.label)
        )
        out.append(One(Case(one.config, one.parameters, token, *arrays, label)))
    return out


def images(seed: int, **changes: Any) -> Case:
    """Three images of two channels, two patches each; the second without a label."""
    image = Image(channels=2, height=2, width=4, patch=2, specials=("cls", "distillation"))
    small = dict(image=image, learned_positions=4, pool="cls", width=3, mlp_width=2)
    made = tiny(**(VIT | small | changes)).config
    patch = np.random.default_rng(seed).normal(size=(3, 2, 8)).astype(np.float32)
    real, label = np.ones((3, 4), bool), np.array([[2], [-1], [0]])
    parameters = random_parameters(made, seed)
    return Case(made, parameters, patch.astype(float), real, np.zeros((3, 4), int), label)


GPT2: dict[str, Any] = dict(
    norm="layer", norm_bias=True, norm_place="pre", qk_norm="none", rope_theta=None, gated=False,
    learned_positions=4, activation="gelu", biases=("q", "k", "v", "o", "up", "down"), tied=True,
)  # fmt: skip
GEMMA2: dict[str, Any] = dict(
    norm_offset=True, norm_place="both", qk_norm="none", activation="gelu_tanh", score_scale=0.3,
    score_cap=0.7, logit_cap=1.5, embed_scale=1.7, windows=(2,), tied=True,
)  # fmt: skip
NEOX: dict[str, Any] = dict(
    norm="layer", norm_bias=True, norm_place="pre", qk_norm="none", residual="parallel",
    gated=False, activation="gelu", head_width=4, rope_width=2,
    biases=("q", "k", "v", "o", "up", "down"),
)  # fmt: skip
PHI: dict[str, Any] = NEOX | dict(residual="shared", activation="gelu_tanh", biases=("up", "head"))
OLMO: dict[str, Any] = dict(
    norm="layer", norm_gain=False, norm_place="pre", qk_norm="none", qkv_clip=0.5,
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original=30, slow=0.3, fast=9.0),
)  # fmt: skip
VIT: dict[str, Any] = dict(
    norm="layer", norm_bias=True, norm_place="pre", qk_norm="none", rope_theta=None, gated=False,
    activation="gelu", causal=False, biases=("patch", "q", "k", "v", "o", "up", "down", "head"),
)  # fmt: skip


@pytest.mark.parametrize(
    "one",
    [
        padded(5, layers=1, norm_place="post", qk_norm="full", tied=False),
        padded(5, layers=1, norm_place="pre", qk_norm="head", tied=True),
        padded(5, layers=2, norm_place="pre", qk_norm="none", tied=False, width=3, mlp_width=2),
        padded(5, layers=1, **GPT2),
        padded(5, layers=1, **GEMMA2),
        padded(5, layers=1, **NEOX),
        padded(5, layers=1, **PHI),
        padded(5, layers=1, **OLMO),
        images(5),
        images(5, pool="mean", learned_positions=0),
    ],
    ids=["post", "pre", "two", "gpt2", "gemma2", "neox", "phi", "olmo", "vit", "vit-mean"],
)
def test_the_gradient_is_the_oracle(one: Case) -> None:
    loss, gradient = loss_and_gradient(one.config, one.astype(WIDE), *one.batch)
    each, names = sequences(one), list(one.parameters)
    x = oracles.flat(each[0].parameters, names)

    def naive(x: np.ndarray) -> Any:
        return sum(s.loss(names)(x) for s in each)

    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    assert_within(loss, naive(x), 2 * budget(one, WIDE), sum(s.sum() for s in scale.values()), "")
    want = oracles.placed(one.parameters, names, oracles.gradient(naive, x))
    for name in names:
        assert_within(gradient[name], want[name], DIFFERENCE, scale[name], name)


@cache
def batch(what: str) -> tuple[Case, list[One]]:
    one = padded(6, width=3, mlp_width=2) if what == "tokens" else images(6)
    return one, sequences(one)


@pytest.mark.parametrize("what", ["tokens", "images"])
@pytest.mark.parametrize(("kind", "draws"), [("sampled", 2), ("empirical", 1)])
def test_the_factors_are_the_oracle(kind: str, draws: int, what: str) -> None:
    """A and G of the paper by the second route, from tokens to sums, with no line shared."""
    one, each = batch(what)
    layers = list(one.config.linear_layers())
    model, corpus = rc.Model(one.config, one.parameters), corpus_of(one, each)
    got = rc.collect(model, corpus, layers=",".join(layers), fisher=kind, seed=SEED, draws=draws)
    some = [s.worlds(kind, drawn=drawn(s, kind, draws, b)) for b, s in enumerate(each)]
    assert list(got) == layers
    for layer in layers:
        sums = [
            oracles.factor_sums(s.rows(layer), w, s.kept(layer))
            for s, w in zip(each, some, strict=True)
        ]
        sum_A, sum_G, n = (sum(x) for x in zip(*sums, strict=True))
        one_layer = got[layer]
        assert (one_layer.n_A, one_layer.n_G) == (n, n * draws)
        assert_within(one_layer.A, sum_A / n, budget(one), sum_A / n, layer)
        assert_within(one_layer.G, sum_G / n, DIFFERENCE, sum_G / n, layer)
