"""G under each FISHER, certified: sampled labels are data, expected ones an exact sum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import digits
import mpmath
import numpy as np
import oracles
import pytest
from digits import lies_inside, middle
from strategies import Case, case

import refcurv as rc
from refcurv.algebra.balls import bits, exact
from refcurv.certified import attempt, labels, numbers
from refcurv.certified import certify as driver
from refcurv.certified import layers as functions
from refcurv.certified.certify import certify
from refcurv.cli import main
from refcurv.curvature import definition
from refcurv.law.checks import RefcurvError
from refcurv.model import fisher as model_fisher
from refcurv.model.sampling import uniforms
from refcurv.report.certificate import format_certificate

PRECISION = mpmath.workdps(60)
SLACK = Fraction(10) ** -40
"""What the differences of the other route err by is far below it, and radii are above."""

TINY = dict(layers=1, width=2, heads=1, kv_heads=1, head_width=2, mlp_width=2, vocabulary=3)
LAYERS = ("blocks.0.mlp.up", "head")
SEED = 3


def tiny(**changes: Any) -> Case:
    return case(batch=2, length=3, **(TINY | changes))


def given(one: Case) -> tuple[rc.Model, rc.Corpus]:
    return rc.Model(one.config, one.parameters), rc.Corpus(one.token, one.label)


# ------------------------------------------------------------------ another route, in mpmath


@cache
def slopes(layer: str, n: int) -> Any:
    """∂ nats[t, v] / ∂ y_s of `tiny`, (T, V, S, O), by central differences of the loops."""
    one = tiny()
    plain = {name: digits.of(x) for name, x in one.parameters.items()}
    O, T = one.config.linear_layers()[layer][0], one.token.shape[1]
    h = digits.Digits(mpmath.mpf(10) ** -12)

    def nats(s: int, o: int, step: Any) -> Any:
        delta = digits.of(np.zeros(O))
        delta[o] = step
        return oracles.nats(one.config, plain, one.token[n], None, {(layer, s): delta})

    out = np.empty((T, one.config.vocabulary, T, O), object)
    for s, o in np.ndindex(T, O):
        near, far = nats(s, o, h) - nats(s, o, -h), nats(s, o, h * 2) - nats(s, o, h * -2)
        out[:, :, s, o] = (near * 8 - far) / (h * 12)
    return out


def loops_G(one: Case, layer: str, n: int, fisher: str) -> np.ndarray:
    """G of one sequence of its own: rows s that reach a label, weights written out."""
    g, labelled = slopes(layer, n), np.flatnonzero(one.label[n] >= 0)
    rows = range(int(labelled[-1]) + 1)
    plain = {name: digits.of(x) for name, x in one.parameters.items()}
    worlds: list[tuple[Any, Any]] = []
    if fisher == "expected":
        nats = oracles.nats(one.config, plain, one.token[n])
        worlds = [((-nats[t, v]).exp(), g[t, v]) for t in labelled for v in range(g.shape[1])]
    else:
        label = one.label[n]
        if fisher == "sampled":
            z = oracles.logits(one.config, one.parameters, one.token[n])
            label = oracles.drawn_labels(z, one.label[n], SEED, 0, n)
        worlds = [(digits.Digits(1), sum(g[t, label[t]] for t in labelled))]
    total = sum(p * np.outer(d[s], d[s]) for p, d in worlds for s in rows)
    return np.asarray(total / digits.Digits(len(rows)))


def of_mpmath(x: Any) -> Fraction:
    sign, man, exp, _ = mpmath.mpf(x)._mpf_
    return (-1) ** int(sign) * Fraction(int(man)) * Fraction(2) ** int(exp)


def misses(found: rc.Certificate, one: Case, n: int, fisher: str) -> list[str]:
    """Layers whose G of the loops lies outside its balls."""
    out = []
    for layer in LAYERS:
        with PRECISION:
            want, made = loops_G(one, layer, n, fisher), found[f"G.{layer}"]
            far = [
                abs(middle(made, at) - of_mpmath(want[at].x)) - Fraction(float(made.radius[at]))
                for at in np.ndindex(made.shape)
            ]
        if max(far) > SLACK:
            out.append(layer)
    return out


def made(one: Case, fisher: str, n: int = 1, digits_: float = 20) -> rc.Certificate:
    return certify(
        *given(one), ["G"], layers=",".join(LAYERS), fisher=fisher, seed=SEED, sequences=[n],
        digits=digits_,
    )  # fmt: skip


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "expected"])
def test_G_of_the_loops_lies_in_the_balls(fisher: str) -> None:
    one = tiny()
    found = made(one, fisher)
    assert found.digits >= 20 and not misses(found, one, 1, fisher)
    assert found.rows == {f"G.{layer}": 2 for layer in LAYERS}
    assert all(route.ulps < 1e4 for route in found.routes)
    assert found.source["fisher"] == fisher


# ------------------------------------------------------------------ planted


@contextmanager
def balls_with(**changed: Callable[..., Any]) -> Iterator[None]:
    kind = replace(attempt.BALLS, ops=replace(attempt.BALLS.ops, **changed))
    with mock.patch.object(attempt, "BALLS", kind):
        yield


def without_p(z: Any, e: np.ndarray) -> Any:
    """onehot − p, as if every entry came with probability 1."""
    half = (z - exact(z.rounded().max(axis=-1, keepdims=True))).exp()
    return 0 * z + e - half / half.sum(axis=-1, keepdims=True)


def next_u(seed: int, draw: int, index: int, length: int) -> np.ndarray:
    return uniforms(seed, draw, index, length + 1)[1:]


SENT = numbers.sent


def test_expected_labels_without_their_weights_are_caught() -> None:
    one = tiny()
    with balls_with(root_product=without_p):
        assert misses(made(one, "expected"), one, 1, "expected") == list(LAYERS)


def holds_what_is_inside() -> bool:
    """Does a root of logits known up to 1e-9 hold that of logits inside?"""
    z, e = np.random.default_rng(0).normal(size=(2, 3, 4))
    sign = np.sign(e).astype(np.int64)
    with bits(100):
        third = exact(np.array(1)) / 3
        unsure = (third * 3 - 1) / float(third.radii() * 3) * 1e-9
        wide = functions.root_product(exact(z) + unsure, sign)
        return bool(functions.root_product(exact(z + 4e-10 * e / 4), sign).within(wide).all())


def test_a_root_by_midpoints_is_caught() -> None:
    assert holds_what_is_inside()
    right = functions.root_product
    with mock.patch.object(functions, "root_product", lambda z, e: right(z.midpoints(), e)):
        assert not holds_what_is_inside()


def test_labels_of_another_uniform_are_caught() -> None:
    """Against the loops, and by the labels of the real numbers, which are others."""
    one = tiny()
    right = made(one, "sampled").source["labels"]
    with mock.patch.object(model_fisher, "uniforms", next_u):
        wrong = made(one, "sampled")
    assert right["drawn"] != wrong.source["labels"]["drawn"] and not right["other"]
    assert wrong.source["labels"]["other"] and misses(wrong, one, 1, "sampled")


def test_labels_of_another_sequence_are_caught() -> None:
    one = tiny()
    found = certify(*given(one), ["G"], fisher="sampled", seed=SEED, sequences=[0, 1], digits=5)
    drawn = found.source["labels"]["drawn"]
    assert drawn["0"] != drawn["1"]

    def other(task: Any, number: int, part: Any, ops: Any) -> Any:
        moved = replace(task, drawn={number: np.array([drawn["0"]])})
        return SENT(moved, number, part, ops)

    with mock.patch.object(numbers, "sent", other):
        assert misses(made(one, "sampled"), one, 1, "sampled")


# ------------------------------------------------------------------ the labels of real numbers


def test_each_label_is_that_of_the_loops() -> None:
    """In eighty digits: c_v against u c, position by position. Unlabelled positions have none."""
    one = case(batch=2, length=6, layers=1)
    one.label[1, 2] = -1
    with mock.patch.object(labels, "FEWEST_BITS", 8):  # too few: more are taken
        found = certify(*given(one), ["G"], layers="head", fisher="sampled", seed=5, digits=5,
                        sequences=[1, 0])  # fmt: skip
    told = found.source["labels"]
    with PRECISION:
        plain = {name: digits.of(x) for name, x in one.parameters.items()}
        for n in (0, 1):
            z = oracles.logits(one.config, plain, one.token[n])
            for t, label in enumerate(told["drawn"][str(n)]):
                if one.label[n, t] < 0:
                    assert label == -1
                    continue
                e = [mpmath.exp(x.x) for x in z[t]]
                u = mpmath.mpf(oracles.uniform(5, 0, n, t))
                assert mpmath.fsum(e[: label + 1]) > u * mpmath.fsum(e) >= mpmath.fsum(e[:label])
    assert told["same"] == (one.label >= 0).sum() == 9
    assert told["other"] == told["undecided"] == []


@contextmanager
def given_uniforms(u: float) -> Iterator[None]:
    with ExitStack() as stack:
        for where in (model_fisher, labels):
            stack.enter_context(
                mock.patch.object(where, "uniforms", lambda s, d, i, T: np.full(T, u))
            )
        yield


def test_a_label_between_two_is_undecided() -> None:
    """Two logits are one real number, and u is 1/2: no bits say on which side it lies."""
    one = case(batch=1, length=3, layers=1, vocabulary=2)
    one.parameters["head.weight"][1] = one.parameters["head.weight"][0]
    with given_uniforms(0.5), mock.patch.object(driver, "MOST_BITS", 300):
        found = certify(*given(one), ["G"], layers="head", fisher="sampled", digits=5)
    told = found.source["labels"]
    assert told["undecided"] == [[0, 0, 1], [0, 1, 1]] and not told["same"] and not told["other"]
    said = format_certificate(found.to_json())
    assert "sequence 0, position 1: float64 draws 1; undecided." in said
    said = " ".join(said.split())
    assert "0 the same" in said and "2 undecided." in said


def test_a_label_that_the_real_numbers_draw_otherwise_is_told() -> None:
    """u just below (c_0 + … + c_3) / c: a few roundings away float64 falls on the other side."""
    one = case(seed=2, batch=1, length=2)
    with PRECISION:
        plain = {name: digits.of(x) for name, x in one.parameters.items()}
        e = [mpmath.exp(x.x) for x in oracles.logits(one.config, plain, one.token[0])[0]]
        share = mpmath.fsum(e[:4]) / mpmath.fsum(e)
    told = []
    for ulps in range(4):
        u = float(share) - ulps * 2.0**-54
        with given_uniforms(u):
            found = certify(*given(one), ["G"], layers="head", fisher="sampled", digits=2)
        told += found.source["labels"]["other"]
        assert all(one[:2] == [0, 0] and one[2:] == [4, 3] for one in told)
    assert told
    source = {"fisher": "sampled", "seed": 0}
    source["labels"] = {"same": 0, "other": told[:1], "undecided": []}
    said = format_certificate({**found.to_json(), "source": source})
    assert "position 0: float64 draws 4, the real numbers 3." in said


def test_the_label_of_numbers_one_knows() -> None:
    """Four logits of 0: a quarter each, and what lies on the boundary goes to the next."""
    with bits(100):
        z = exact(np.zeros(4))
        for u, label in ((0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.74, 2), (0.75, 3)):
            assert labels.label_of(z, u) == label
        unsure = z + (exact(np.array(1)) / 3 * 3 - 1)
        assert labels.label_of(unsure, 0.5) is None and labels.label_of(unsure, 0.6) == 2


# ------------------------------------------------------------------ beside the definition


@pytest.mark.parametrize("fisher", ["sampled", "signed", "expected"])
def test_G_is_that_of_the_definition(fisher: str) -> None:
    """Of packed and padded texts with labels of their own; A stays what it is."""
    one = tiny(vocabulary=4)
    label = np.array([[0, -1, 2], [-1, 1, -1]])
    corpus = rc.Corpus(
        one.token, label, np.array([[1, 1, 1], [1, 1, 0]]), np.array([[0, 0, 1], [0, 0, 0]])
    )
    model = rc.Model(one.config, one.parameters)
    found = certify(model, corpus, ["A", "G"], fisher=fisher, seed=2, sequences=[0, 1], digits=12)
    sums = definition.factors(model, corpus, list(model.config.linear_layers()), fisher, 2)
    for name, S in sums.items():
        for side, truth, n in (("A", S.S_A, S.n_A), ("G", S.S_G, S.n_G)):
            near = found[f"{side}.{name}"].nearest
            assert found.rows[f"{side}.{name}"] == n
            assert np.abs(truth / n - near).max() <= 1e-12 * (1e-3 + np.abs(near).max()), name


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "signed", "expected"])
def test_a_rank_is_at_most_the_rows_of_all_passes(fisher: str) -> None:
    """A has one pass; G has as many as are sent back, three labels' V = 3 if all are expected."""
    found = certify(*given(tiny(mlp_width=7)), ["eigenvalues"], fisher=fisher, layers="**.down")
    wide = certify(*given(tiny(width=12)), ["eigenvalues"], fisher=fisher, layers="**.down")
    name = "blocks.0.mlp.down"
    n = found.rows[f"A.{name}"]
    assert 1 < n < 4 and found.spectra[f"A.{name}"]["zeros"] == 7 - n
    assert wide.spectra[f"G.{name}"]["zeros"] == max(12 - (9 if fisher == "expected" else 1) * n, 0)


@pytest.mark.parametrize("fisher", ["sampled", "expected"])
def test_more_bits_give_smaller_balls_inside(fisher: str) -> None:
    one = tiny()
    wide, narrow = made(one, fisher, digits_=10), made(one, fisher, digits_=40)
    assert narrow.bits > wide.bits
    for name, x in wide.items():
        y = narrow[name]
        for at in np.ndindex(x.shape):
            assert lies_inside(y, x, at)


def test_a_nothing_that_is_drawn_has_no_labels() -> None:
    one = tiny()
    assert "fisher" not in certify(*given(one), ["A"], digits=1, layers="head").source
    for fisher, seeds in (("empirical", {}), ("signed", {"seed": SEED})):
        said = made(one, fisher, digits_=1).source
        assert {k: v for k, v in said.items() if k in ("seed", "labels")} == seeds


def test_what_is_no_fisher_is_refused() -> None:
    for more, words in (
        (dict(fisher="true"), "fisher must be one of"),
        (dict(fisher=None), "fisher must be one of"),
        (dict(fisher=["sampled"]), "fisher must be one of"),
        (dict(seed=-1), "seed must be"),
        (dict(seed=None), "seed must be"),
        (dict(seed="0"), "seed must be"),
    ):
        with pytest.raises(RefcurvError, match=words):
            certify(*given(tiny()), ["G"], **more)


@pytest.mark.parametrize(
    ("of", "asked"),
    [
        ("A", dict(fisher="sampled")),
        ("logits", dict(fisher="expected")),
        ("gradient", dict(rows="all")),
        ("fisher", dict(rows="all")),
    ],
)
def test_rows_and_labels_of_nothing_are_refused(of: str, asked: dict[str, str]) -> None:
    (name,) = asked
    with pytest.raises(RefcurvError, match=f"certify: {name}=.* is of .*which `of` does not name"):
        certify(*given(tiny()), [of], layers="head", **asked)


def test_the_command_says_whose_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, corpus = given(tiny())
    weights, texts, table = (str(tmp_path / name) for name in ("w.h5", "c.h5", "t.json"))
    rc.save(model, weights)
    rc.save_corpus(corpus, texts)
    out = str(tmp_path / "c2.h5")
    assert main(["certify", weights, texts, "--of", "G", "--layers", "head", "--fisher", "sampled",
                 "--seed", "3", "--digits", "5", "--json", table, "-o", out]) == 0  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "drawn in float64 from seed 3" in said
        and "2 the same, which is proved; 0 are others" in said
    )
    labels_told = json.loads(Path(table).read_text("utf-8"))["source"]["labels"]
    assert labels_told["same"] == 2 and labels_told == rc.load_certificate(out).source["labels"]
    assert (
        main(["certify", weights, texts, "--of", "G", "--fisher", "expected", "--digits", "5"]) == 0
    )
    said = capsys.readouterr().out
    assert (
        "6 backward passes a sequence" in said and "Labels of G and the Fisher: expected." in said
    )
