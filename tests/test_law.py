"""The law's sentences where people read them, and the budgets' arithmetic."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from operator import attrgetter
from pathlib import Path

import budgets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refcurv.law import checks, conventions, tolerance
from refcurv.law.conventions import LAW

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from validation import first_page  # noqa: E402


def test_the_readmes_table_is_the_law() -> None:
    """`python -m validation.first_page` after a change of the law."""
    text = first_page.PAGE.read_text(encoding="utf-8")
    assert first_page.between(text, "law") == first_page.law()
    rows = re.findall(r"^\| `([A-Z, ]+)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert {name: said.replace("<br>", " ") for name, said, _ in rows} == conventions.describe()


@pytest.mark.parametrize("name", LAW)
def test_every_decision_says_where_it_is_carried_out(name: str) -> None:
    """Each place is defined there, not passed on from elsewhere, and its file names the law."""
    assert LAW[name].where
    for where in LAW[name].where:
        module_name, _, path = where.partition(":")
        module = importlib.import_module(module_name)
        place = attrgetter(path)(module)
        first = getattr(module, path.partition(".")[0])
        assert callable(place) or isinstance(place, property), where
        assert f"{first.__module__}.".startswith(f"{module_name}."), f"{where} is imported there"
        source = inspect.getsource(inspect.getmodule(first))
        assert any(re.search(rf"\b{one}\b", source) for one in name.split(", ")), where


def test_the_law_states_the_constants() -> None:
    """A number in a sentence is that of the code."""
    stated = {
        "SHARD, BLOCK": (
            f"max(1, {conventions.SHARD_TOKENS} div T)",
            f"on {conventions.HEAD_ROWS} kept rows",
            f"is {conventions.BLOCK_SHARDS} consecutive shards",
        ),
        "SAMPLING": (f"top {conventions.WORD_BITS_KEPT} bits",),
        "NEGATIVE": (
            f"c = {conventions.NEGATIVE_FACTOR:g},",
            f"1/{1 / conventions.MOST_ROUNDING:g} of",
        ),
        "PRECISION": conventions.COMPUTE_DTYPES,
        "FISHER": [f"`{one}`" for one in conventions.Fisher],
        "ROWS": [f"`{one}`" for one in conventions.Rows],
        "BIAS": [f"`{one}`" for one in conventions.Bias],
        "ESTIMATOR": [f"`{one}`" for one in conventions.Estimator],
    }
    for name, parts in stated.items():
        for part in parts:
            assert part in LAW[name].text, f"{name}: {part}"


def test_shards_hold_512_positions() -> None:
    assert [conventions.shard_sequences(T) for T in (1, 64, 256, 512, 513, 4096)] == [
        512, 8, 2, 1, 1, 1
    ]  # fmt: skip


@given(st.integers(1, 3000), st.integers(0, 999))
def test_gamma_bounds_a_dot_product(n: int, seed: int) -> None:
    """In float32, against float64, in any order; observed 5 % of the bound."""
    x, y = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)
    exact = (x.astype(np.float64) * y).sum()
    scale = np.abs(x.astype(np.float64) * y).sum()
    assert abs(float(x @ y) - exact) <= tolerance.gamma(n, np.float32) * scale
    assert abs(float((x * y).cumsum()[-1]) - exact) <= tolerance.gamma(n, np.float32) * scale


def test_budgets_are_tight_enough_to_see_one_position() -> None:
    """A budget that one extra row in 20,000 would fit into is too loose."""
    assert budgets.gram(20_000, 10, np.float64) < 1e-4 / 20_000
    assert budgets.path(32, 4096, np.float64) < 1e-9
    assert tolerance.eigenpair(11_008) < 1e-10
    assert budgets.gram(2048, 9, np.float32) > budgets.gram(2048, 9, np.float64)


def test_budgets_know_complex_and_long() -> None:
    assert tolerance.eps(np.complex128) == tolerance.eps(np.float64) == 2.0**-52
    assert tolerance.eps(np.longdouble) <= 2.0**-52
    with pytest.raises(ValueError, match="no digit"):
        tolerance.gamma(1e9, np.float32)


@pytest.mark.parametrize("kind", [checks.RefcurvError, checks.SchemaError, checks.RoomError])
def test_an_error_is_one_short_line(kind: type[checks.RefcurvError]) -> None:
    """Whatever came is shown, and of a long text its begin and its end."""
    assert str(kind("a\n   b\r\nc  d")) == "a b c  d" and str(kind("")) == ""
    exact = "x" * checks.LONGEST
    assert str(kind(exact)) == exact
    said = str(kind(f"load: {'x' * 10**5} is missing"))
    assert len(said) == checks.LONGEST and " … " in said
    assert said.startswith("load: xxx") and said.endswith("xxx is missing")
    assert str(kind(said)) == said and len(str(kind(f"convert: {said}"))) == checks.LONGEST
    for none in (None, b"x", 3):
        assert str(kind(none)) == str(none)


def test_errors_carry_their_status_and_values() -> None:
    with pytest.raises(
        checks.ShapeError, match=r"x must be \(3, any\) = \(rows, width\)"
    ) as caught:
        checks.require_shape("me", "x", np.zeros((2, 5)), (3, None), "(rows, width)")
    assert caught.value.values == {"wanted": (3, None), "got": (2, 5)}
    assert isinstance(caught.value, checks.RefcurvError)
    assert isinstance(caught.value, ValueError)
    assert (checks.SchemaError.status, checks.StorageError.status) == (2, 3)
    with pytest.raises(checks.NonFiniteError, match=r"inf at \[0, 1\]; 2 of 4"):
        checks.require_finite("me", "x", np.array([[0, np.inf], [np.nan, 1]]))
    with pytest.raises(checks.RangeError, match=r"tokens \[1, 0\] is 9"):
        checks.require_token_ids("me", "tokens", np.array([[1], [9]]), 9)


def test_every_error_message_is_one_line() -> None:
    for decision in LAW.values():
        for sentence in decision.sentences:
            assert sentence.endswith(".") and not {"\n", "|", "<"} & set(sentence), sentence
