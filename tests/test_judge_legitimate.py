"""No false alarm: what two correct programs may do differently passes, on random small models.

validation/judge/legitimate.py makes the variations, and runs many of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from validation.judge.legitimate import alarms, variation

pytest.importorskip("torch")  # one of the formats is its own


def failures(seeds):
    """What alarmed though nothing is wrong, what was not varied, and planted faults that passed."""
    out = []
    for seed in seeds:
        one = variation(seed)
        out += [(seed, one.ways, f) for f in alarms(one)]
        out += [(seed, one.ways, "not varied", one.undone)] if one.undone else []
        out += [(seed, one.ways, "missed")] if one.planted.passed else []
    return out


@pytest.mark.slow
def test_legitimate_variations_pass():
    assert failures(range(12)) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1040, 10))
def test_more_legitimate_variations_pass(first):
    """`validation.judge.legitimate` tries a thousand."""
    assert failures(range(first, first + 10)) == []


@pytest.mark.slow
def test_drawn_labels_under_a_gauge_are_no_layer_without_a_gradient():
    """A window hides all but the position itself, so that q and k have none: G was taken for it."""
    assert failures([312, 729]) == []
