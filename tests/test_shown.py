"""How records print: `print(model)` is a line, not the pages of its arrays."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters

import refcurv as rc
from refcurv.shown import LONGEST, brief

MODULES = (rc, rc.exact, rc.distance, rc.estimators, rc.matrix_free)
RECORDS = {
    thing
    for module in MODULES
    for name in getattr(module, "__all__", vars(module))
    if inspect.isclass(thing := getattr(module, name)) and is_dataclass(thing)
}
"""The public ones, and those that the public modules hand out."""


class Unread:
    """An array that may be asked for its shape and dtype alone."""

    shape, dtype = (4096, 4096), np.dtype("float64")

    def __repr__(self) -> str:
        raise AssertionError("it was read")

    __array__ = __getitem__ = __len__ = __iter__ = __bool__ = __eq__ = __repr__
    __hash__ = object.__hash__


class Names(dict):
    """A mapping that gives its names alone, as one that reads lazily would have to."""

    def __getitem__(self, name: object) -> object:
        raise AssertionError("it was read")

    values = items = __repr__ = __getitem__


VALUES = st.one_of(
    st.builds(Unread),
    st.integers(1, 300).map(lambda n: Names({f"blocks.{k}.mlp.up": 0 for k in range(n)})),
    st.integers(1, 300).map(lambda n: (Unread(),) * n),
    st.integers(1, 300).map(lambda n: list(range(n))),
    st.integers(1, 5).map(lambda n: rc.Block(Unread(), n, n)),
    st.text(min_size=1, max_size=500),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
)


def test_there_are_records() -> None:
    assert {rc.Model, rc.Corpus, rc.Factors, rc.Verdict, rc.Trace} < RECORDS and len(RECORDS) > 25


@pytest.mark.parametrize("kind", sorted(RECORDS, key=lambda kind: kind.__name__))
@few(8)
@given(data=st.data())
def test_every_public_record_prints_so(kind: type, data: st.DataObject) -> None:
    record = object.__new__(kind)
    for field in fields(kind):
        object.__setattr__(record, field.name, data.draw(VALUES))
    for name in ("findings", "accepted", "proofs"):  # what `passed` of a record asks for
        if hasattr(record, name):
            object.__setattr__(record, name, ())
    text = repr(record)
    shown = [field for field in fields(kind) if field.repr]
    assert str(record) == text and "\n" not in text
    assert text.startswith(f"{kind.__name__}(") and text.endswith(")")
    assert len(text) <= 40 + sum(len(field.name) + LONGEST + 3 for field in shown)
    for field in shown:
        if isinstance(getattr(record, field.name), Unread):
            assert f"{field.name}=float64 (4096, 4096)" in text


def test_a_record_prints_one_short_line() -> None:
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    corpus = rc.Corpus(np.arange(12).reshape(2, 6) % made.vocabulary)
    assert repr(corpus) == "Corpus(tokens=int32 (2, 6))"
    names = list(model.parameters)
    assert f"parameters={{{len(names)}: {names[0]!r}, …}})" in repr(model)
    assert repr(made).startswith("ModelConfig(vocabulary=7, width=8, layers=2")
    factors = rc.collect(model, corpus, "**", "empirical")
    for thing in (model, corpus, factors, rc.validate(factors, factors), *factors.values()):
        assert repr(thing) == brief(thing) and len(repr(thing)) < 300
    assert "passed=True" in repr(rc.validate(factors, factors))


def test_what_is_short_is_shown_whole() -> None:
    assert brief("blocks") == "'blocks'" and brief((1, 2)) == "(1, 2)" and brief(()) == "()"
    assert brief(np.float32(0.5)) == brief(np.array(0.5)) == "0.5" and brief({}) == "{}"
    assert brief("x" * 99) == "'" + "x" * (LONGEST - 2) + "…"
    assert brief(rc.Corpus) == repr(rc.Corpus)
