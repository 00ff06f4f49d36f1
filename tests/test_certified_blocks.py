"""Dense blocks, certified: Hessian, GGN and Fisher of one weight, each by a route of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any
from unittest import mock

import budgets
import digits
import mpmath
import numpy as np
import oracles
import pytest
from digits import lies_inside, middle
from strategies import Case, case, config, random_parameters

import refcurv as rc
from refcurv.certified import attempt, blocks
from refcurv.certified.certificate import Enclosed
from refcurv.certified.certify import certify
from refcurv.certified.numbers import floats
from refcurv.curvature import exact
from refcurv.law.checks import RangeError
from refcurv.model.config import Image
from refcurv.report.certificate import format_certificate

TINY = dict(layers=1, width=2, heads=1, kv_heads=1, head_width=2, mlp_width=2, vocabulary=3)
LAYERS = "blocks.0.attn.v,head"
WEIGHTS = ("blocks.0.attn.v.weight", "head.weight")
BUDGET = 10 * budgets.path(1, 3, np.float64)
"""Of rc.exact in float64, as in test_exact; relative to the matrix."""

DENSE = {"hessian": exact.hessian, "ggn": exact.ggn, "fisher": exact.fisher}


def tiny(**changes: Any) -> Case:
    return case(batch=2, length=3, **(TINY | changes))


def given(one: Case) -> tuple[rc.Model, rc.Corpus]:
    return rc.Model(one.config, one.parameters), rc.Corpus(one.token, one.label)


def overlap(one: Enclosed, two: Enclosed, turned: bool = False) -> bool:
    """May each number of the two be one? `turned`: of the transpose of the other."""
    for at in np.ndindex(one.shape):
        to = at[::-1] if turned else at
        radii = Fraction(float(one.radius[at])) + Fraction(float(two.radius[to]))
        if abs(middle(one, at) - middle(two, to)) > radii:
            return False
    return True


def dense(one: Case, of: tuple[str, ...] = tuple(DENSE), **more: Any) -> rc.Certificate:
    settings = dict(layers=LAYERS, fisher="expected", sequences=[0, 1], digits=20)
    return certify(*given(one), of, **(settings | more))


@pytest.fixture(scope="module")
def found() -> rc.Certificate:
    return dense(tiny())


def test_what_exact_gives_lies_about_the_balls(found: rc.Certificate) -> None:
    """Over both sequences, row-major, as `exact` has them; float64's error is within its budget."""
    model, corpus = given(tiny())
    assert sorted(found) == sorted(f"{kind}.{name}" for kind in DENSE for name in WEIGHTS)
    assert found.digits >= 20 and not found.rows
    for kind, made in DENSE.items():
        for name in WEIGHTS:
            truth, x = made(model, corpus, wrt=name), found[f"{kind}.{name}"]
            off = np.linalg.norm(truth - x.nearest)
            assert off <= BUDGET * np.linalg.norm(x.nearest) + x.radius.max(), (kind, name)
    assert all(route.ulps < 1e4 for route in found.routes)


def test_blocks_lie_within_their_budgets_and_faults_do_not(found: rc.Certificate) -> None:
    """In every dtype; a float64 block that is off by 1e-10 of itself is seen."""
    for route in found.routes:
        assert route.inside and route.used("worst") < 1, route
        assert route.used("probable") > 1e-4

    def off(dtype: str) -> Any:
        right = floats(dtype)
        if dtype != "float64":
            return right
        return replace(right, derivative=lambda x: right.derivative(x) * (1 + 1e-10))

    with mock.patch.object(attempt, "floats", off):
        wrong = dense(tiny(), ("hessian", "fisher"), layers="head", digits=20)
    out = {(one.dtype, one.name) for one in wrong.routes if not one.inside}
    assert out == {("float64", "hessian.head.weight")}


def test_each_block_overlaps_its_transpose(found: rc.Certificate) -> None:
    for name, x in found.items():
        assert overlap(x, x, turned=True), name


def test_O11_ggn_is_the_expected_fisher(found: rc.Certificate) -> None:
    """Forwards alone against backwards alone."""
    for name in WEIGHTS:
        assert overlap(found[f"ggn.{name}"], found[f"fisher.{name}"])


def test_O10_the_hessian_of_the_head_is_its_ggn(found: rc.Certificate) -> None:
    """Logits are linear in it; in what lies below it they are not."""
    assert overlap(found["hessian.head.weight"], found["ggn.head.weight"])
    assert not overlap(found[f"hessian.{WEIGHTS[0]}"], found[f"ggn.{WEIGHTS[0]}"])


def test_the_hessian_holds_that_of_the_loops(found: rc.Certificate) -> None:
    """One entry, by differences of differences of the loss, in mpmath."""
    one, name, (i, j) = tiny(), WEIGHTS[0], (1, 2)

    def loss(x: Any, y: Any) -> Any:
        moved = {key: digits.of(a) for key, a in one.parameters.items()}
        flat = moved[name].reshape(-1)
        flat[i], flat[j] = flat[i] + x, flat[j] + y
        moved[name] = flat.reshape(one.parameters[name].shape)
        return sum(
            oracles.loss(one.config, moved, one.token[n], list(one.label[n])) for n in (0, 1)
        )

    with mpmath.workdps(80):
        h = digits.Digits(mpmath.mpf(10) ** -16)
        ways = [(h, h), (h, -h), (-h, h), (-h, -h)]
        a, b, c, d = (loss(*way) for way in ways)
        want = ((a - b - c + d) / (4 * h * h)).x
        sign, man, exp, _ = want._mpf_
    x = found[f"hessian.{name}"]
    truth = (-1) ** int(sign) * Fraction(int(man)) * Fraction(2) ** int(exp)
    assert abs(middle(x, (i, j)) - truth) <= Fraction(float(x.radius[i, j])) + Fraction(1, 10**29)


def shifted(*args: Any) -> Iterator[dict[str, Any]]:
    """Unit directions, each one place too far."""
    every = list(UNITS(*args))
    return iter([*every[1:], every[0]])


UNITS = blocks._units


def test_a_direction_off_by_one_is_caught(found: rc.Certificate) -> None:
    with mock.patch.object(blocks, "_units", shifted):
        wrong = dense(
            tiny(), ("hessian", "ggn"), layers="blocks.0.attn.v", digits=10, fisher="empirical"
        )
    name = WEIGHTS[0]
    assert not overlap(wrong[f"hessian.{name}"], wrong[f"hessian.{name}"], turned=True)
    assert not overlap(wrong[f"ggn.{name}"], found[f"fisher.{name}"])


def test_more_bits_give_smaller_balls_inside(found: rc.Certificate) -> None:
    more = dense(tiny(), layers="blocks.0.attn.v", digits=40)
    assert more.bits > found.bits
    for name, y in more.items():
        x = found[name]
        for at in np.ndindex(x.shape):
            assert lies_inside(y, x, at)


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "signed"])
def test_a_fisher_squares_each_segment(fisher: str) -> None:
    """Of packed and padded texts with labels of their own (VECTOR)."""
    one = tiny()
    label = np.array([[0, 2, 2], [-1, 1, -1]])
    corpus = rc.Corpus(
        one.token, label, np.array([[1, 1, 1], [1, 1, 0]]), np.array([[0, 0, 1], [0, 0, 0]])
    )
    model = rc.Model(one.config, one.parameters)
    found = certify(model, corpus, ["fisher"], layers=LAYERS, fisher=fisher, seed=2,
                    sequences=[0, 1], digits=12)  # fmt: skip
    for name in WEIGHTS:
        truth = exact.fisher(model, corpus, wrt=name, fisher=fisher, seed=2)
        off = np.linalg.norm(truth - found[f"fisher.{name}"].nearest)
        assert off <= BUDGET * np.linalg.norm(truth), name


def test_a_tied_head_has_the_block_of_both_its_uses() -> None:
    one = tiny(tied=True)
    found = dense(one, ("ggn", "fisher"), layers="head", digits=12)
    truth = exact.ggn(*given(one), wrt="embed.weight")
    assert overlap(found["ggn.embed.weight"], found["fisher.embed.weight"])
    assert np.linalg.norm(truth - found["ggn.embed.weight"].nearest) <= BUDGET * np.linalg.norm(
        truth
    )


def test_blocks_of_images() -> None:
    made = config(
        causal=False, image=Image(channels=1, height=2, width=2, patch=2, specials=("cls",)),
        pool="cls", learned_positions=2, layers=1, width=2, heads=1, kv_heads=1, mlp_width=2,
        vocabulary=3,
    )  # fmt: skip
    pixel = np.random.default_rng(0).normal(size=(2, 1, 2, 2)).astype(np.float32)
    model = rc.Model(made, random_parameters(made, 0))
    corpus = rc.Corpus(images=pixel, labels=np.array([-1, 2]))
    found = certify(model, corpus, ["hessian", "ggn", "fisher"], layers="patch", fisher="expected",
                    sequences=[0, 1], digits=12)  # fmt: skip
    for kind, of in DENSE.items():
        truth, x = of(model, corpus, wrt="patch.weight"), found[f"{kind}.patch.weight"]
        assert np.linalg.norm(truth - x.nearest) <= BUDGET * np.linalg.norm(truth), kind
    assert overlap(found["ggn.patch.weight"], found["fisher.patch.weight"])


def test_a_block_too_large_is_refused() -> None:
    made = config(width=40, heads=4, head_width=10, kv_heads=2, mlp_width=2)
    model = rc.Model(made, random_parameters(made, 0))
    corpus = rc.Corpus(np.array([[1, 2, 3]]))
    with mock.patch.object(blocks, "DENSE", 1600):
        blocks.require_small(made, ("blocks.0.attn.q",))
    with pytest.raises(RangeError, match=r"of 'blocks.0.attn.q.weight' has 1,600 .* 1,024 at most"):
        certify(model, corpus, ["ggn"])
    with pytest.raises(RangeError, match=r"those of blocks.0.attn.k.weight, .*or hvp and ggnvp"):
        certify(model, corpus, ["fisher"])
    with pytest.raises(RangeError, match="What would fit: hvp and ggnvp"):
        certify(model, corpus, ["hessian"], layers="**.q")


def test_a_table_of_blocks(found: rc.Certificate) -> None:
    """One row for each quantity: they are of all sequences together."""
    rows = format_certificate(found.to_json()).splitlines()[2:5]
    assert sorted(row.split()[0] for row in rows) == sorted(DENSE)
    assert all(row.split()[1:3] == ["2", "52"] for row in rows)


def test_sequences_without_a_label_have_blocks_of_0() -> None:
    one = tiny()
    model, corpus = rc.Model(one.config, one.parameters), rc.Corpus(np.array([[1]]))
    found = certify(model, corpus, list(DENSE), layers="head", fisher="expected")
    assert len(found) == 3 and not any(x.nearest.any() or x.radius.any() for x in found.values())
