"""The marginals of the corrected eigenvalues against the whole matrix of them."""

import numpy as np
from strategies import assert_within

import refcurv as rc
from refcurv.law.conventions import Fisher
from refcurv.model.weights import resident
from refcurv.passes.shards import shards
from refcurv.passes.sweep import Sweep, sweep
from validation.paper.marginals import corrected

LAYERS = "blocks.3.mlp.{gate,down}"


def test_marginals_are_those_of_the_corrected_eigenvalues():
    folder = rc.__path__[0] + "/demo"
    model = rc.load(f"{folder}/model.h5")
    whole = rc.load_corpus(f"{folder}/corpus.h5")
    corpus = rc.Corpus(whole.tokens[:48])
    basis = rc.decompose(rc.collect(model, corpus, LAYERS, seed=3))
    found = corrected(model, corpus, basis, seed=3)
    rows = {name: [] for name in basis}
    job = Sweep(frozenset(basis), Fisher.SAMPLED, 3)
    for unit in shards(corpus, model.config):
        sweep(
            model.config, resident(model), unit, job,
            lambda _, tap: rows[tap.name].append((tap.a.copy(), tap.g.copy())),
        )  # fmt: skip
    for name, one in basis.items():
        a, g = (np.concatenate(part) for part in zip(*rows[name], strict=True))
        # every entry of the matrix, then its sums: the definition
        corrected_OI = np.einsum("no,ni->oi", (g @ one.U_G) ** 2, (a @ one.U_A) ** 2)
        r, c = corrected_OI.sum(axis=1), corrected_OI.sum(axis=0)
        n = len(a) + max(corrected_OI.shape)
        for exact, ours in ((r, found[name].lam), (c, found[name].mu)):
            assert (np.diff(ours) <= 0).all()
            want = np.sort(exact)[::-1]
            assert_within(ours, want, n * np.finfo(float).eps, want, name)
        # the marginals differ from K-FAC's, whose order the directions had
        assert not np.allclose(found[name].lam / found[name].lam.sum(), one.lam / one.lam.sum())
        np.testing.assert_array_equal(
            np.sort(found[name].U_A, axis=1), np.sort(one.U_A, axis=1), strict=True
        )
