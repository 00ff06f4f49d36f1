"""The settings of another program, recomputed: beside `collect`, loops, and what theory says."""

from __future__ import annotations

from dataclasses import replace

import budgets
import numpy as np
import pytest
from strategies import Case, assert_within, case
from test_factors import corpus_of, gappy, model_of

import refcurv as rc
from refcurv.judge import case as judged
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.dump import Dump
from refcurv.judge.variants import REFERENCE, Moments, Setting, moments, parts, settings
from refcurv.law.conventions import Fisher

BUDGET = 40 * budgets.path(2, 64, np.float64)


def beside(one: Case, fisher: str = "expected", layers: str = "**", **choices: object):
    """A case of the judge that has no dump."""
    model, corpus = model_of(one), corpus_of(one)
    reference = rc.collect(model, corpus, layers, fisher, **choices)
    return judged.Case(Dump("memory", {}, {}), reference, {}, Arithmetic(), model, corpus)


def under(here: judged.Case, setting: Setting, **options: int) -> dict[str, Moments]:
    """The moments of one setting."""
    ((_, found),) = moments(here, [setting], list(here.reference), **options)
    return found


def gap(one: Moments, two: Moments) -> float:
    """The larger of the two relative distances."""
    return max(
        np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
        for x, y in ((one.A, two.A), (one.G, two.G))
    )


@pytest.mark.parametrize("rows", ["reached", "labelled", "all"])
@pytest.mark.parametrize("fisher", list(Fisher))
def test_the_reference_itself(fisher: Fisher, rows: str) -> None:
    draws = 2 if fisher in ("sampled", "signed") else 1
    here = beside(gappy(), fisher, rows=rows, seed=5, draws=draws)
    found = under(here, REFERENCE)
    assert list(found) == list(here.reference)
    for name, one in found.items():
        ours = here.reference[name]
        assert (one.n_A, one.n_G, one.share) == (ours.n_A, ours.n_G, 1.0)
        assert_within(one.A, ours.A, BUDGET, np.trace(ours.A), f"A of {name}")
        assert_within(one.G, ours.G, BUDGET, np.trace(ours.G), f"G of {name}")


def test_every_deviation_differs() -> None:
    """On a model and a corpus where it can; but where nothing flows, no setting is offered."""
    for one in (gappy(), packed()):
        here = beside(one)
        found = dict(moments(here, [REFERENCE, *settings(here)], list(here.reference)))
        true = found.pop(REFERENCE)
        for setting, layers in found.items():
            assert setting.faults
            worst = max(gap(layer, true[name]) for name, layer in layers.items())
            assert worst > 1e-7, setting


def packed() -> Case:
    """Two documents in each sequence, windows, partly rotary heads, soft-caps."""
    one = case(
        batch=3, head_width=4, rope_width=4, score_cap=1.5, logit_cap=2.0, qkv_clip=0.8,
        windows=(1, 0), norm_place="both", embed_scale=2.0, learned_positions=9,
    )  # fmt: skip
    segment = np.repeat([[0, 0, 0, 1, 1, 1]], 3, axis=0)
    label = np.where(segment == np.roll(segment, -1, axis=1), np.roll(one.token, -1, axis=1), -1)
    return replace(one, segment=segment, label=label)


def test_parts_add_up() -> None:
    here = beside(gappy(), rows="reached")
    found = parts(here, list(here.reference))
    assert found.exact and found.share == 1
    for name, part in found.layers.items():
        for side, at, sums in (("A", part.at_A, "sum_A"), ("G", part.at_G, "sum_G")):
            whole = found.whole(name, side, ["ordinary", "first", "prompts"]).sum(axis=0)
            ours = getattr(here.reference[name], sums)
            assert_within(whole, ours[np.ix_(at, at)], BUDGET, np.trace(ours), f"{side} of {name}")
