"""FISHER and ROWS by hand: what is sent back at the logits, and which positions count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
from hypothesis import given
from strategies import Case, cases
from test_loss import sign_by_hand

from refcurv.law.conventions import Fisher, Rows
from refcurv.model.fisher import DRAWN, cotangents
from refcurv.model.rows import kept, reached
from refcurv.passes.sweep import Sweep

LABEL = np.array([[0, 2], [-1, 1], [0, -1]])
INDEX = np.array([4, 7, 9])
SEED, V = 5, 3


@pytest.mark.parametrize("rows", [range(6), [2, 3, 5]], ids=["all rows", "some"])
def test_cotangents_by_hand(rows: Sequence[int]) -> None:
    """The head asks for some rows at a time. A position without a label sends nothing back."""
    row_N = np.array(rows)
    b_N, t_N = np.divmod(row_N, 2)
    logit_NV = np.random.default_rng(8).normal(size=(6, V))[row_N]
    p_NV = np.exp(logit_NV) / np.exp(logit_NV).sum(axis=1, keepdims=True)
    root = [np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p)) for p in p_NV]
    labelled_N = LABEL[b_N, t_N] >= 0
    places = list(zip(INDEX[b_N].tolist(), t_N.tolist(), strict=True))

    def compare(fisher: Fisher, want: list, draws: int = 1) -> None:
        sent = cotangents(fisher, LABEL, INDEX, V, SEED, draws)
        got = [one(row_N, logit_NV) for one in sent]
        assert np.allclose(got, want, rtol=0, atol=1e-15), fisher

    def where(some_N: np.ndarray, g_NV: object) -> np.ndarray:
        return np.where(some_N[:, None], np.array(g_NV), 0)

    compare(Fisher.EMPIRICAL, [where(labelled_N, p_NV - np.eye(V)[LABEL[b_N, t_N]])])
    drawn, signed = [], []
    for draw in range(2):
        u_N = [oracles.uniform(SEED, draw, *place) for place in places]
        y_N = [oracles.draw_label(*one) for one in zip(logit_NV, u_N, strict=True)]
        drawn.append(where(labelled_N, p_NV - np.eye(V)[y_N]))
        e_NV = [[sign_by_hand(SEED, draw, *place, v) for v in range(V)] for place in places]
        signed.append(where(labelled_N, [S @ e for S, e in zip(root, e_NV, strict=True)]))
    compare(Fisher.SAMPLED, drawn, draws=2)
    compare(Fisher.SIGNED, signed, draws=2)
    columns = [(t, [S[:, v] for S in root]) for t in range(2) for v in range(V)]
    compare(Fisher.EXPECTED, [where(labelled_N & (t_N == t), one) for t, one in columns])


def test_the_expected_fisher_looks_at_labelled_positions_alone() -> None:
    """Where there is none it sends one zero, so that A is collected all the same."""
    sent = cotangents(Fisher.EXPECTED, np.array([[-1, 0, -1, 3]]), INDEX[:1], V)
    assert len(list(sent)) == 2 * V
    (one,) = cotangents(Fisher.EXPECTED, np.array([[-1, -1]]), INDEX[:1], V)
    assert not one(np.arange(2), np.ones((2, V))).any()


@given(cases())
def test_kept_rows_by_their_names(one: Case) -> None:
    arrays = one.label, one.real, one.segment
    for causal in (True, False):
        tokens = SimpleNamespace(image=None, causal=causal)
        want = oracles.reached(*arrays, causal)
        assert (reached(*arrays, causal) == want).all()
        assert (kept(tokens, Rows.REACHED, *arrays) == want).all()
    assert (kept(tokens, Rows.ALL, *arrays) == one.real).all()
    assert (kept(tokens, Rows.LABELLED, *arrays) == (one.label >= 0)).all()


def test_kept_rows_of_images_by_hand() -> None:
    images, label = SimpleNamespace(image=SimpleNamespace(positions=3)), np.array([[0], [-1]])
    assert kept(images, Rows.ALL, label).tolist() == [[True] * 3, [False] * 3]
    assert kept(images, Rows.CLS, label).tolist() == [[True, False, False], [False] * 3]


def test_reached_rows_by_hand() -> None:
    """A label in the middle of a segment, none in the next; a label at the start of a row."""
    label = np.array([[-1, 3, -1, -1, -1], [3, -1, -1, -1, -1]])
    segment = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    real = np.array([[True, True, True, True, False], [True] * 5])
    assert reached(label, real, segment).astype(int).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    both = reached(label, real, segment, causal=False).astype(int)
    assert both.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("fisher", list(Fisher))
def test_what_is_sent_back_is_made_when_it_is_asked_for(fisher: Fisher) -> None:
    """However many passes there are, memory holds one; their number is known without them."""
    draws = 2**31 if fisher in DRAWN else 1
    job = Sweep(frozenset({"head"}), fisher, SEED, draws)
    shard = SimpleNamespace(label_BT=LABEL, index_B=INDEX)
    sent = job.cotangents(shard, 10**9)
    assert len(list(islice(sent, 3))) == min(3, job.passes(shard, 10**9))
    few = replace(job, draws=2 if fisher in DRAWN else 1)
    assert few.passes(shard, 5) == len(list(few.cotangents(shard, 5)))
