"""Certificates of bad input: each is refused in one line; none says more than is proved."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters

import refcurv as rc
from refcurv.certified import certify as driver
from refcurv.certified.certificate import Certificate, Enclosed, certain, farthest
from refcurv.certified.directions import direction_of
from refcurv.certified.spectra import _basis
from refcurv.files import store
from refcurv.files.store import reading
from refcurv.law.checks import Array, RefcurvError
from refcurv.model.weights import resident
from refcurv.report.certificate import _percent, at_most, format_certificate

TINY: dict[str, Any] = dict(
    vocabulary=5, width=4, heads=2, kv_heads=1, head_width=2, mlp_width=3, layers=1
)


def tiny(factor: float = 1.0, part: str = "", **changes: Any) -> rc.Model:
    """A tiny model; the parameters that are named by `part` are so many times larger."""
    made = config(**(TINY | changes))
    every = random_parameters(made, 0)
    return rc.Model(made, {n: x * factor if part in n else x for n, x in every.items()})


def corpus() -> rc.Corpus:
    return rc.Corpus(np.array([[1, 2, 3], [0, 4, 2]]))


def refused(made: Any) -> str:
    """What it is refused with: one line."""
    with pytest.raises(RefcurvError) as error:
        made()
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ what is given


class Never:
    """It must not come so far."""

    def __call__(self, *_: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("name", ["of", "sequences", "rows", "fisher", "progress", "estimate"])
def test_whatever_is_given_is_one_line(name: str) -> None:
    """Arrays without axes, arrays where a name is needed, what cannot be called."""
    some = [np.array(3), np.array([0.5, 1]), np.array(["x", "y"]), 3.5, b"x", {"x": 1}]
    with mock.patch.object(driver, "planned", Never()):
        for value in [*some, None] if name != "estimate" else some:
            given = {"of": ["nats"], name: value}
            refused(lambda given=given: rc.certify(tiny(), corpus(), **given))


def test_a_cut_of_no_layer_is_refused() -> None:
    said = refused(lambda: rc.certify(tiny(), corpus(), ["cut"], rho={}))
    assert said == "certify: rho names no layer. Give a share, or {pattern: share}."


def test_a_seed_of_numpy_is_a_number_in_the_file(tmp_path: Path) -> None:
    seed: Any = np.int64(2)
    given = dict(of=["G"], digits=1, fisher="signed", layers="head", seed=seed)
    found = rc.certify(tiny(), corpus(), **given)
    rc.save_certificate(found, tmp_path / "c.h5")
    assert json.loads(json.dumps(found.to_json()))["source"]["seed"] == 2


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "longdouble", "object", "U"])
def test_weights_that_are_no_float64_are_refused(dtype: str) -> None:
    model = tiny()
    odd = {**model.parameters, "head.weight": model.parameters["head.weight"].astype(dtype)}
    with mock.patch.object(driver, "planned", Never()):
        assert "head.weight" in refused(
            lambda: rc.certify(replace(model, parameters=odd), corpus(), ["nats"])
        )


def test_weights_of_another_shape_are_refused() -> None:
    model = tiny()
    odd = {**model.parameters, "head.weight": model.parameters["head.weight"][:-1]}
    said = refused(lambda: rc.certify(replace(model, parameters=odd), corpus(), ["nats"]))
    assert "head.weight must be (5, 4)" in said


def test_what_is_no_certificate_is_not_saved(tmp_path: Path) -> None:
    for what in (None, 3, {}, tiny()):
        assert "Certificate" in refused(lambda w=what: rc.save_certificate(w, tmp_path / "c.h5"))
    for path in (None, 3, b"x", []):
        said = refused(lambda p=path: rc.save_certificate(Certificate({}, (), 1, 1), p))
        assert "is no path" in said


# ------------------------------------------------------------------ which files it is of


def test_a_certificate_names_only_files_that_it_is_of(tmp_path: Path) -> None:
    """One that was rounded or changed in memory is another: its file would be certified falsely."""
    rc.save(tiny(), tmp_path / "w.h5")
    rc.save_corpus(corpus(), tmp_path / "c.h5")
    model, texts = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")

    def named(model: rc.Model, texts: rc.Corpus) -> list[str]:
        found = rc.certify(model, texts, ["logits"], digits=1)
        return sorted(found.source["inputs"])

    assert named(model, texts) == ["c.h5", "w.h5"]
    assert named(rc.load(tmp_path / "w.h5", dtype="float32"), texts) == ["c.h5"]
    W = model.parameters["head.weight"]
    assert named(model.with_parameters({"head.weight": W}), texts) == ["c.h5", "w.h5"]
    assert named(model.with_parameters({"head.weight": np.nextafter(W, 1)}), texts) == ["c.h5"]
    before = Counter[str]()
    right = reading.read
    with mock.patch.object(store, "read", lambda h, n, **k: before.update([n]) or right(h, n, **k)):
        assert named(model, texts) == ["c.h5", "w.h5"]
    assert before == Counter(f"parameters.{name}" for name in model.parameters)  # once each
    every = {name: "float16" for name in model.parameters}
    rc.save(replace(model, stored=every), tmp_path / "h.h5")  # of it a change may round to nothing
    half = rc.load(tmp_path / "h.h5")
    near = {"head.weight": np.nextafter(half.parameters["head.weight"], 1)}
    assert named(half, texts) == ["c.h5", "h.h5"]
    assert named(half.with_parameters(near), texts) == ["c.h5"]
    other = replace(model, config=replace(model.config, norm_eps=1e-3))
    assert named(other, texts) == ["c.h5"]
    for change in (
        dict(tokens=texts.tokens[:, ::-1].copy()),
        dict(labels=np.zeros_like(texts.tokens)),
    ):
        assert named(model, replace(texts, **change)) == ["w.h5"]


def test_files_of_one_name_are_both_named(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "x.h5" for folder in ("model", "corpus")]
    for path in paths:
        path.parent.mkdir()
    rc.save(tiny(), paths[0])
    rc.save_corpus(corpus(), paths[1])
    both = rc.load(paths[0]).source, rc.load_corpus(paths[1]).source
    told = {str(path): one["sha256"] for path, one in zip(paths, both, strict=True)}
    assert store.inputs(*both) == told
    assert store.inputs(both[0], both[0]) == {"x.h5": both[0]["sha256"]}


LIKE: dict[str, Callable[[Array], Any]] = {
    "a list": lambda v: v.tolist(),
    "whole numbers": lambda v: v.astype(np.int64),
    "short ones": lambda v: v.astype(np.int8),
    "float16": lambda v: v.astype(np.float16),
    "float32": lambda v: v.astype(np.float32),
    "longdouble": lambda v: v.astype(np.longdouble),
    "bytes in the other order": lambda v: v.astype(v.dtype.newbyteorder()),
    "columns first": np.asfortranarray,
    "every second": lambda v: np.repeat(np.repeat(v, 2, 0), 2, 1)[::2, ::2],
    "backwards": lambda v: v[::-1, ::-1].copy()[::-1, ::-1],
    "read alone": lambda v: np.frombuffer(v.tobytes()).reshape(v.shape),
    "no mask": np.ma.masked_array,
    "no entry masked": lambda v: np.ma.masked_array(v, np.zeros(v.shape, bool)),
}
"""A direction, given in another way: its numbers are the same."""

UNLIKE: dict[str, Callable[[Array], Any]] = {
    "nothing": lambda v: None,
    "a number": lambda v: 1.0,
    "another shape": lambda v: v.T,
    "ragged": lambda v: [*v[1:].tolist(), [1.0]],
    "masked": lambda v: np.ma.masked_array(v, np.eye(*v.shape) > 0),
    "objects": lambda v: v.astype(object),
    "texts": lambda v: v.astype(str),
    "dates": lambda v: v.astype("datetime64[s]"),
    "fields": lambda v: v.view([("x", float)]),
    "complex": lambda v: v.astype(complex),
    "NaN": lambda v: v + np.nan,
    "infinite": lambda v: np.where(np.eye(*v.shape), -np.inf, v),
}
"""What is no direction."""

PRODUCTS = {
    "hvp": partial(rc.exact.hvp, wrt="blocks.0.mlp.up.weight"),
    "ggnvp": partial(rc.exact.ggnvp, wrt="blocks.0.mlp.up.weight"),
    "derivative": rc.exact.derivative,
}


@pytest.mark.parametrize("way", [*LIKE, *UNLIKE])
def test_a_direction_is_taken_as_it_is_or_refused(way: str) -> None:
    """However its numbers are stored; what is none is refused in one line, for every product."""
    model, name = tiny(), "blocks.0.mlp.up.weight"
    v = np.random.default_rng(0).integers(-3, 4, model.parameters[name].shape).astype(float)
    given = {name: (LIKE | UNLIKE)[way](v)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way in UNLIKE:
            said = [refused(partial(p, model, corpus(), vector=given)) for p in PRODUCTS.values()]
            said.append(refused(lambda: rc.certify(model, corpus(), ["hvp"], direction=given)))
            assert all(name in one or "the vector" in one for one in said)
            return
        for product in PRODUCTS.values():
            got, want = (product(model, corpus(), vector={name: x}) for x in (given[name], v))
            if isinstance(got, dict):
                got, want = got[name], want[name]
            near = 1e-12 if way == "longdouble" else 0  # whose product is of longdoubles
            np.testing.assert_allclose(got, want, rtol=near, atol=near)
        taken = direction_of(resident(model), given)[name]
    assert taken.dtype == np.float64 and np.array_equal(taken, v)


@pytest.mark.filterwarnings("error")
def test_a_direction_beyond_float64_is_refused() -> None:
    """Without a warning: what is certified is of float64 numbers."""
    given = {"head.weight": np.full((5, 4), np.longdouble(10) ** 400)}
    assert "float64" in refused(lambda: rc.certify(tiny(), corpus(), ["hvp"], direction=given))


# ------------------------------------------------------------------ numbers at the edges


def test_sizes_beyond_float64_are_planned() -> None:
    found = rc.certify(tiny(1e300), corpus(), ["logits"], digits=1)
    assert found.bits == driver.MOST_BITS and found.digits == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("factor", "part", "rho", "more"),
    [(1e160, "embed", {"blocks.0.mlp.up": 0.5}, dict(norm_place="pre")), (1e170, "head", 0.5, {})],
)
def test_what_floats_cannot_decompose_is_certified(
    factor: float, part: str, rho: Any, more: dict[str, Any]
) -> None:
    layer = "blocks.0.mlp.up" if part == "embed" else "head"
    with mock.patch.object(driver, "MOST_BITS", 2**10):
        model = tiny(factor, part, **more)
        found = rc.certify(model, corpus(), ["edit"], digits=2, rho=rho, layers=layer)
    assert found.cuts[layer]["undecided"] == 0 and f"edit.{layer}" in found
    if part == "embed":
        assert found.cuts[layer]["float64"] is None
        assert not [r for r in found.routes if r.name.startswith("edit")]


@pytest.mark.parametrize("entry", [math.inf, math.nan, -1.0])
def test_what_float64_has_no_basis_of_has_none(entry: float) -> None:
    """Infinite sums and negative eigenvalues are float64's: the proof does not stop at them."""
    one = np.diag([1.0, entry])
    assert _basis("x", {"A.x": np.eye(2), "G.x": one}, {"A.x": 2, "G.x": 2}) is None
    assert _basis("x", {"A.x": np.eye(2), "G.x": np.eye(2)}, {"A.x": 2, "G.x": 2}) is not None


def test_an_error_that_is_no_number_is_infinite() -> None:
    one = Enclosed(np.array([[1.0, 2.0], [0, 0]]), np.zeros(2))
    assert farthest(np.array([1.0, math.nan]), one) == math.inf


# ------------------------------------------------------------------ what is printed is no less


@few(30)
@given(st.floats(5e-324, 1e307), st.integers(1, 4))
def test_a_bound_is_printed_rounded_up(x: float, digits: int) -> None:
    said = Fraction(at_most(x, digits))
    assert Fraction(x) <= said <= Fraction(x) * (1 + Fraction(10) ** (1 - digits))
    assert at_most(0.0, digits) == "0"
    if x < 1e6:
        assert Fraction(_percent(x)[:-1]) >= 100 * Fraction(x) * (1 - Fraction(1, 2**52))


def test_the_angle_is_printed_rounded_up() -> None:
    one = {"size": 2, "zeros": 0, "unsure": 0, "fewest": 1.0, "median": 1.0, "clusters": 0}
    table: dict[str, Any] = {"numbers": {}, "routes": [], "bits": 9, "digits": None, "wanted": 1}
    said = format_certificate({**table, "spectra": {"A.x": {**one, "angle": 1.4400001e-30}}})
    assert "Sine of the largest angle to a subspace: 1.5e-30 at most." in " ".join(said.split())
    assert "one orthonormal basis" not in said
    number = {"shape": [1, 1], "digits": 1.0, "largest": 1.0, "settled": 1}
    said = format_certificate({**table, "numbers": {"eigenvectors.A.x": number}})
    assert "a cluster, or of zeros, are one orthonormal basis of many." in said


@few(30)
@given(st.integers(-300, 300), st.integers(0, 200), st.integers(-2, 2))
def test_no_digit_is_claimed_that_is_not_there(k: int, n: int, ulps: int) -> None:
    """Where the size is 10^n radii to rounding, the logarithms alone may say n and be wrong."""
    size = 10.0**k
    radius = float(Fraction(size) / 10**n)
    for _ in range(abs(ulps)):
        radius = math.nextafter(radius, math.inf if ulps > 0 else 0)
    if radius:
        said = certain(size, radius)
        assert Fraction(radius) * 10 ** math.floor(said) <= Fraction(size) or said == 0


def test_the_largest_float_is_said() -> None:
    most = float(np.finfo(np.float64).max)
    one = Enclosed(np.array([[most], [2.0**970]]), np.zeros(1))
    assert one.text((0,)) == f"{int(most) + 2**970} exactly"


# ------------------------------------------------------------------ what a file says


def leaves(x: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON values: of a list its first entry."""
    yield at
    some = x.items() if isinstance(x, dict) else enumerate(x[:1]) if isinstance(x, list) else ()
    for key, value in some:
        yield from leaves(value, (*at, key))


def put(x: Any, at: tuple[Any, ...], value: Any) -> Any:
    """The same values, another one at a place."""
    if not at:
        return value
    out = x.copy()
    out[at[0]] = put(x[at[0]], at[1:], value)
    return out


ODD = ("x", None, [], {}, -1, math.inf, math.nan, True, "nan", 10**400, 2.5, [[0]], {"x": 1})
PARTS = ("rows", "source", "spectra", "cuts", "routes")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The header of a certificate with everything that can be told."""
    path = tmp_path_factory.mktemp("written") / "c.h5"
    of = ["nats", "cut"]
    given = dict(digits=1, layers="blocks.0.mlp.up", rho=0.5, fisher="sampled")
    found = rc.certify(tiny(), corpus(), of, **given)
    others = {"other": [[0, 1, 2, 3]], "undecided": [[0, 1, 2]]}
    labels = found.source["labels"] | others
    rc.save_certificate(
        replace(found, source={**found.source, "labels": labels, "zeros": {"O32": ["nats.0"]}}),
        path,
    )
    return store.open_file(path, format="refcurv-certificate")


def forged(written: Any, **changed: Any) -> Certificate:
    """What is read of the file if it had other attributes, with a checksum that fits them."""
    header = replace(written, attributes={**written.attributes, **changed})
    with mock.patch.object(store, "open_file", lambda *_, **__: header):
        return rc.load_certificate(written.path)


@few(25)
@given(st.data())
def test_a_forged_attribute_is_refused_or_can_be_printed(written: Any, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(PARTS))
    good = json.loads(written.attributes[part])
    at = data.draw(st.sampled_from(list(leaves(good))))
    told = json.dumps(put(good, at, data.draw(st.sampled_from(ODD))))
    try:
        found = forged(written, **{part: told.replace("Infinity", "1e999")})
    except RefcurvError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert format_certificate(table)
    assert all(type(n) is int and n >= 0 for n in found.rows.values())


@pytest.mark.parametrize("told", ["", "null", "[", "[" * 100_000, '{"a": 1, "a": 2}', "1, 2"])
def test_an_attribute_that_is_no_json_is_refused(written: Any, told: str) -> None:
    for part in PARTS:
        assert "damaged" in refused(lambda part=part: forged(written, **{part: told}))


def test_counts_that_do_not_add_up_are_refused(written: Any) -> None:
    good = json.loads(written.attributes["cuts"])
    bad = put(good, ("blocks.0.mlp.up", "kept"), 3 + good["blocks.0.mlp.up"]["kept"])
    assert "are not those kept" in refused(lambda: forged(written, cuts=json.dumps(bad)))
