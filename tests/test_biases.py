"""What is no plain weight: biases, ties, tables, gains; and changes that factors must follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import budgets
import numpy as np
import pytest
import test_factors
import test_images
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Case,
    assert_within,
    case,
    cases,
    few,
    gap,
    image_cases,
    opened_for_lies,
    scaled,
    size_of,
)
from test_factors import alone, corpus_of, flow, gappy, model_of, naive_rows, sent_back

import refcurv as rc
from refcurv.algebra.kron import kron_dense
from refcurv.algebra.staircase import cut
from refcurv.cli import main
from refcurv.curvature import blocks
from refcurv.curvature.bases import Bases
from refcurv.editing.projection import project
from refcurv.law import conventions, tolerance
from refcurv.law.checks import (
    ConventionError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.law.conventions import Bias, Fisher
from refcurv.model import transformer
from refcurv.model.config import Norm, NormPlace, QKNorm
from refcurv.model.transformer import Slope
from refcurv.passes import forward as forward_pass
from refcurv.passes import sweep

BIASED = ("q", "v", "o", "up", "down", "head")
BUDGET = budgets.path(2, 8, np.float64)

Move = Callable[[np.ndarray], np.ndarray]


def biased(**changes: object) -> Case:
    return case(**({"batch": 3, "length": 7, "biases": BIASED} | changes))


def labels_given(one: Case) -> Case:
    """Labels that do not follow from the tokens, so that tokens may be renamed or repeated."""
    label = np.random.default_rng(3).integers(0, one.config.vocabulary, one.token.shape)
    return replace(one, label=np.where(one.real, label, -1))


# ------------------------------------------------------------------ O47: the bias


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_O47_the_homogeneous_coordinate_of_a_bias(dtype: str) -> None:
    """A_aug = [[A, mean a], [mean aᵀ, 1]]; W's block is the separate one; b's block of K is n G."""
    one = biased()
    inputs = naive_rows(one, np.zeros((*one.label.shape, one.config.vocabulary)))
    got = rc.collect(model_of(one, dtype), corpus_of(one), "**", draws=2)
    for name, factor in got.items():
        assert (factor.sum_a is not None) == (f"{name}.bias" in one.parameters)
        if factor.sum_a is None:
            assert np.array_equal(factor.A_joint, factor.A)
            continue
        joint, (O, I), n = factor.A_joint, one.config.linear_layers()[name], factor.n_A
        a = inputs[name][0]
        budget = budgets.path(2, 16, dtype)
        size = np.abs(a).mean(axis=0)
        assert_within(joint[:-1, -1], a.mean(axis=0), budget, size, f"mean input of {name}")
        assert joint[-1, -1] == 1  # exactly, whatever the dtype
        assert np.array_equal(joint[:-1, :-1], factor.A)
        assert (joint == joint.T).all()
        K = n * kron_dense(factor.G, joint).reshape(O, I + 1, O, I + 1)
        W_block = n * kron_dense(factor.G, factor.A).reshape(O, I, O, I)
        assert np.array_equal(K[:, :I, :, :I], W_block)
        assert np.array_equal(K[:, -1, :, -1], n * factor.G)


def test_O47_joint_K_is_the_exact_block_of_weight_and_bias_at_one_position() -> None:
    """One datum at one position (O1): F of W and b together is n (G ⊗ A_joint), ones last."""
    one = biased(batch=1, length=2)
    model = model_of(one)
    factors = rc.collect(model, corpus_of(one), "**", "expected")
    for name in ("blocks.0.attn.v", "blocks.0.mlp.up", "blocks.1.mlp.down", "head"):
        O, I = one.config.linear_layers()[name]
        F = rc.exact.fisher(model, one.token, wrt=f"{name}.weight,{name}.bias")
        at = np.column_stack(  # [W b] row by row, in terms of (rvec W, b)
            [np.arange(O * I).reshape(O, I), O * I + np.arange(O)]
        ).reshape(-1)
        K = factors[name].n_A * kron_dense(factors[name].G, factors[name].A_joint)
        assert_within(K, F[np.ix_(at, at)], BUDGET, K, name)


def test_O47_a_joint_basis_is_of_the_homogeneous_coordinate(tmp_path) -> None:
    one = biased()
    factors = rc.collect(model_of(one), corpus_of(one), "**")
    joint, separate = rc.decompose(factors, "joint"), rc.decompose(factors)
    assert (joint.bias, separate.bias) == (Bias.JOINT, Bias.SEPARATE)
    for name, factor in factors.items():
        for got, A in ((joint[name], factor.A_joint), (separate[name], factor.A)):
            budget = tolerance.eigenpair(len(A))
            assert_within(A @ got.U_A, got.U_A * got.mu, budget, A, name)
        assert np.array_equal(joint[name].U_G, separate[name].U_G)
        if factor.sum_a is None:
            assert np.array_equal(joint[name].U_A, separate[name].U_A)
    q, k, v = (f"blocks.0.attn.{x}" for x in "qkv")
    assert separate[q].U_A is separate[k].U_A is separate[v].U_A
    assert len(joint[q].mu) == len(joint[k].mu) + 1 == len(joint[v].mu)

    rc.save_bases(joint, tmp_path / "b.h5")
    back = rc.load_bases(tmp_path / "b.h5")
    assert back.bias is Bias.JOINT
    assert back[q].U_A.tobytes() == joint[q].U_A.tobytes()
    with opened_for_lies(tmp_path / "b.h5") as file:
        file.attrs["bias"] = np.bytes_("joined")
    with pytest.raises(ConventionError, match=r"bias must be one of .*Did you mean 'joint'\?"):
        rc.load_bases(tmp_path / "b.h5")
    with opened_for_lies(tmp_path / "b.h5") as file:
        del file.attrs["bias"]  # as refcurv 0.1 wrote it, for models without biases
    assert rc.load_bases(tmp_path / "b.h5").bias is Bias.SEPARATE


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_O47_a_joint_edit_is_the_projection_of_weight_and_bias(rho: float) -> None:
    """Both change, each rounded to its own dtype; a separate basis leaves the bias alone."""
    one = biased()
    factors = rc.collect(model_of(one), corpus_of(one), "**")
    joint, separate = rc.decompose(factors, "joint"), rc.decompose(factors)
    layer = "blocks.1.mlp.down"
    stored = {f"{layer}.weight": "bfloat16", f"{layer}.bias": "float32"}
    model = rc.Model(one.config, one.parameters, stored=stored)
    W, b = (one.parameters[f"{layer}.{part}"] for part in ("weight", "bias"))
    basis = joint[layer]
    want = project(np.column_stack([W, b]), basis, cut(basis.lam, basis.mu, rho).counts)

    edited, record = rc.edit(model, joint, {layer: rho}, force=True)
    new_W, new_b = (edited.parameters[f"{layer}.{part}"] for part in ("weight", "bias"))
    assert new_b.tobytes() == want[:, -1].astype(np.float32).astype(np.float64).tobytes()
    assert (new_W.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(new_W - want[:, :-1]) <= 2.0**-8 * np.abs(want[:, :-1])).all()
    assert gap(new_b, b) > 0.01
    assert record.layers[0].pairs == W.size + len(b)
    both = np.column_stack([new_W, new_b])
    share = np.linalg.norm(both) / np.linalg.norm(np.column_stack([W, b]))
    assert record.layers[0].norm == pytest.approx(share, rel=1e-14)

    apart, record = rc.edit(model, separate, {layer: rho}, force=True)
    assert apart.parameters[f"{layer}.bias"] is model.parameters[f"{layer}.bias"]
    assert gap(apart.parameters[f"{layer}.weight"], new_W) > 0.01
    assert record.layers[0].pairs == W.size


def test_joint_edits_that_keep_all_or_have_no_bias() -> None:
    one = biased()
    model = model_of(one)
    factors = rc.collect(model, corpus_of(one), "**")
    joint, separate = rc.decompose(factors, "joint"), rc.decompose(factors)
    same, record = rc.edit(model, joint, 1)
    for name in one.parameters:
        assert same.parameters[name] is model.parameters[name]
    assert {x.norm for x in record.layers} == {1.0}
    none, _ = rc.edit(model, joint, {"blocks.0.mlp.up": 0})
    assert not none.parameters["blocks.0.mlp.up.bias"].any()
    gate = {"blocks.0.mlp.gate": 0.5}
    one_way, other = (rc.edit(model, basis, gate)[0] for basis in (joint, separate))
    name = "blocks.0.mlp.gate.weight"
    assert one_way.parameters[name].tobytes() == other.parameters[name].tobytes()


def test_refusals_of_joint_edits() -> None:
    one = biased()
    model = model_of(one)
    factors = rc.collect(model, corpus_of(one), "**,embed")
    with pytest.raises(ConventionError, match="'embed' is a table, whose A is diagonal already"):
        rc.decompose(factors)
    factors = rc.collect(model, corpus_of(one), "blocks.0.mlp.*")
    with pytest.raises(ConventionError, match=r"bias must be one of .*Did you mean 'joint'\?"):
        rc.decompose(factors, "join")
    joint, separate = rc.decompose(factors, "joint"), rc.decompose(factors)
    mixed = Bases(separate.layers, bias=Bias.JOINT)
    with pytest.raises(ShapeError, match=r"up.weight with .*up.bias must be .* joint basis"):
        rc.edit(model, mixed, {"blocks.0.mlp.up": 0.5})
    mixed = Bases(joint.layers)
    with pytest.raises(ShapeError, match=r"up.weight must be \(5, 9\) = \(O, I\) of its basis"):
        rc.edit(model, mixed, {"blocks.0.mlp.up": 0.5})
    broken = one.parameters | {"blocks.0.mlp.up.bias": np.full(5, np.nan)}
    with pytest.raises(NonFiniteError, match=r"up\.bias"):
        rc.edit(rc.Model(one.config, broken), joint, 0.5, force=True)


def test_the_command_decomposes_jointly(tmp_path, capsys) -> None:
    one = biased()
    w, c, f, b = (str(tmp_path / f"{name}.h5") for name in "wcfb")
    rc.save(model_of(one), w)
    rc.save_corpus(corpus_of(one), c)
    assert main(["collect", w, c, "-o", f, "--layers", "**"]) == 0
    assert main(["decompose", f, "-o", b, "--bias", "joint"]) == 0
    assert rc.load_bases(b).bias is Bias.JOINT
    assert main(["edit", w, b, "-o", str(tmp_path / "e.h5"), "--rho", "0.7"]) == 0
    edited = rc.load(tmp_path / "e.h5")
    for name in ("blocks.0.mlp.up.bias", "blocks.1.attn.q.bias", "head.bias"):
        assert gap(edited.parameters[name], one.parameters[name]) > 1e-3
    assert main(["decompose", f, "-o", b, "--bias", "both"]) == 2
    assert "bias must be one of separate, joint" in capsys.readouterr().err


# ------------------------------------------------------------------ O45, O46: what must follow


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def moved(one: Case, moves: dict[str, Move]) -> Case:
    return replace(one, parameters=one.parameters | {n: f(one.parameters[n]) for n, f in
                                                     moves.items()})  # fmt: skip


def of_rows(R: np.ndarray) -> Move:
    """W → R W, b → R b."""
    return lambda x: R @ x


def of_columns(R: np.ndarray) -> Move:
    """W → W Rᵀ."""
    return lambda W: W @ R.T


def transported(
    one: Case, other: Case, sides: dict[str, np.ndarray], layers: str = "**"
) -> tuple[rc.Factors, rc.Factors]:
    """Both have one function, and factors that differ by X' = R X Rᵀ, R of `sides` ("A layer")."""
    models = [model_of(x) for x in (one, other)]
    logits = [rc.logits(model, one.token) for model in models]
    assert_within(logits[1], logits[0], BUDGET, logits[0], "logits")
    here, there = (rc.collect(m, corpus_of(one), layers, seed=3) for m in models)
    for name, factor in here.items():
        for side in "AG":
            X, got = getattr(factor, side), getattr(there[name], side)
            R = sides.get(f"{side} {name}", np.eye(len(X)))
            if X.ndim == 1:  # of a table
                assert np.array_equal(X, got)
                continue
            assert_within(got, R @ X @ R.T, 10 * BUDGET, X, f"{side} of {name}")
            if f"{side} {name}" in sides:
                assert gap(got, X) > 0.01, f"{side} of {name} did not move"
                spectra = [np.linalg.eigvalsh(M) for M in (got, X)]
                assert_within(spectra[0], spectra[1], 10 * BUDGET, spectra[1], name)
    return here, there


def value_rotation(seed: int = 5) -> tuple[Case, Case, dict[str, np.ndarray]]:
    """The values of each key-value head turned, and turned back by what o reads of its group."""
    one = biased(head_width=4)
    made = one.config
    group = made.heads // made.kv_heads
    turns = [rotation(4, seed + k) for k in range(made.kv_heads)]
    R_v = np.kron(np.diag([1, 0]), turns[0]) + np.kron(np.diag([0, 1]), turns[1])
    R_o = np.zeros((4 * made.heads,) * 2)
    for h in range(made.heads):
        R_o[4 * h : 4 * h + 4, 4 * h : 4 * h + 4] = turns[h // group]
    at = "blocks.0.attn."
    other = moved(
        one,
        {
            f"{at}v.weight": of_rows(R_v),
            f"{at}v.bias": of_rows(R_v),
            f"{at}o.weight": of_columns(R_o),
        },
    )
    return one, other, {f"G {at}v": R_v, f"A {at}o": R_o}


def test_O45_factors_follow_an_orthogonal_change_of_inputs_and_outputs() -> None:
    """a' = R a, W' = W Rᵀ: A' = R A Rᵀ, G as before; y' = R y, W' = R W: G' = R G Rᵀ, A as before.

    The mean of the inputs follows too: of [a; 1] the one stays.
    """
    one, other, sides = value_rotation()
    here, there = transported(one, other, sides)
    name = "blocks.0.attn.o"
    R = np.eye(len(sides[f"A {name}"]) + 1)
    R[:-1, :-1] = sides[f"A {name}"]
    want = R @ here[name].A_joint @ R.T
    assert_within(there[name].A_joint, want, 10 * BUDGET, want, "A_joint")


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_O45_the_edited_model_is_the_same_function(bias: str) -> None:
    """Both sides in a model: the edits of v and o, weights and biases, follow the change."""
    one, other, sides = value_rotation()
    here, there = transported(one, other, sides)
    layers = {"blocks.0.attn.{v,o}": 0.6}
    edited = []
    for each, factors in ((one, here), (other, there)):
        basis = rc.decompose(factors, bias)
        model, record = rc.edit(model_of(each), basis, layers)
        assert all(x.gap > 1e-9 for x in record.layers)  # no tie that rounding decides
        edited.append(model)
    logits = [rc.logits(model, one.token) for model in edited]
    assert_within(logits[1], logits[0], 100 * BUDGET, logits[0], "edited")
    assert gap(logits[0], rc.logits(model_of(one), one.token)) > 0.01
    R = sides["G blocks.0.attn.v"]
    b = [model.parameters["blocks.0.attn.v.bias"] for model in edited]
    assert_within(b[1], R @ b[0], 100 * BUDGET, b[0], "bias")


def test_O45_the_natural_gradient_does_not_see_an_affine_change_of_inputs() -> None:
    """[a'; 1] = T [a; 1]: the steps G⁻¹ ∇ A⁻¹ are one function, of the homogeneous coordinate only.

    Martens & Grosse 2015. Of the separate factors, a shift of the inputs makes another step.
    """
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(40, 4)), rng.normal(size=(40, 3))
    M, c = np.eye(4) + 0.3 * rng.normal(size=(4, 4)), rng.normal(size=4)
    steps, apart = [], []
    for x in (a, a @ M.T + c):
        factor = rc.Factor(x.T @ x, 40, g.T @ g, 40, sum_a=x.sum(axis=0))
        ones = np.column_stack([x, np.ones(40)])
        G = np.linalg.inv(factor.G)
        steps.append(ones @ (G @ (g.T @ ones) @ np.linalg.inv(factor.A_joint)).T)
        W = G @ (g.T @ x) @ np.linalg.inv(factor.A)
        apart.append(x @ W.T + G @ g.sum(axis=0))
    assert_within(steps[1], steps[0], BUDGET, steps[0], "joint")
    assert gap(apart[1], apart[0]) > 0.1


def test_O46_permuted_hidden_units() -> None:
    one = biased(biases=(*BIASED, "gate"))
    at, P = "blocks.1.mlp.", np.eye(5)[[3, 0, 4, 1, 2]]
    other = moved(
        one,
        {f"{at}{n}.{part}": of_rows(P) for n in ("gate", "up") for part in ("weight", "bias")}
        | {f"{at}down.weight": of_columns(P)},
    )
    transported(one, other, {f"G {at}gate": P, f"G {at}up": P, f"A {at}down": P})


@pytest.mark.parametrize("qk_norm", list(QKNorm))
def test_O46_permuted_heads(qk_norm: QKNorm) -> None:
    """Key-value heads with the query heads of their groups, and those within their group."""
    one = biased(qk_norm=qk_norm, biases=(*BIASED, "k"))
    kv, queries = [1, 0], [3, 2, 0, 1]  # new head h is the old queries[h]; 2 to a group
    E = one.config.head_width
    P_kv, P_q = (np.kron(np.eye(len(order))[order], np.eye(E)) for order in (kv, queries))
    at = "blocks.0.attn."
    moves = {f"{at}o.weight": of_columns(P_q)}
    for name, P in (("q", P_q), ("k", P_kv), ("v", P_kv)):
        moves |= {f"{at}{name}.{part}": of_rows(P) for part in ("weight", "bias")}
    if qk_norm is QKNorm.FULL:
        moves |= {f"{at}q_norm.weight": of_rows(P_q), f"{at}k_norm.weight": of_rows(P_kv)}
    sides = {f"G {at}q": P_q, f"G {at}k": P_kv, f"G {at}v": P_kv, f"A {at}o": P_q}
    transported(one, moved(one, moves), sides)


def rotated_residual(one: Case) -> tuple[Case, dict[str, np.ndarray]]:
    """Everything that writes to the residual stream turned, and what reads from it turned back."""
    R = rotation(one.config.width, 7)
    moves, sides = {}, {}
    for name in ("embed", "position"):
        if f"{name}.weight" in one.parameters:
            moves[f"{name}.weight"], sides[f"G {name}"] = of_columns(R), R
    for layer in one.config.linear_layers():
        if layer.endswith((".o", ".down")):
            moves |= {f"{layer}.weight": of_rows(R), f"{layer}.bias": of_rows(R)}
            sides[f"G {layer}"] = R
        else:
            moves[f"{layer}.weight"], sides[f"A {layer}"] = of_columns(R), R
    return moved(one, moves), sides


def test_O46_a_rotated_residual_stream() -> None:
    """Under RMSNorm without gains, before the parts or behind them; LayerNorm's mean forbids it."""
    layers = "**,embed,position"
    for place in NormPlace:
        one = biased(norm_gain=False, norm_place=place, learned_positions=7, embed_scale=1.7)
        transported(one, *rotated_residual(one), layers)
    one = biased(norm_gain=False, norm=Norm.LAYER)
    other, _ = rotated_residual(one)
    assert gap(*(rc.logits(model_of(x), one.token) for x in (other, one))) > 0.01


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary positions in the other layout: the pairs are (x[2j], x[2j + 1])."""
    out, width = x.copy(), 2 * cos.shape[-1]
    x1, x2 = x[..., 0:width:2], x[..., 1:width:2]
    out[..., 0:width:2], out[..., 1:width:2] = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return out


@pytest.mark.parametrize("rope_width", [None, 4])
def test_O46_the_other_rope_layout_permutes_q_and_k(rope_width: int | None, monkeypatch) -> None:
    """G' = Π G Πᵀ with one Π for every head; spectra and the function are the same."""
    one = biased(head_width=6, qk_norm=QKNorm.HEAD, rope_width=rope_width)
    width = rope_width or 6
    order = [j + half * (width // 2) for j in range(width // 2) for half in (0, 1)]
    P = np.eye(6)[order + list(range(width, 6))]
    assert not np.array_equal(P, np.eye(6))
    here = rc.collect(model_of(one), corpus_of(one), "**", seed=3)
    logits = rc.logits(model_of(one), one.token)
    moves, sides = {}, {}
    for name, heads in (("q", one.config.heads), ("k", one.config.kv_heads)):
        for i in (0, 1):
            at, wide = f"blocks.{i}.attn.{name}", np.kron(np.eye(heads), P)
            moves |= {f"{at}.weight": of_rows(wide), f"{at}_norm.weight": of_rows(P)}
            moves |= {f"{at}.bias": of_rows(wide)} if name == "q" else {}
            sides[f"G {at}"] = wide
    for module in (forward_pass, sweep):
        monkeypatch.setattr(module, "FAST", replace(module.FAST, rotate=interleaved))
    other = model_of(moved(one, moves))
    assert_within(rc.logits(other, one.token), logits, BUDGET, logits, "logits")
    assert gap(rc.logits(model_of(one), one.token), logits) > 0.01  # without the permutation
    for name, got in rc.collect(other, corpus_of(one), "**", seed=3).items():
        X = here[name].G
        P = sides.get(f"G {name}", np.eye(len(X)))
        assert_within(got.G, P @ X @ P.T, 10 * BUDGET, X, name)
        assert_within(got.A, here[name].A, 10 * BUDGET, here[name].A, name)
        spectra = [np.linalg.eigvalsh(M) for M in (got.G, X)]
        assert_within(spectra[0], spectra[1], 10 * BUDGET, spectra[1], name)
    assert_within(got.G, X, 10 * BUDGET, X, "the head does not move")


# ------------------------------------------------------------------ O48: tables and ties


def distinct(**changes: object) -> Case:
    """No token twice in a sequence."""
    one = case(**({"batch": 2, "length": 5, "embed_scale": 1.7, "learned_positions": 5} | changes))
    rng = np.random.default_rng(1)
    token = np.stack([rng.permutation(one.config.vocabulary)[:5] for _ in range(2)])
    return labels_given(replace(one, token=token))


def untied(one: Case) -> Case:
    """The same function, with a head of its own."""
    return replace(
        one,
        config=replace(one.config, tied=False),
        parameters=one.parameters | {"head.weight": one.parameters["embed.weight"]},
    )


@pytest.mark.parametrize("table", ["embed", "position"])
def test_O48_factors_of_a_table_are_in_its_exact_block(table: str) -> None:
    """With no entry twice in a sequence F's diagonal block of an entry is Σ g gᵀ where it is read.

    So their sum is sum_G; and what no kept row reads has no block and no count.
    """
    one = distinct()
    one.label[0, 3:] = -1
    model = model_of(one)
    factor = rc.collect(model, corpus_of(one), table, "expected")[table]
    V, D = one.parameters[f"{table}.weight"].shape
    F = rc.exact.fisher(model, one.token, one.label, wrt=f"{table}.weight").reshape(V, D, V, D)
    parts = np.einsum("vdve->vde", F)
    assert_within(factor.sum_G, parts.sum(axis=0), BUDGET, factor.sum_G, table)
    assert factor.n_A == 8
    assert ((np.linalg.norm(parts, axis=(1, 2)) > 0) == (factor.sum_A > 0)).all()
    assert factor.sum_A.sum() == 8


def test_O48_a_tied_matrix_has_two_uses_and_their_cross_terms() -> None:
    """`embed` and `head` are factors of a use by itself; no sum of their K is F of the matrix."""
    tied = distinct(tied=True)
    apart = untied(tied)
    args = (corpus_of(tied), "**,embed", "expected")
    shared, own = (rc.collect(model_of(x), *args) for x in (tied, apart))
    for name in own:
        for side in ("sum_A", "sum_G"):
            assert getattr(shared[name], side).tobytes() == getattr(own[name], side).tobytes()
    data = (tied.token, tied.label)
    F = rc.exact.fisher(model_of(tied), *data, wrt="embed.weight")
    both = rc.exact.fisher(model_of(apart), *data, wrt="{embed,head}.weight")
    P = len(F)
    F_emb, F_head, cross = both[:P, :P], both[P:, P:], both[:P, P:]
    assert_within(F, F_emb + F_head + cross + cross.T, BUDGET, F, "F of a tied matrix")
    assert gap(F_emb + F_head, F) > 0.1
    # K of each use, over the matrix as it is stored, (V, D): of the table A comes first
    embed, head = shared["embed"], shared["head"]
    K_emb = kron_dense(np.diag(embed.sum_A), embed.G)
    K_head = head.n_A * kron_dense(head.G, head.A)
    assert K_emb.shape == K_head.shape == F.shape
    inputs = head.n_A * kron_dense(head.G + np.diag(embed.A), head.A + embed.G)
    for K in (K_emb, K_head, K_emb + K_head, inputs):
        assert gap(K, F) > 0.1
    with pytest.raises(ConventionError, match="tied"):
        head_alone = rc.collect(model_of(tied), corpus_of(tied), "head")
        rc.edit(model_of(tied), rc.decompose(head_alone), 0.5)


# ------------------------------------------------------------------ O49: blocks of vectors


def gradients(one: Case, fisher: str, seed: int) -> list[dict[str, np.ndarray]]:
    """Of each segment and each cotangent, by the definitions, one whole sequence at a time."""
    out = []
    for sent in sent_back(one, fisher, seed):
        for b, segment in ((b, s) for b, row in enumerate(one.segment) for s in np.unique(row)):
            part = alone(one, b)
            made, inside = part.config, part.segment == segment
            final, trace = transformer.forward(made, part.parameters, part.token, part.layout)
            z = transformer.head_logits(made, part.parameters, final)
            own = sent[b : b + 1] * inside[:, : z.shape[1], None]
            y = transformer.linear_forward(made, part.parameters, "head", final)
            d_z = transformer.uncapped(made, y, own)
            found = {"head.bias": d_z.sum(axis=(0, 1))}
            d_final = d_z @ part.parameters[made.weight_of("head")]
            steps = transformer.backward(made, part.parameters, d_final, trace)
            found |= {s.name: s.d for s in steps if isinstance(s, Slope)}
            out.append(found)
    return out


VECTORS = st.sampled_from(["empirical", "sampled", "signed", "expected"])


@few(10)
@given(cases(), VECTORS, st.integers(0, 2**64 - 1))
def test_O49_blocks_are_the_sums_over_segments(one: Case, fisher: str, seed: int) -> None:
    """Every gain and every bias of the whole space of models: Σ D Dᵀ, D of one segment."""
    vectors = [n for n, x in one.parameters.items() if x.ndim == 1]
    if not (one.label >= 0).any() or not vectors:
        return
    got = rc.collect_blocks(model_of(one), corpus_of(one), "**", fisher, seed)
    assert list(got) == vectors
    slopes = gradients(one, fisher, seed)
    top = max(size_of(x) for slope in slopes for x in slope.values())
    for name, block in got.items():
        D = np.stack([slope[name] for slope in slopes])
        scale = len(D) * size_of(D) * top
        budget = 10 * budgets.path(one.config.layers, 64, np.float64)
        assert_within(block.sum_F, D.T @ D, budget, scale, name)
        assert (block.sum_F == block.sum_F.T).all()
        labelled = np.argwhere(one.label >= 0)
        assert block.segments == len({(b, one.segment[b, t]) for b, t in labelled})
        assert np.array_equal(block.F, block.sum_F)


def images_of(one: Case) -> rc.Corpus:
    """The corpus whose patches the case has."""
    image = one.config.image
    assert image is not None
    C, P = image.channels, image.patch
    rows, columns = image.height // P, image.width // P
    patch = one.token.reshape(-1, rows, columns, C, P, P).transpose(0, 3, 1, 4, 2, 5)
    pixels = patch.reshape(-1, C, image.height, image.width)
    return rc.Corpus(images=pixels.astype(np.float32), labels=one.label[:, 0])


@few(10)
@given(image_cases(), VECTORS, st.integers(0, 2**64 - 1))
def test_O49_blocks_and_positions_of_images(one: Case, fisher: str, seed: int) -> None:
    """Also the vectors before the patches and the patches' bias; one position table for all."""
    if not (one.label >= 0).any():
        return
    one = replace(one, token=one.token.astype(np.float32).astype(np.float64))
    model, corpus = model_of(one), images_of(one)
    budget = 10 * budgets.path(one.config.layers, 64, np.float64)
    vectors = [n for n, x in one.parameters.items() if x.ndim == 1]
    if vectors:
        got = rc.collect_blocks(model, corpus, "**", fisher, seed)
        assert list(got) == vectors
        slopes = gradients(one, fisher, seed)
        top = max(size_of(x) for slope in slopes for x in slope.values())
        for name, block in got.items():
            D = np.stack([slope[name] for slope in slopes])
            scale = len(D) * size_of(D) * top
            assert_within(block.sum_F, D.T @ D, budget, scale, name)
    if "position.weight" in one.parameters:
        keep = one.label[:, 0] >= 0
        table = rc.collect(model, corpus, "position", fisher, seed)["position"]
        assert table.sum_A.tolist() == [keep.sum()] * one.config.image.positions
        g = [flow(one, sent)["position"][1][keep].reshape(-1, one.config.width) for sent in
             sent_back(one, fisher, seed)]  # fmt: skip
        scale = sum(len(x) * np.abs(x).max(initial=1e-3) ** 2 for x in g)
        assert_within(table.sum_G, sum(x.T @ x for x in g), budget, scale, "position")


@pytest.mark.parametrize("fisher", list(Fisher))
def test_blocks_across_shards_and_chunks(fisher: Fisher, monkeypatch) -> None:
    """Two sequences to a shard, documents in them; chunks of the head that end inside a segment."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 12)
    monkeypatch.setattr(transformer, "HEAD_ROWS", 2)
    one = replace(gappy(), segment=np.array([[0] * 6, [1, 1, 1, 2, 2, 2], [4, 4, 4, 3, 3, 3]]))
    test_O49_blocks_are_the_sums_over_segments.hypothesis.inner_test(one, fisher, 11)


@pytest.mark.parametrize(
    ("fisher", "draws"),
    [pytest.param("expected", 1, marks=pytest.mark.slow), ("sampled", 3), ("empirical", 1)],
)
def test_O49_blocks_are_the_exact_fisher(fisher: str, draws: int) -> None:
    """The second route, rc.exact, of the same labels."""
    one = biased(norm_bias=True, norm=Norm.LAYER, qk_norm=QKNorm.HEAD, norm_place=NormPlace.BOTH)
    model = model_of(one)
    got = rc.collect_blocks(model, corpus_of(one), "**", fisher, seed=8, draws=draws)
    assert len(got) == sum(x.ndim == 1 for x in one.parameters.values())
    for name, block in got.items():
        F = rc.exact.fisher(model, one.token, wrt=name, fisher=fisher, seed=8, draws=draws)
        # drawn slopes of queries nearly cancel: F is 1e-3 of what it sums
        assert_within(block.F, F, 400 * BUDGET, F, name)
        assert (block.segments, block.draws) == (3, draws)


def test_O49_a_gain_has_no_kronecker_form() -> None:
    """Diagonal E (Σ_s g x̂)², not E g² · E x̂²; and F is no product of two smaller matrices."""
    one = biased(norm_place=NormPlace.PRE)
    name, gain = "final_norm.weight", one.parameters["final_norm.weight"]
    block = rc.collect_blocks(model_of(one), corpus_of(one), name, "expected")[name]
    D = []
    for sent in sent_back(one, "expected", 0):
        final, g_head = flow(one, sent)["head"]
        g = g_head @ one.parameters["head.weight"]  # of the norm's output x̂ · gain
        D.append((g * final / gain).sum(axis=1))
    D = np.concatenate(D)
    assert_within(np.diag(block.F), (D**2).sum(axis=0), BUDGET, np.diag(block.F), "diagonal")
    head = rc.collect(model_of(one), corpus_of(one), "head", "expected")["head"]
    W = one.parameters["head.weight"]
    squeezed = head.n_A * np.diag(W.T @ head.G @ W) * np.diag(head.A) / gain**2
    assert gap(squeezed, np.diag(block.F)) > 0.01
    for rows, columns in ((2, 4), (4, 2)):
        parts = block.F.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
        singular = np.linalg.svd(parts.reshape(rows**2, columns**2), compute_uv=False)
        assert singular[1] > 0.05 * singular[0]  # of G ⊗ A there would be one (O24)


@pytest.mark.parametrize(("fisher", "draws"), [("empirical", 1), ("sampled", 2), ("signed", 2)])
def test_blocks_of_packed_and_of_bidirectional_models_are_exact(fisher: str, draws: int) -> None:
    """Documents of one row, padding behind them; the second route has one problem a document."""
    for causal in (True, False):
        one = labels_given(biased(causal=causal, layers=1))
        model, (corpus, _, merged) = model_of(one), packings(one)
        names = "blocks.0.attn.q_norm.weight,blocks.0.mlp.up.bias"
        got = rc.collect_blocks(model, corpus, names, fisher, 5, draws)
        options = dict(fisher=fisher, seed=5, draws=draws)
        for name, block in got.items():
            F = rc.exact.fisher(model, corpus, wrt=name, **options)
            assert_within(block.F, F, 10 * BUDGET, F, name)
            assert gap(rc.exact.fisher(model, merged, wrt=name, **options), F) > 0.01
            if fisher == "empirical":
                apart = rc.exact.fisher(model, corpus, wrt=name, per="term", **options)
                assert gap(apart, F) > 0.01


def packings(one: Case) -> tuple[rc.Corpus, rc.Corpus, rc.Corpus]:
    """Seven documents of three rows: packed, each in a row of its own, and run into one another."""
    own = np.array([[0, 0, 0, 1, 1, 1, 9], [5, 2, 2, 2, 2, 2, 2], [0, 1, 1, 2, 2, 9, 9]])
    mask, width = (own < 9).astype(np.uint8), one.token.shape[1]
    label = np.where(mask, one.label, -1)
    rows = []
    for b, s in ((0, 0), (0, 1), (1, 5), (1, 2), (2, 0), (2, 1), (2, 2)):
        at = np.flatnonzero(own[b] == s)
        rest = width - len(at)
        rows.append((np.pad(one.token[b, at], (0, rest)),
                     np.pad(label[b, at], (0, rest), constant_values=-1),
                     np.pad(np.ones(len(at), np.uint8), (0, rest))))  # fmt: skip
    apart = rc.Corpus(*(np.stack(part) for part in zip(*rows, strict=True)))
    return rc.Corpus(one.token, label, mask, own), apart, rc.Corpus(one.token, label, mask)


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "expected"])
def test_O52_packing_changes_no_block(fisher: str) -> None:
    """Seven documents in three rows or in seven; without segments F is another by 10 % and more.

    What is drawn goes by the row and the position, so that the labels that packed documents drew
    are given to them in rows of their own.
    """
    for causal in (True, False):
        one = labels_given(biased(causal=causal, layers=1, vocabulary=4))
        if fisher == "sampled":
            packed, _, _ = packings(one)
            as_packed = replace(one, label=packed.label, real=packed.real, segment=packed.segment)
            one = replace(one, label=test_factors.drawn_labels(as_packed, 3, 0))
        packed, apart, merged = packings(one)
        model, kind = model_of(one), "expected" if fisher == "expected" else "empirical"
        got = rc.collect_blocks(model, packed, "**", fisher, seed=3)
        want, wrong = (rc.collect_blocks(model, x, "**", kind) for x in (apart, merged))
        off = []
        for name, block in want.items():
            assert got[name].segments == block.segments == 7
            scale = np.abs(block.F).max() + 1e-3
            assert_within(got[name].F, block.F, 10 * BUDGET, scale, name)
            off.append(np.linalg.norm(wrong[name].F - block.F) / (np.linalg.norm(block.F) + 1e-3))
        assert np.median(off) > 0.1


@pytest.mark.parametrize(("fisher", "draws"), [("sampled", 2), ("expected", 1)])
def test_blocks_are_independent_of_threads(fisher: str, draws: int, monkeypatch) -> None:
    """And of the batch: as many sequences alone have the same sums, within rounding."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 14)
    monkeypatch.setattr(blocks, "ROWS", 3)
    one = biased(batch=9)
    model = model_of(one, "float32")
    args = ("**_norm.*,**.bias", fisher, 5, draws)
    runs = [rc.collect_blocks(model, corpus_of(one), *args, in_flight=n) for n in (1, 2, 3)]
    for other in runs[1:]:
        for name, block in runs[0].items():
            assert block.sum_F.tobytes() == other[name].sum_F.tobytes()
    monkeypatch.undo()
    whole = rc.collect_blocks(model_of(one), corpus_of(one), *args)
    for name, block in runs[0].items():
        want = whole[name].sum_F
        assert_within(block.sum_F, want, 1e3 * tolerance.eps(np.float32), want, name)


def test_progress_and_refusals_of_blocks(monkeypatch) -> None:
    one = biased()
    model, corpus = model_of(one), corpus_of(one)
    seen: list[tuple[int, int]] = []
    got = rc.collect_blocks(model, corpus, progress=lambda *at: seen.append(at))
    assert seen == [(0, 1), (1, 1)]
    assert (got.fisher, got.seed, got.draws, got.dtype) == (Fisher.SAMPLED, 0, 1, "float64")
    assert len(got) == 9  # two norms and two qk-norms in each block, and the last
    with pytest.raises(NameUnknownError, match="matches none"):
        rc.collect_blocks(model, corpus, "blocks.0.mlp.up.weight")
    with pytest.raises(ConventionError, match=r"collect_blocks: .*Did you mean 'sampled'\?"):
        rc.collect_blocks(model, corpus, fisher="sample")
    with pytest.raises(ConventionError, match="draws must be 1"):
        rc.collect_blocks(model, corpus, fisher="empirical", draws=2)
    with pytest.raises(RangeError, match=r"collect_blocks: `expected` needs"):
        tokens = np.zeros((1, 10_000), int)
        rc.collect_blocks(model, rc.Corpus(tokens), "head.bias", fisher="expected")
    with monkeypatch.context() as patch, pytest.raises(RangeError, match=r"GiB are made\). Name"):
        patch.setattr(blocks, "MOST_BYTES", 1000)
        rc.collect_blocks(model, corpus)
    broken = one.parameters | {"final_norm.weight": np.full(8, np.nan)}
    with pytest.raises(NonFiniteError, match="loss: the largest logit of each row holds nan"):
        rc.collect_blocks(rc.Model(one.config, broken), corpus)
    steep = scaled(1e-25, biases=("down",))
    with pytest.raises(NonFiniteError, match=r"the block of 'blocks\.1.*Try float64"):
        rc.collect_blocks(model_of(steep, "float32"), corpus_of(steep), "blocks.1.mlp.down.bias")


def test_blocks_of_one_vector_alone_have_its_bits(monkeypatch) -> None:
    """And no block below the vector keeps what a backward would need."""
    one, lowest = biased(), []
    right = transformer.forward

    def watched(*args):
        lowest.append(args[-1])
        return right(*args)

    monkeypatch.setattr(transformer, "forward", watched)
    model, corpus = model_of(one), corpus_of(one)
    together = rc.collect_blocks(model, corpus, "**")
    for name in ("head.bias", "final_norm.weight", "blocks.1.mlp.down.bias"):
        apart = rc.collect_blocks(model, corpus, name)
        assert list(apart) == [name]
        assert apart[name].sum_F.tobytes() == together[name].sum_F.tobytes()
    assert lowest == [0] * 3 + [2] * 6 + [1] * 3


def test_blocks_of_what_stands_below_all_blocks_have_their_bits() -> None:
    """The CLS alone, and the patches' bias, take the backward through every block."""
    one, images = test_images.vit(images=2)
    model, corpus = test_images.model_of(one), test_images.corpus_of(one, images)
    together = rc.collect_blocks(model, corpus, "**")
    for name in ("cls.weight", "patch.bias"):
        apart = rc.collect_blocks(model, corpus, name)
        assert list(apart) == [name]
        assert apart[name].sum_F.tobytes() == together[name].sum_F.tobytes()
