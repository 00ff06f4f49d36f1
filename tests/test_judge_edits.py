"""Masks and edited weights of others: the law's cut passes, other rules are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs, projected
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.edits import OTHERS
from refcurv.judge.judgement import validate

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


def judged(setting, layer, declared=None, **parts):
    model, factors = setting
    dump = Dump("test", {layer: Theirs(**parts)}, {layer: frozenset(parts)})
    says = {"fisher": "expected"} | (declared or {})
    verdict = validate(dump, factors, model=model, corpus=CORPUS, layers=layer, declared=says)
    return {f.quantity: f for f in verdict.findings}, verdict


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.97])
def test_a_mask_of_the_law_passes_and_others_are_named(setting, rho):
    model, factors = setting
    basis = rc.decompose(factors)[LAYER]
    law = rc.algebra.selection.select(basis.lam, basis.mu, rho)
    found, verdict = judged(setting, LAYER, mask=law)
    assert verdict.passed
    C = basis.U_G.T @ weight(model, LAYER) @ basis.U_A
    for other in OTHERS:
        mask = other.mask(basis, C, int(law.sum()))
        if (mask != law).sum() > 2:
            found, _ = judged(setting, LAYER, mask=mask)
            assert (found["mask"].verdict, found["mask"].fault) == ("fail", other.fault)
            assert found["mask"].cause == other.sentence


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
        for other in OTHERS:
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
