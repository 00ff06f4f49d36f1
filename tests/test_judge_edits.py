"""Masks and edited weights of others: the law's cut passes, other rules are named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs, projected
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.diagnosis.causes import with_named
from refcurv.judge.diagnosis.rules import others
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.judgement import validate
from refcurv.judge.verdict import Cause, Comparison

LAYER = "blocks.1.mlp.up"
SQUARE = "blocks.1.attn.o"


CORPUS = rc.Corpus(np.random.default_rng(0).integers(0, config().vocabulary, (12, 9)))


@pytest.fixture(scope="module")
def setting():
    made = config(mlp_width=12)
    model = rc.Model(made, random_parameters(made, 3))
    return model, rc.collect(model, CORPUS, "blocks.1.{mlp.up,attn.o}", "expected")


def weight(model, layer):
    return np.asarray(model.parameters[f"{layer}.weight"])


def judged(setting, layer, declared=None, arithmetic="", **parts):
    model, factors = setting
    dump = Dump("test", {layer: Theirs(**parts)}, {layer: frozenset(parts)})
    says = {"fisher": "expected"} | (declared or {})
    given = {"model": model, "corpus": CORPUS, "declared": says, "arithmetic": arithmetic}
    verdict = validate(dump, factors, layers=layer, **given)
    return {f.quantity: f for f in verdict.findings}, verdict


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.97])
def test_a_mask_of_the_law_passes_and_others_are_named(setting, rho):
    model, factors = setting
    basis = rc.decompose(factors)[LAYER]
    law = rc.algebra.selection.select(basis.lam, basis.mu, rho)
    found, verdict = judged(setting, LAYER, mask=law)
    assert verdict.passed
    C = basis.U_G.T @ weight(model, LAYER) @ basis.U_A
    masks = {one.sentence: one.mask(basis, C, int(law.sum())) for one in others(law.shape, None)}
    for other in others(law.shape, None):
        mask = masks[other.sentence]
        if (mask != law).sum() > 2:
            found, _ = judged(setting, LAYER, mask=mask)
            assert (found["mask"].verdict, found["mask"].fault) == ("fail", other.fault)
            assert (masks[found["mask"].cause] == mask).all()


def test_a_mask_is_judged_by_the_declared_share(setting):
    """A mask of another share fails where one is declared, and what is left out is all or none."""
    basis = rc.decompose(setting[1])[LAYER]
    law = rc.algebra.selection.select(basis.lam, basis.mu, 0.8)

    def found(mask, rho):
        return judged(setting, LAYER, {"rho": str(rho)}, mask=mask)[0]["mask"]

    assert found(law, 0.8).verdict == "pass"
    assert found(np.ones_like(law), 1).verdict == found(0 * law, 0).verdict == "pass"
    other = found(law, 0.7)
    assert (other.verdict, other.fault) == ("fail", None) and "0.7 is declared" in other.cause
    for mask in (np.ones_like(law), 0 * law):
        assert found(mask, 0.8).verdict == "fail"
        with pytest.raises(rc.RefcurvError, match="is kept"):
            judged(setting, LAYER, mask=mask)


def whole(basis, mask, W=None, **other):
    """A dump of a basis and what was made in it."""
    parts = {"U_A": basis.U_A, "mu": basis.mu, "U_G": basis.U_G, "lam": basis.lam, "mask": mask}
    return parts | ({} if W is None else {"W": keep_pairs(W, basis, mask)}) | other


def test_a_fault_of_a_mask_is_a_cause(setting):
    """Of the weight that was made by it no fault is its own."""
    model, factors = setting
    basis, W = rc.decompose(factors)[LAYER], weight(model, LAYER)
    law = rc.algebra.selection.select(basis.lam, basis.mu, 0.8)
    L = np.random.default_rng(4).random(law.shape)
    by_L = (L >= np.sort(L, axis=None)[-law.sum()]).reshape(law.shape)
    root = rc.algebra.selection.select(np.sqrt(basis.lam), np.sqrt(basis.mu), 0.8)
    for mask, words in ((by_L, "by EK-FAC's Λ"), (root, "√(λ μ)"), (law[::-1, ::-1], "upside")):
        parts = whole(basis, mask, W, Lambda=L)
        found, verdict = judged(setting, LAYER, {"rho": "0.8"}, **parts)
        fault = "B65" if words == "upside" else "B74"
        for quantity in ("mask", "W"):
            assert (found[quantity].verdict, found[quantity].fault) == ("fail", fault)
            assert words in found[quantity].cause
        (cause,) = verdict.causes
        assert (cause.fault, cause.layers) == (fault, (LAYER,))
        assert {"mask", "W"} <= set(cause.quantities) and cause.remedy
    parts["W"] = parts["W"] * (1 + 1e-6)
    found, _ = judged(setting, LAYER, {"rho": "0.8"}, **parts)
    assert "their own eigenvectors and mask" not in found["W"].cause


@pytest.mark.parametrize("told", [False, True])
def test_a_corner_alone_is_a_cause(told):
    """Beside what rounding allows of all other entries; not where a cause speaks of the layer."""
    case = SimpleNamespace(dump=SimpleNamespace(program="memory"))
    corner = Comparison(LAYER, "corner of A", 0.3, 0.01, "fail", "B30", "it is 0.7")
    other = Cause("B28", "Rows.", "Mend them.", (LAYER,), ("A",), 0.3, 0.0)
    found = with_named(case, [other] * told, [corner])
    assert [one.fault for one in found] == (["B28"] if told else ["B30"])
    assert told or (found[0].before, found[0].layers) == (0.3, (LAYER,))


def deficient(setting):
    """The setting with A and G of four rows of falling size, so that they lack full rank."""
    model, factors = setting
    one, rng = factors[LAYER], np.random.default_rng(5)
    sizes = np.array([[1], [0.4], [0.16], [0.064]])
    rows = [sizes * rng.normal(size=(4, len(M))) for M in (one.A, one.G)]
    A, G = (X.T @ X for X in rows)
    few = rc.Factors(
        {LAYER: rc.Factor(A, one.n_A, G, one.n_G)}, "expected", "reached", 0, 1, "float64", 96
    )
    return model, few


def test_at_a_share_of_1_everything_is_kept(setting):
    model, factors = own = deficient(setting)
    basis, W = rc.decompose(factors)[LAYER], weight(model, LAYER)
    mass = basis.lam[:, None] * basis.mu
    stopped = mass > 1e-12 * mass.max()
    assert 0 < stopped.sum() < stopped.size

    def found(rho, **parts):
        return judged(own, LAYER, {"rho": str(rho)}, **parts)[0]

    both = found(1, **whole(basis, stopped, W))
    assert (
        both["mask"].fault
        == both["W"].fault
        == found(1, W=keep_pairs(W, basis, stopped))["W"].fault
    )
    assert both["W"].fault == "B68"
    assert found(1, W=W)["W"].verdict == "pass"
    fewer = stopped & (mass > np.sort(mass[stopped])[0])
    assert found(1, mask=fewer)["mask"].fault != "B68"
    assert found(1, W=keep_pairs(W, basis, fewer))["W"].fault != "B68"


def test_a_sum_in_float32_is_another_share(setting):
    """Where the spectra are there and right; a mask alone may have had others."""
    _, factors = setting
    basis = rc.decompose(factors)[LAYER]
    mass = np.sort((basis.lam[:, None] * basis.mu).ravel())[::-1]
    share = float(mass[:-20].sum() / mass.sum())
    law = rc.algebra.selection.select(basis.lam, basis.mu, share - 1e-9)
    for far, fault in ((1e-7, "B69"), (1e-4, None)):
        rho = share + far
        assert (rc.algebra.selection.select(basis.lam, basis.mu, rho) != law).any()
        says = {"rho": repr(rho)}
        found = judged(setting, LAYER, says, **whole(basis, law))[0]["mask"]
        assert (found.verdict, found.fault) == ("fail", fault)
        found = judged(setting, LAYER, says, mask=law)[0]["mask"]
        assert (found.verdict, found.fault) == ("fail", None)


def test_negative_eigenvalues_that_count_as_mass_are_named(setting):
    model, factors = own = deficient(setting)
    one, W = factors[LAYER], weight(model, LAYER)
    solved = [np.linalg.eigh(from_bfloat16(to_bfloat16(M)).astype(float)) for M in (one.A, one.G)]
    (mu, U_A), (lam, U_G) = ((v[::-1], U[:, ::-1]) for v, U in solved)
    assert min(mu) < 0 and min(lam) < 0
    raw = Eigenbasis(U_A, mu, U_G, lam)
    mass, select = lam[:, None] * mu, rc.algebra.selection.select
    order, own_basis = np.argsort(-mass, axis=None), rc.decompose(factors)[LAYER]
    for rho in 1 - np.logspace(-2, -5, 40):
        mask = np.zeros(mass.size, bool)
        enough = np.searchsorted(mass.ravel()[order].cumsum(), rho * mass.sum())
        mask[order[: enough + 1]] = True
        mask = mask.reshape(mass.shape)
        cut_off = select(np.maximum(lam, 0), np.maximum(mu, 0), rho)
        ours = select(own_basis.lam, own_basis.mu, rho)
        if (mask ^ cut_off).any() and (mask ^ ours).sum() > 1:
            break
    says = {"rho": repr(float(rho))}
    found, verdict = judged(own, LAYER, says, "float64", **whole(raw, mask, W))
    assert found["mask"].fault == found["W"].fault == "B67"
    assert [c.fault for c in verdict.causes] == ["B67"]
    found, verdict = judged(own, LAYER, says, "float64", **whole(raw, cut_off, W))
    assert found["mask"].fault is None and not verdict.passed
    assert found["mask"].verdict == "pass" or "their own eigenvalues" in found["mask"].cause


def test_an_edit_in_their_own_basis_has_the_fault_of_that(setting):
    model, factors = setting
    basis, W = rc.decompose(factors)[LAYER], weight(model, LAYER)
    one = factors[LAYER]
    solved = [np.linalg.eigh(M.astype("f4")) for M in (one.A, one.G)]
    (mu, U_A), (lam, U_G) = ((v[::-1].astype(float), U[:, ::-1].astype(float)) for v, U in solved)
    short = Eigenbasis(U_A, mu, U_G, lam)
    mask = rc.algebra.selection.select(basis.lam, basis.mu, 0.8)
    parts = whole(short, mask, W)
    for without in ((), ("mask",)):
        held = {name: x for name, x in parts.items() if name not in without}
        dump = {"declared": {"rho": "0.8"}, "arithmetic": "float64"}
        found, verdict = judged(setting, LAYER, **dump, **held)
        assert found["W"].fault == "B62" and "their own" in found["W"].cause
        assert [c.fault for c in verdict.causes] == ["B62"]


def test_their_order_is_that_of_their_eigenvalues(setting):
    _, factors = setting
    basis = rc.decompose(factors)[LAYER]
    law = rc.algebra.selection.select(basis.lam, basis.mu, 0.8)
    turned = dict(mask=law[::-1, ::-1], lam=basis.lam[::-1], mu=basis.mu[::-1])
    turned |= dict(U_A=basis.U_A[:, ::-1], U_G=basis.U_G[:, ::-1])
    assert judged(setting, LAYER, **turned)[1].passed


@pytest.mark.parametrize("rho", [0.5, 0.83])
@pytest.mark.parametrize("declare", [True, False])
def test_an_edited_weight_of_the_law_passes_and_others_are_named(setting, rho, declare):
    model, factors = setting
    declared = {"rho": str(rho)} if declare else None
    for layer in (LAYER, SQUARE):
        basis, W = rc.decompose(factors)[layer], weight(model, layer)
        good = projected(W, basis, rho)
        assert judged(setting, layer, declared, W=good)[1].passed
        short = good.astype(np.float32).astype(float)
        found, _ = judged(setting, layer, declared, W=short)
        assert found["W"].verdict in ("pass", "equal as float32")
        C = basis.U_G.T @ W @ basis.U_A
        for other in () if declare else others(W.shape, None):
            edited = keep_pairs(W, basis, other.mask(basis, C, C.size // 3))
            found, _ = judged(setting, layer, W=edited)
            if np.linalg.norm(edited - W) > 0.1 * np.linalg.norm(W):
                assert found["W"].fault == other.fault, other.sentence


def test_a_square_weight_edited_the_wrong_way_round_is_named(setting):
    model, factors = setting
    basis, W = rc.decompose(factors)[SQUARE], weight(model, SQUARE)
    turned = projected(W.T, basis, 0.8).T
    assert judged(setting, SQUARE, W=turned)[0]["W"].fault == "B33"
    swapped = Eigenbasis(basis.U_G, basis.lam, basis.U_A, basis.mu)
    assert judged(setting, SQUARE, W=projected(W, swapped, 0.8))[0]["W"].fault == "B33"


def test_a_weight_whose_memory_was_written_in_fortrans_order_is_named(setting):
    """The bytes of an array that lies column by column, under a shape that is read row by row."""
    model, factors = setting
    for layer in (LAYER, SQUARE):
        good = projected(weight(model, layer), rc.decompose(factors)[layer], 0.8)
        raw = np.asfortranarray(good).ravel("K").reshape(good.shape)
        for declared in (None, {"rho": "0.8"}):
            found = judged(setting, layer, declared, W=raw)[0]["W"]
            assert found.fault == "B33" and "column by column" in found.cause


def test_what_cannot_be_judged_is_said(setting):
    model, _ = setting
    W = weight(model, LAYER)
    with pytest.raises(rc.RefcurvError, match=r"nothing could be compared.*not edited"):
        judged(setting, LAYER, W=W)
    bad = replace(Theirs(), W=W[:3])
    found, verdict = judged(setting, LAYER, W=bad.W)
    assert not verdict.passed and "(3, 8)" in found["W"].cause
    nan = W.copy()
    nan[0, 0] = np.nan
    assert judged(setting, LAYER, W=nan)[0]["W"].verdict == "fail"


def test_an_edited_model_is_read_from_a_file_or_a_checkpoint(setting, tmp_path):
    """What `edit` writes passes; other layers were not edited, and that is said."""
    model, factors = setting
    edited, _ = rc.edit(model, rc.decompose(factors), {LAYER: 0.8})
    rc.save(edited, tmp_path / "edited.h5")
    rc.export(tmp_path / "edited.h5", tmp_path / "checkpoint")
    for theirs in ("edited.h5", "checkpoint"):
        says = {"fisher": "expected", "rho": "0.8"}
        corpus = CORPUS
        verdict = rc.validate(tmp_path / theirs, factors, model=model, corpus=corpus, declared=says)
        found = {f.layer: f for f in verdict.findings if f.quantity == "W"}
        assert verdict.passed, verdict.failed
        assert found[LAYER].verdict == "pass" and found[SQUARE].verdict == "left out"
    verdict = rc.validate(
        tmp_path / "checkpoint", factors, model=model, corpus=corpus, declared={"rho": "0.4"}
    )
    assert [f.layer for f in verdict.failed] == [LAYER]
