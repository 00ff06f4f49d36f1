"""refcurv/sweeps: many edits at equal cost, from kept states, and a sweep that is killed."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.editing import kfac
from refcurv.editing.variants import one_sided, random_pairs
from refcurv.evaluation import decode
from refcurv.evaluation import lines as sweep_lines
from refcurv.evaluation.held import Holding, kept_bytes
from refcurv.evaluation.intervals import paired
from refcurv.evaluation.items import suffix_nats
from refcurv.evaluation.matching import text_perplexity
from refcurv.evaluation.suite import Measurement, measure
from refcurv.files import store
from refcurv.files.scratch import Scratch
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    SchemaError,
    StorageError,
)
from refcurv.model import transformer
from refcurv.model.layers import causal_layout
from refcurv.passes.below import Below
from refcurv.passes.forward import Reading
from refcurv.passes.held import Held
from refcurv.report.plots import sweep_front
from refcurv.report.sweep import format_sweep, sweep_tables
from refcurv.report.table import method_name
from refcurv.report.text import display_width
from refcurv.sweeps.methods import METHODS, methods
from refcurv.sweeps.outcomes import Outcome, marked
from refcurv.sweeps.sweep import _cost, bracket

LAYERS, IDS = 3, 23
HIGH, LOW = "blocks.2.mlp.{gate,up}", "blocks.1.mlp.up"


@pytest.fixture(scope="module")
def model() -> rc.Model:
    made = config(vocabulary=IDS, width=8, layers=LAYERS, mlp_width=10)
    stored = {name: (2 * x).astype("float32") for name, x in random_parameters(made, 3).items()}
    return rc.Model(made, {n: x.astype("float64") for n, x in stored.items()},
                    stored=dict.fromkeys(stored, "float32"))  # fmt: skip


@pytest.fixture(scope="module")
def corpus(model: rc.Model) -> rc.Corpus:
    """Texts, what the model says by itself, and answers of several lengths, in both splits."""
    rng = np.random.default_rng(0)
    made: dict[str, rc.Population] = {}
    for split, n in (("dev", 7), ("test", 9)):
        token = rng.integers(0, IDS, (n, 12)).astype(np.int32)
        token[:, 2:] = rc.greedy(model, token[:, :2], 10)  # of low perplexity, which edits raise
        length = rng.integers(6, 12, n)
        made[f"text_{split}"] = rc.Population(token, np.full(n, 2), length, "text", split)
        made[f"quotes_{split}"] = rc.own_continuations(
            model, replace(made[f"text_{split}"], tokens=token[::-1]), prompt=5, count=3
        )
        sums = token[:, ::-1].copy()
        for name, before in (("sums", 1), ("other", 2)):  # behind one beginning, and another
            sums[:, :2] = before
            made[f"{name}_{split}"] = rc.Population(
                sums.copy(), length - 3, length - 1, "answer", split
            )
    return rc.Corpus(rng.integers(0, IDS, (20, 12)), populations=made)


@pytest.fixture(scope="module")
def basis(model: rc.Model, corpus: rc.Corpus) -> rc.Bases:
    return rc.decompose(rc.collect(model, corpus, "blocks.{1-2}.mlp.{gate,up}"))


@pytest.fixture
def two_rows():
    """Batches of two rows, so that there are many."""
    with patch.object(decode, "shard_sequences", lambda _: 2):
        yield


def edited(model: rc.Model, scale: float, layers: tuple[str, ...]) -> rc.Model:
    return model.with_parameters({f"{n}.weight": scale * model.parameters[f"{n}.weight"]
                                  for n in layers})  # fmt: skip


def same(one: Measurement, other: Measurement) -> None:
    for name, measured in other.populations.items():
        found = one.populations[name]
        assert found.values == measured.values and found.interval == measured.interval, name
        for what in ("top", "right", "said"):
            a, b = getattr(found, what), getattr(measured, what)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_equal(a, b)


def some_slow(first: str, others: Iterable[str]) -> list[object]:
    return [first, *(pytest.param(x, marks=pytest.mark.slow) for x in others if x != first)]


# ------------------------------------------------------------------ kept states


CASES = {
    "whole, in memory": ((None, None), False, 2**30),
    "three, in a file": ((3, 2), True, 2**30),
    "alone, in a file": ((1, 1), True, 2**30),
    "three, little room": ((3, 2), False, 2000),
    "no room": ((None, 1), True, 0),
}


@pytest.mark.usefixtures("two_rows")
@pytest.mark.parametrize("case", some_slow("three, in a file", CASES))
def test_kept_states_change_no_bit(model, corpus, case: str, tmp_path: Path) -> None:
    """Of edits from block 1, then from block 2 and of the head."""
    how, in_file, most = CASES[case]
    states = Scratch(tmp_path, "sweep") if in_file else {}
    below = Below(0, states, most)
    for first, layers in ((1, ("blocks.1.mlp.up",)), (2, ("blocks.2.attn.q", "head")),
                          (3, ("head",))):  # fmt: skip
        below.rise(first)
        for scale in (1.3, 0.8):
            one = edited(model, scale, layers)
            held = replace(one, parameters=Held(one, *how, below))
            same(measure(held, corpus), measure(one, corpus))
    assert below.bytes <= most
    assert bool(below.bytes) == (most > 0)
    assert most < 2**20 or below.bytes == sum(x.nbytes for x in states.values())


@pytest.mark.usefixtures("two_rows")
def test_blocks_below_the_first_edited_one_are_computed_once(model, corpus) -> None:
    """All that is read, of texts and prompts; what a model says itself is computed anew."""
    below, forward = Below(2, {}, 2**30), transformer.block_forward
    many: dict[str, list[int]] = {}

    def counted(config, parameters, i, x_BTD, *rest):
        if x_BTD.shape[1] > 2:  # not a token of each of two rows, which a model said
            seen[i] += 1
        return forward(config, parameters, i, x_BTD, *rest)

    for when in ("first", "then", "higher", "highest"):
        seen = [0] * LAYERS
        if when == "higher":
            below.rise(3)
        with patch.object(transformer, "block_forward", counted):
            measure(replace(model, parameters=Held(model, None, 1, below)), corpus)
        many[when] = seen
    batches = many["first"][0]
    assert batches > 10
    assert many == {
        "first": [batches] * 3, "then": [0, 0, batches], "higher": [0, 0, batches],
        "highest": [0, 0, 0],
    }  # fmt: skip


@pytest.mark.usefixtures("two_rows")
def test_padding_is_not_taken_for_tokens(model) -> None:
    """The same ids, of which the last are padding in the population that comes first."""
    token = np.array([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])
    padded, whole = (rc.Population(token, [1, 1], [n, 5], "text", "test") for n in (3, 5))
    corpus = rc.Corpus(token, populations={"padded": padded, "whole": whole})
    held = replace(model, parameters=Held(model, None, 1, Below(2, {}, 2**30)))
    same(measure(held, corpus), measure(model, corpus))


def test_what_is_said_is_computed_by_each_model(model) -> None:
    """A batch that goes on from keys and values has no key: others may have said something else."""
    token = np.array([[3, 4]])
    layout = causal_layout(np.ones((1, 2), bool), np.zeros((1, 2), int))
    told, prompt = (Reading(token, layout, past).key() for past in (None, [None, None]))
    assert told and prompt and told != prompt
    pair = np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 2, 2))
    below, key = Below(1, {}, 2**30), Reading(token, layout, [pair, pair]).key()
    below.keep(key, [pair, pair], np.zeros((1, 2, 8)))
    assert key == b"" and below.find(key, [pair, pair]) is None and not below.bytes


def test_a_key_tells_all_that_is_read() -> None:
    """What is read, behind what, and how: none of it may be another batch's."""
    token = np.array([[3, 4, 5, 6]])
    layout = causal_layout(np.ones((1, 4), bool), np.zeros((1, 4), int))
    one = Reading(token, layout, [None])
    fields = ("position_BT", "first_BT", "last_BT")
    moved = [replace(layout, **{name: getattr(layout, name) + 1}) for name in fields]
    readings = [
        one, *(replace(one, layout=other) for other in moved), replace(one, inputs=token[:, ::-1]),
        replace(one, inputs=token.reshape(2, 2)), replace(one, told_S=np.array([1])),
        replace(one, told_S=np.array([2])), replace(one, past=None), replace(one, followed=False),
        replace(one, side_by_side=True),
    ]  # fmt: skip
    keys = {other.key() for other in readings}
    assert len(keys) == len(readings) and b"" not in keys


def test_what_does_not_fit_is_not_kept() -> None:
    below, x = Below(1, {}, 200), np.ones((1, 2, 8))
    for key in (b"first", b"then"):
        below.keep(key, None, x)
    assert below.bytes == x.nbytes == 128
    assert below.find(b"first", None) is not None and below.find(b"then", None) is None


def test_batches_that_are_alike_are_kept_once() -> None:
    """Two of them at a time, in two threads; each is found whole, and counted once."""
    both = threading.Barrier(2)

    class Slow(dict):
        def update(self, new) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.05)
            super().update(new)

    below, x = Below(1, Slow(), 2**30), np.ones((1, 2, 8))
    for first in (1, 2):
        below.rise(first)
        both.reset()
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(below.keep, b"key", None, first * x) for _ in range(2)]:
                done.result()
        assert below.bytes == x.nbytes
        at, found = below.find(b"key", None)
        assert at == first and (found == first * x).all()


@pytest.mark.usefixtures("two_rows")
def test_what_is_kept_is_foreseen(model, corpus) -> None:
    for name, one in corpus.populations.items():
        below = Below(2, {}, 2**30)
        held = replace(model, parameters=Held(model, None, 1, below))
        measure(held, replace(corpus, populations={name: one}), split=one.split)
        if one.kind == "recite":
            suffix_nats(held, one)
        assert below.bytes == kept_bytes(model, one, 2) > 0


# ------------------------------------------------------------------ methods and matches


@pytest.mark.parametrize("name", METHODS)
def test_every_method_removes_what_it_says(model, basis, name: str) -> None:
    rho = {"blocks.2.mlp.gate": 0.8, "blocks.2.mlp.up": 0.6}
    way = methods([name], basis, rho, 5)[name]
    _, record = way.cut(model, 0.3)
    want = {"blocks.2.mlp.gate": 0.85, "blocks.2.mlp.up": 0.7} if name == "kfac" else (
        dict.fromkeys(rho, 0.7))  # fmt: skip
    assert {one.layer: round(one.rho, 12) for one in record.layers} == want
    _, equal = way.same(model)
    if name == "random-pairs":
        _, kfac = rc.edit(model, basis, rho)
        assert [x.kept for x in equal.layers] == [x.kept for x in kfac.layers]
    else:
        assert {one.layer: one.rho for one in equal.layers} == rho
    assert set(basis) > set(rho)


def test_every_method_is_what_it_is_called(model, basis) -> None:
    """The same weights as by the functions, with the seed that is given."""
    rho = dict.fromkeys(found_layers(), 0.6)
    own = replace(basis, layers={name: basis[name] for name in rho})
    want = {
        "svd": rc.truncate(model, dict.fromkeys(rho, 1 - 0.3)),
        "random-basis": rc.edit(model, rc.random_basis(own, 3), 1 - 0.3),
        "random-pairs": random_pairs(model, own, 1 - 0.3, 3),
        "inputs": rc.edit(model, one_sided(own, "inputs"), 1 - 0.3),
        "outputs": rc.edit(model, one_sided(own, "outputs"), 1 - 0.3),
    }
    for name, way in methods(want, basis, rho, 3).items():
        got, _ = way.cut(model, 0.3)
        for layer in (f"{one}.weight" for one in rho):
            np.testing.assert_array_equal(got.parameters[layer], want[name][0].parameters[layer])


@pytest.mark.parametrize("on", some_slow("text_dev", ["quotes_dev"]))
def test_a_match_costs_what_kfac_costs(model, corpus, basis, on: str) -> None:
    population = corpus.populations[on]
    target = text_perplexity(rc.edit(model, basis, {HIGH: 0.7})[0], population)
    for name in ("svd", "random-pairs"):
        found = rc.match(model, basis, {HIGH: 0.7}, name, population, seed=3, tolerance=0.05)
        way = methods([name], basis, dict.fromkeys(found_layers(), 0.7), 3)[name]
        assert found.tried[0][0] == pytest.approx(way.weakest, rel=1e-12)
        cost = text_perplexity(way.cut(model, found.strength)[0], population)
        assert cost == found.perplexity and found.target == target
        assert found.matched == (abs(cost / target - 1) <= 0.05)
        assert dict(found.tried)[found.strength] == cost
    with pytest.raises(RangeError, match="nothing is cut"):
        rc.match(model, basis, 1.0, "svd", population)
    with pytest.raises(ConventionError, match="Did you mean 'random-pairs'"):
        rc.match(model, basis, 0.7, "random pairs", population)


def found_layers() -> list[str]:
    return ["blocks.2.mlp.gate", "blocks.2.mlp.up"]


def test_what_was_tried_before_narrows_a_search() -> None:
    """To the neighbours of the weakest crossing; a control that spoils all is not searched anew."""
    tried = {1e-6: 1.0, 0.9: 9.0, 0.1: 2.0, 0.3: 4.0, 0.5: 3.0}
    for target, want in ((1.5, (1e-6, 0.1)), (3.5, (0.1, 0.3)), (5.0, (0.5, 0.9)),
                         (0.5, (1e-6, 0.9)), (10.0, (1e-6, 0.9)),
                         (2.0, (1e-6, 0.3)), (3.0, (0.1, 0.3))):  # fmt: skip
        assert bracket(tried, target, 1e-6) == want
    assert bracket({}, 2.0, 1e-4) == (1e-4, 0.9)


# ------------------------------------------------------------------ the sweep

GRID = {"layers": [HIGH, LOW], "rho": [0.95, 0.8]}


@pytest.fixture(scope="module")
def found(model, corpus, basis) -> rc.Sweep:
    return rc.sweep(model, corpus, **GRID, basis=basis, methods=["svd", "random-pairs"])


def test_every_measurement_is_that_of_evaluate(model, corpus, basis, found: rc.Sweep) -> None:
    assert [(one.layers, one.rho, one.method) for one in found.edits] == [
        (layers, rho, method) for layers in (LOW, HIGH) for rho in (0.95, 0.8)
        for method in ("kfac", "svd", "random-pairs")
    ]  # fmt: skip
    for one in found.edits[3:9]:  # of both patterns
        rho = dict.fromkeys(
            (n for n in basis if n in found_layers()) if one.layers == HIGH else [LOW], one.rho
        )
        made, record = methods([one.method], basis, rho, 0)[one.method].cut(model, one.removed)
        if one.method == "kfac":
            made, record = rc.edit(model, basis, rho)
        assert one.kept == record.kept
        assert set(one.populations) == ({"dev", "test"} if one.method == "kfac" else {"test"})
        for split, left in one.populations.items():
            table = rc.evaluate(made, corpus, split=split)
            for row in table.rows:
                got = left[row.name]
                values = {k: v for k, v in got["values"].items() if k != "nats"}
                assert values == row.after and tuple(got["interval"]) == row.interval
                if row.kind != "text":
                    assert got["right"].count("1") == round(row.items * max(
                        row.after.get("strict", 0), row.after.get("accuracy", 0)))  # fmt: skip
                if row.kind == "recite":
                    nats = math.exp(got["values"]["nats"])
                    want = text_perplexity(made, corpus.populations[row.name])
                    assert nats == pytest.approx(want, rel=1e-12)


def test_methods_cost_the_same_on_dev(model, corpus, basis, found: rc.Sweep) -> None:
    matched = 0
    for one in found.edits:
        if one.method == "kfac":
            assert one.verdict == "given" and one.removed == 1 - one.rho
            target = one.populations["dev"]["text_dev"]["values"]["perplexity"]
            continue
        names = found_layers() if one.layers == HIGH else [LOW]
        way = methods([one.method], basis, dict.fromkeys(names, one.rho), 0)[one.method]
        cost = text_perplexity(way.cut(model, one.removed)[0], corpus.populations["text_dev"])
        assert (one.verdict == "matched") == (abs(cost / target - 1) <= 0.005)
        matched += one.verdict == "matched"
    assert matched


def test_a_pattern_is_matched_as_if_alone(model, corpus, basis, found: rc.Sweep) -> None:
    """What was tried for another pattern says nothing of this one."""
    texts = {n: p for n, p in corpus.populations.items() if p.kind == "text"}
    few = replace(corpus, populations=texts)
    alone = rc.sweep(model, few, [HIGH], GRID["rho"], ["random-pairs"], basis=basis)
    with patch.object(Below, "rise", side_effect=Below.rise, autospec=True) as rise:
        rc.sweep(model, few, [HIGH, LOW], [0.5], ["kfac"], match="rho", basis=basis)
    assert [call.args[1] for call in rise.call_args_list] == [1, 2]  # blocks of LOW and of HIGH
    matches = [
        [(one.rho, one.removed, one.verdict) for one in some.edits
         if (one.layers, one.method) == (HIGH, "random-pairs")] for some in (alone, found)
    ]  # fmt: skip
    assert matches[0] == matches[1] and len(matches[0]) == 2


def test_what_is_matched_is_the_cost_of_a_match(model, corpus, found: rc.Sweep) -> None:
    """Of a text and of passages, `_cost` of what was measured is what a search measures."""
    for name in ("text_dev", "quotes_dev"):
        want = text_perplexity(model, corpus.populations[name])
        assert _cost(found.baseline["dev"][name]) == pytest.approx(want, rel=1e-12)
    for nats in (None, 720.0):  # exp of 720 is beyond float64
        assert _cost({"kind": "recite", "values": {"nats": nats}}) == math.inf


def blow_up(model: rc.Model, scale: float) -> rc.Model:
    """A model whose logits are this many times as large: its perplexity is infinite, or NaN."""
    return model.with_parameters({"head.weight": scale * model.parameters["head.weight"]})


@pytest.mark.parametrize("match", ["perplexity", "forgetting"])
@pytest.mark.parametrize("scale", [1e5, math.nan])
def test_an_edit_that_costs_all_is_a_result(
    model, corpus, basis, match: str, scale: float, tmp_path: Path
) -> None:
    """Infinite, or no number: a line says so, and the sweep goes on, again from its lines too."""
    real = kfac.edit

    def edit(of: rc.Model, by: rc.Bases, rho, **more: object):
        made, record = real(of, by, rho, **more)
        bad = min(rho.values()) == 0.5 if isinstance(rho, dict) else False
        return (blow_up(made, scale) if bad else made), record

    what = {"layers": [HIGH], "rho": [0.5, 0.8], "methods": ["svd"], "match": match}
    with patch("refcurv.sweeps.methods.edit", edit):
        out = rc.sweep(model, corpus, **what, basis=basis, lines=tmp_path / "s.jsonl")
        assert rc.sweep(model, corpus, **what, basis=basis, lines=tmp_path / "s.jsonl") == out
    bad, none, *rest = out.edits
    assert (bad.method, bad.verdict, bad.rho) == ("kfac", "given", 0.5)
    text = bad.populations["test"]["text_test"]
    assert text["values"] == {"perplexity": None} and ("fault" in text) == math.isnan(scale)
    assert (none.verdict, none.removed, none.kept) == ("no target", None, None)
    assert set(none.populations["test"]) == set(out.baseline["test"])
    assert not none.front and not bad.front
    want = rc.sweep(model, corpus, **{**what, "rho": [0.8]}, basis=basis)
    assert [replace(x, front=None) for x in rest] == [replace(x, front=None) for x in want.edits]
    written = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sum(row.get("verdict") == "no target" for row in written) == 1
    shown = format_sweep(json.loads(json.dumps(out.to_json())))
    assert "no target" in shown and "not measured" in shown
    assert ("∞" in shown) != math.isnan(scale)
    assert sweep_front(out.to_json()).axes


def test_a_trial_that_is_no_number_costs_more_than_any(model, corpus, basis) -> None:
    """A method may spoil all at a strength that is only tried."""
    real, name, spoilt = text_perplexity, "blocks.2.mlp.up.weight", []

    def spoiled(of: rc.Model, population: rc.Population) -> float:
        left = np.linalg.norm(of.parameters[name]) / np.linalg.norm(model.parameters[name])
        if left < 0.99:
            spoilt.append(left)
            raise NonFiniteError("evaluate: a logit is NaN")
        return real(of, population)

    with patch("refcurv.sweeps.sweep.text_perplexity", spoiled):
        out = rc.sweep(model, corpus, [HIGH], [0.8], ["svd"], basis=basis)
    assert spoilt
    assert out.edits[1].verdict in ("matched", "overshoots", "falls short")


def test_an_edit_is_measured_once_in_a_match(model, corpus, basis) -> None:
    """Shares between two directions give one edit. What is found is what it would be without."""
    calls, apart = [], count(0, 10**6)
    real = text_perplexity

    def counted(of: rc.Model, population: rc.Population) -> float:
        calls.append(float(np.linalg.norm(of.parameters["blocks.2.mlp.up.weight"])))
        return real(of, population)

    what = {"layers": ["blocks.2.mlp.up"], "rho": [0.8, 0.6], "methods": ["svd"], "basis": basis}
    with patch("refcurv.sweeps.sweep.text_perplexity", counted):
        found = rc.sweep(model, corpus, **what)
        assert len(calls) == len(set(calls)) > 2
        few = len(calls)
        with patch("refcurv.sweeps.sweep.pairs_kept", lambda record: next(apart)):
            other = rc.sweep(model, corpus, **what)
    for one, same in zip(found.edits, other.edits, strict=True):
        assert one == replace(same, removed=one.removed)  # of one edit there are many shares
    assert len(calls) > 2 * few


def test_weights_without_a_direction_are_refused_before_the_work(
    model, corpus, basis, tmp_path: Path
) -> None:
    """By SVD; K-FAC and its controls make nothing of zeros."""
    name = "blocks.2.mlp.up.weight"
    flat = model.with_parameters({name: 0 * model.parameters[name]})
    own = replace(basis, weights=None)
    what = {"layers": [LOW, HIGH], "rho": [0.8], "lines": tmp_path / "s.jsonl", "basis": own}
    with pytest.raises(EmptyError, match=r"up.weight is all zeros.*svd out of the methods"):
        rc.sweep(flat, corpus, **what)
    bad = model.with_parameters({name: np.nan * model.parameters[name]})
    with pytest.raises(NonFiniteError, match=name):
        rc.sweep(bad, corpus, **what)
    noise = {n: replace(x, rounding=float(x.lam.sum())) if n in name else x for n, x in own.items()}
    with pytest.raises(EmptyError, match="noise"):
        rc.sweep(model, corpus, **{**what, "basis": replace(own, layers=noise, source={})})
    assert not list(tmp_path.iterdir())
    few = {**what, "layers": ["blocks.2.mlp.up"]}
    assert rc.sweep(flat, corpus, **few, methods=["random-pairs"], match="rho").edits


def test_at_equal_rho_a_control_has_the_seed_and_as_many_pairs(model, corpus, basis) -> None:
    few = replace(corpus, populations={"text_test": corpus.populations["text_test"]})
    names = ["random-pairs", "random-basis"]
    out = rc.sweep(model, few, [LOW], [0.6], names, match="rho", basis=basis, seed=3)
    assert [one.method for one in out.edits] == ["kfac", *names]
    kfac, pairs, other = out.edits
    assert pairs.kept == kfac.kept and pairs.removed == 1 - kfac.kept
    assert kfac.removed == other.removed == 1 - 0.6
    ways = methods(names, basis, {LOW: 0.6}, 3)
    for one in out.edits[1:]:
        cost = text_perplexity(ways[one.method].same(model)[0], few.populations["text_test"])
        value = one.populations["test"]["text_test"]["values"]["perplexity"]
        assert value == pytest.approx(cost, rel=1e-12)


def test_the_front_is_of_dev(found: rc.Sweep) -> None:
    """By brute force: a K-FAC edit is on it unless another is as good in both and better in one."""
    cost = {
        (one.layers, one.rho): (
            one.populations["dev"]["text_dev"]["values"]["perplexity"],
            one.populations["dev"]["quotes_dev"]["values"]["strict"],
        )
        for one in found.edits
        if one.method == "kfac"
    }
    for one in found.edits:
        a, b = cost[one.layers, one.rho]
        beaten = any((x < a and y <= b) or (x <= a and y < b) for x, y in cost.values())
        assert one.front == (not beaten)


def test_what_is_printed_of_a_sweep_is_what_was_found(found: rc.Sweep) -> None:
    """Each pattern's edits, and the p of each of them but K-FAC's; tables hold what has room."""
    draw = np.random.default_rng(0)
    made = json.loads(json.dumps(found.to_json()))
    for one in made["edits"]:  # no two of these edits are right in the same items
        for values in one["populations"]["test"].values():
            if values["right"] is not None:
                values["right"] = "".join(draw.choice(["0", "1"], 40, p=[0.3, 0.7]))
    tables = sweep_tables(made)
    for pattern in {one.layers for one in found.edits}:
        edits = [one for one in found.edits if one.layers == pattern]
        first = next(one for one in tables if one.title.startswith(pattern))
        assert [row[:4] for row in first.rows[1:]] == [
            (method_name(one.method.replace("-", " ")) + "*" * (one.front and one.method == "kfac"),
             f"{one.rho:g}", f"{100 * one.removed:.3g} %", f"{100 * one.kept:.1f} %")
            for one in edits
        ]  # fmt: skip
    judged = [name for name, one in made["baseline"]["test"].items() if one["right"] is not None]
    wanted = []
    for one in (one for one in made["edits"] if one["method"] != "kfac"):
        kfac = next(
            x for x in made["edits"]
            if (x["method"], x["rho"], x["layers"]) == ("kfac", one["rho"], one["layers"])
        )  # fmt: skip
        pairs = (
            [[x == "1" for x in it["populations"]["test"][name]["right"]] for it in (one, kfac)]
            for name in judged
        )
        wanted.append([f"{paired(*two):.2g}" for two in pairs])
    told = [one for one in tables if one.title.startswith("p of no difference")]
    rows = [list(row[2:]) for one in told for row in one.rows]
    assert judged and rows == wanted


def test_one_that_is_as_good_in_one_is_beaten() -> None:
    costs = {0.9: (2.0, 0.5), 0.8: (2.0, 0.4), 0.7: (3.0, 0.4), 0.6: (3.0, 0.1), 0.5: (3.0, 0.1)}
    edits = [
        Outcome(HIGH, rho, method, 0.1, "given", 0.5, {"dev": {
            "t": {"kind": "text", "values": {"perplexity": perplexity}},
            "q": {"kind": "recite", "values": {"strict": strict}},
        }} if method == "kfac" else {})
        for rho, (perplexity, strict) in costs.items() for method in ("kfac", "svd")
    ]  # fmt: skip
    assert [one.front for one in marked(edits)[::2]] == [False, True, False, True, True]
    assert [one.front for one in marked(edits)[1::2]] == [False, True, False, True, True]


@pytest.mark.parametrize("match", some_slow("perplexity", ["forgetting", "rho"]))
def test_a_killed_sweep_goes_on(model, corpus, basis, match: str, tmp_path: Path) -> None:
    """After any line, also half of one; the rest is as it was, and nothing is measured twice."""
    what = {"layers": [HIGH], "rho": [0.8], "basis": basis, "match": match,
            "methods": ["kfac", "svd"]}  # fmt: skip
    out = tmp_path / "s.jsonl"
    want = rc.sweep(model, corpus, **what, lines=out)
    assert want == rc.sweep(model, corpus, **what)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    kinds = [json.loads(line).get("what") for line in lines]
    assert kinds.count("edit") == 2 and kinds.count("population") == 8 + 8 + 4
    assert ("trial" in kinds) == (match != "rho")
    for n in (1, 9, len(lines) - 2, len(lines)):
        out.write_bytes(b"".join(lines[:n]))
        said: list[str] = []
        stage = Mock(goes_on=said.append)
        with patch.object(sweep_lines, "write_json_lines") as write:
            again = rc.sweep(model, corpus, **what, lines=out, stage=Mock(return_value=stage))
        assert again == want
        assert write.call_count == len(lines) - n
        assert said == ([f"{n - 1} measurements"] if n > 1 else [])
    out.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    with pytest.warns(UserWarning, match="the last line was torn off"):
        assert rc.sweep(model, corpus, **what, lines=out) == want
    assert out.read_bytes() == whole


def test_a_results_file_of_something_else_is_refused(model, corpus, basis, tmp_path) -> None:
    out = tmp_path / "s.jsonl"
    what = {"layers": [HIGH], "rho": [0.8], "basis": basis, "methods": ["kfac"]}
    rc.sweep(model, corpus, **what, lines=out)
    whole = out.read_text()
    other = {"rho": [0.7], "layers": [LOW], "seed": 1, "match": "rho", "split": "dev",
             "basis": rc.random_basis(basis, 1), "on": "text_dev"}  # fmt: skip
    for name, value in other.items():
        if name == "on":
            continue
        with pytest.raises(ConventionError, match=rf"another run: .*{name}"):
            rc.sweep(model, corpus, **{**what, name: value}, lines=out)
    fewer = replace(corpus, populations={n: p for n, p in corpus.populations.items()
                                         if n != "sums_test"})  # fmt: skip
    with pytest.raises(ConventionError, match="populations sums_test"):
        rc.sweep(model, fewer, **what, lines=out)
    with pytest.raises(ConventionError, match="another run: weights"):
        louder = edited(model, 1.1, ("blocks.0.mlp.up",))
        rc.sweep(louder, corpus, **{**what, "basis": replace(basis, weights=None)}, lines=out)
    moved = replace(corpus.populations["sums_test"],
                    prompt_length=corpus.populations["sums_test"].prompt_length - 1)  # fmt: skip
    other = replace(corpus, populations={**corpus.populations, "sums_test": moved})
    with pytest.raises(ConventionError, match="populations sums_test"):
        rc.sweep(model, other, **what, lines=out)
    turned = {n: replace(basis[n], U_A=-basis[n].U_A) for n in basis}
    with pytest.raises(ConventionError, match=r"another run: .*basis"):
        rc.sweep(model, corpus, **{**what, "basis": replace(basis, layers=turned)}, lines=out)
    narrow = {n: x.astype("float32") for n, x in model.parameters.items()}
    with pytest.raises(ConventionError, match="another run: dtype"):
        rc.sweep(replace(model, parameters=narrow, dtype="float32"), corpus, **what, lines=out)
    with patch("refcurv.sweeps.asked.describe", return_value={}):
        with pytest.raises(ConventionError, match="another run: law"):
            rc.sweep(model, corpus, **what, lines=out)
    machine = {**store.machine(), "refcurv": "0.0.1"}
    with patch("refcurv.sweeps.asked.store.machine", return_value=machine):
        with pytest.raises(ConventionError, match=r"another run: refcurv is 0\.0\.1 here"):
            rc.sweep(model, corpus, **what, lines=out)
    assert out.read_text() == whole
    for text in ('{"document": 1}\n', "not JSON\n", "[1]\n", "\n", "x"):
        out.write_text(text)
        with pytest.raises(SchemaError, match="is not what an earlier run left"):
            rc.sweep(model, corpus, **what, lines=out)
        assert out.read_text() == text


CHANGED = {
    "a number": ('"removed": 0.', '"removed": 1.'),
    "a share": ('"kept": 0.', '"kept": 1.'),
    "a type": ('"kept": ', '"kept": []+', "is not valid JSON"),
    "NaN": ('"kept": 0', '"kept": NaN, "k": 0', "NaN is not JSON"),
    "another type": ('"kept": 0', '"kept": {}, "k": 0'),
    "a kind": ('"what": "edit"', '"what": ["edit"]'),
    "flags": ('"right": "', '"right": "0'),
    "no line": ("\n", "\n\n", "is not valid JSON"),
}


def test_a_line_that_was_changed(model, corpus, basis, tmp_path) -> None:
    """By hand or by a disk: it is refused, and measured anew once it is deleted."""
    out, rest = tmp_path / "s.jsonl", {"basis": basis, "methods": ["kfac"], "match": "rho"}
    want = rc.sweep(model, corpus, [HIGH], [0.8], **rest, lines=out)
    first, *lines = out.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"edit"' in line)
    for n, (old, new, *why) in enumerate(CHANGED.values()):
        this = at + (list(CHANGED)[n] == "flags") * 2
        bad = [*lines[:this], lines[this].replace(old, new, 1), *lines[this + 1 :]]
        assert bad != lines
        out.write_text("".join([first, *bad]))
        said = why[0] if why else "was changed since it was written"
        told = (
            rf"line {this + 2 + (old == chr(10))} .*{said}.* Delete that line, and it is measured"
        )
        with pytest.raises(SchemaError, match=told):
            rc.sweep(model, corpus, [HIGH], [0.8], **rest, lines=out)
        assert out.read_text() == "".join([first, *bad])
    out.write_text("".join([first, *lines[:at], *lines[at + 1 :]]).replace("\n", "\r\n"))
    assert rc.sweep(model, corpus, [HIGH], [0.8], **rest, lines=out) == want
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted([first, *lines])


def test_two_sweeps_write_one_file(tmp_path) -> None:
    """What one wrote the other does not take away; nor what is of another sweep."""
    out, facts = tmp_path / "s.jsonl", {"seed": 0}
    one, two, other = (sweep_lines.Lines(out, f) for f in (facts, facts, {"seed": 1}))
    one.once("edit", {"rho": 0.5}, lambda: {"kept": 1})
    two.once("edit", {"rho": 0.5}, lambda: {"kept": 1})
    two.once("edit", {"rho": 0.6}, lambda: {"kept": 2})
    one.once("edit", {"rho": 0.7}, lambda: {"kept": 3})
    with patch.object(sweep_lines, "_read", side_effect=AssertionError):
        one.once("edit", {"rho": 0.7}, lambda: {})  # nobody else wrote: nothing is read again
        one.once("edit", {"rho": 0.8}, lambda: {"kept": 4})
    whole = out.read_text()
    assert [json.loads(line).get("kept") for line in whole.splitlines()] == [None, 1, 2, 3, 4]
    with pytest.raises(ConventionError, match="another run: seed is 1 here, 0 there"):
        other.once("edit", {"rho": 0.5}, lambda: {"kept": 4})
    assert out.read_text() == whole
    out.unlink()
    one.once("edit", {"rho": 0.9}, lambda: {"kept": 5})
    assert len(out.read_text().splitlines()) == 6


BAD = {
    "no layer": ({"layers": ["blocks.9.*"]}, NameUnknownError, "blocks.9"),
    "one pattern": ({"layers": HIGH}, ConventionError, "layers must be a list"),
    "a method": ({"methods": ["kfak"]}, ConventionError, "Did you mean 'kfac'"),
    "rho 1": ({"rho": [1.0]}, RangeError, "cuts nothing"),
    "rho 0": ({"rho": [0]}, RangeError, "cuts everything"),
    "rho 2": ({"rho": [0.5, 2]}, RangeError, r"rho must lie in \[0, 1\]; got 2"),
    "rho text": ({"rho": ["x"]}, RangeError, "must be a number; got 'x'"),
    "a match": ({"match": "cost"}, ConventionError, "perplexity, forgetting, rho"),
    "on": ({"on": "quotes_dev"}, ConventionError, "the dev text must be one of text_dev"),
    "on rho": ({"on": "text_dev", "match": "rho"}, ConventionError, "leave out on"),
    "split": ({"split": "train"}, ConventionError, "dev, test"),
    "seed": ({"seed": -1}, RangeError, "seed"),
    "basis": ({"layers": ["blocks.0.mlp.up"]}, ConventionError, "has no 'blocks.0.mlp.up'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_choices_end_before_the_work(model, corpus, basis, name: str, tmp_path: Path) -> None:
    wrong, error, says = BAD[name]
    what = {**GRID, "basis": basis, **wrong}
    with patch("refcurv.sweeps.sweep.measure", side_effect=AssertionError):
        with pytest.raises(error, match=says):
            rc.sweep(model, corpus, **what, lines=tmp_path / "s.jsonl")
    assert not list(tmp_path.iterdir())


def test_what_the_corpus_must_have(model, corpus, basis) -> None:
    def some(*names: str) -> rc.Corpus:
        return replace(corpus, populations={n: corpus.populations[n] for n in names})

    def run(of: rc.Corpus, **how: object) -> rc.Sweep:
        return rc.sweep(model, of, [HIGH], [0.5], ["kfac"], basis=basis, **how)

    with pytest.raises(EmptyError, match="a dev population of kind 'text'"):
        run(some("text_test", "quotes_dev"))
    with pytest.raises(EmptyError, match="no population of split 'test'"):
        run(some("text_dev"))
    dev, test = corpus.populations["text_dev"], corpus.populations["text_test"]
    wrong = replace(corpus, populations={"d": replace(dev, tokens=dev.tokens + IDS), "t": test})
    with patch("refcurv.sweeps.sweep.measure", side_effect=AssertionError):
        with pytest.raises(RangeError, match="'d'"):
            run(wrong)
    assert run(replace(corpus, populations={"b": dev, "a": dev, "t": test})).on == "b"
    alone = run(some("text_test"), match="rho")
    assert list(alone.baseline) == ["test"] and alone.edits[0].front is None
    with pytest.raises(EmptyError, match="no recite population to draw"):
        sweep_front(alone.to_json())


def test_a_full_disk_leaves_the_results_whole(model, corpus, basis, tmp_path: Path) -> None:
    out, n = tmp_path / "s.jsonl", 0
    real = sweep_lines.write_json_lines

    def full(rows, path) -> None:
        nonlocal n
        n += 1
        if n == 2:
            raise StorageError("sweep: no space left on device")
        real(rows, path)

    what = {"layers": [HIGH], "rho": [0.5], "methods": ["kfac"], "basis": basis}
    with patch.object(sweep_lines, "write_json_lines", full):
        with pytest.raises(StorageError):
            rc.sweep(model, corpus, **what, lines=out)
    assert len(out.read_text().splitlines()) == 2
    assert rc.sweep(model, corpus, **what, lines=out) == rc.sweep(model, corpus, **what)


def test_lines_say_whose_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    sweep_lines.Lines(path, {"seed": 0}).once("trial", {}, dict)
    for damage, error in (("", ConventionError), ("no JSON\n", SchemaError)):
        path.write_text(damage + path.read_text())
        for who in ("sweep", "controls"):
            with pytest.raises(error, match=f"^{who}: "):
                sweep_lines.Lines(path, {"seed": 1}, who=who)
    with patch.object(Path, "open", side_effect=OSError(5, "Input/output error")):
        with pytest.raises(StorageError, match=r"^controls: "):
            sweep_lines.Lines(path, {"seed": 0}, who="controls")


# ------------------------------------------------------------------ the command


@pytest.fixture
def files(model, corpus, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rc.save(model, "w.h5")
    rc.save_corpus(corpus, "c.h5")
    return tmp_path


WORDS = ["sweep", "w.h5", "c.h5", "-o", "s.jsonl", "--layers", HIGH, "--rho", "0.8,0.5"]


def test_the_command_line(files: Path, capsys) -> None:
    words = [*WORDS, "--methods", "kfac,svd", "--json", "s.json"]
    assert main(words) == 0
    told = capsys.readouterr()
    model, corpus = rc.load("w.h5"), rc.load_corpus("c.h5")
    want = rc.sweep(model, corpus, [HIGH], [0.8, 0.5], ["kfac", "svd"],
                    basis=rc.load_bases("s.basis.h5"))  # fmt: skip
    found = json.loads(Path("s.json").read_text())
    assert found.pop("provenance") and found == json.loads(json.dumps(want.to_json()))
    assert "4 edits; the states below the edited blocks" in told.err
    assert "K-FAC" in told.out and "p of no difference from K-FAC" in told.out
    assert "equal perplexity of text_dev (dev)" in told.out
    values = want.edits[1].populations["test"]["text_test"]["values"]
    assert f"{values['perplexity']:.2f} " in told.out
    before = Path("s.jsonl").read_bytes()
    Path("s.jsonl").unlink()
    done, write = iter(range(9)), sweep_lines.write_json_lines

    def stopped(rows: object, path: Path) -> None:
        if next(done) == 7:
            raise KeyboardInterrupt
        write(rows, path)  # type: ignore[arg-type]

    with patch.object(sweep_lines, "write_json_lines", stopped):
        assert main(words) == 130
    capsys.readouterr()
    kept = Path("s.jsonl.unfinished").read_bytes()
    assert before.startswith(kept) and not Path("s.jsonl").exists()  # under its name it is whole
    assert main(words) == 0 and capsys.readouterr().out == told.out
    assert Path("s.jsonl").read_bytes() == before and not Path("s.jsonl.unfinished").exists()
    Path("s.jsonl").write_bytes(kept)  # as earlier versions left it
    assert main(words) == 0 and not Path("s.jsonl.unfinished").exists()
    assert Path("s.jsonl").read_bytes() == before and capsys.readouterr().out == told.out
    assert main(words) == 0  # all is known
    assert Path("s.jsonl").read_bytes() == before and capsys.readouterr().out == told.out


@pytest.mark.slow
def test_factors_and_basis_are_kept_beside_the_output(files: Path, capsys) -> None:
    words = [*WORDS, "--methods", "kfac", "--match", "rho", "--plot", "s.png"]
    assert main(words) == 0
    assert Path("s.png").read_bytes()[1:4] == b"PNG" and "s.png" in capsys.readouterr().out
    corpus = rc.load_corpus("c.h5")
    packed = np.broadcast_to(np.arange(12) // 6, corpus.tokens.shape)
    rc.save_corpus(replace(corpus, segments=packed), "c2.h5")
    assert main(["sweep", "w.h5", "c2.h5", *words[3:]]) == 2
    assert "another run: collected" in capsys.readouterr().err
    kept = {p.name: p.read_bytes() for p in files.glob("s.*.h5")}
    assert sorted(kept) == ["s.basis.h5", "s.factors.h5"]
    want = rc.decompose(rc.collect(rc.load("w.h5"), rc.load_corpus("c.h5"), HIGH))
    for name, one in rc.load_bases("s.basis.h5").items():
        np.testing.assert_array_equal(one.U_G, want[name].U_G)
    Path("s.jsonl").unlink()
    with patch("refcurv.sweeps.beside.collect", side_effect=AssertionError):
        assert main(words) == 0
    Path("s.jsonl").unlink()
    for changed in (["--seed", "1"], ["--layers", LOW], ["--fisher", "empirical"], "c2.h5"):
        capsys.readouterr()
        other = ["sweep", "w.h5", changed, *words[3:]] if changed == "c2.h5" else [*words, *changed]
        assert main(other) == 2
        err = capsys.readouterr().err
        assert "'s.factors.h5' was made from other" in err and err.count("\n") == 1
        assert not Path("s.jsonl").exists()
    assert {p.name: p.read_bytes() for p in files.glob("s.*.h5")} == kept
    louder = edited(rc.load("w.h5"), 1.1, ("blocks.0.mlp.up",))
    with pytest.raises(ConventionError, match="was made from other weights"):
        rc.sweep(louder, corpus, [HIGH], [0.5], ["kfac"], match="rho", lines="s.jsonl")
    rc.save_bases(replace(want, source={}), "s.basis.h5")
    assert main(words) == 2
    assert "'s.basis.h5' was made from other factors" in capsys.readouterr().err
    assert main([*words, "--factors", "s.factors.h5"]) == 0
    assert main([*words, "--factors", "s.factors.h5", "--basis", "s.basis.h5"]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["", ".", "..", "/", "a\0b", "no/s.jsonl", "x.jsonl/"])
def test_an_output_that_is_no_file_is_refused(output: str, files: Path, capsys) -> None:
    """Before factors and basis are looked for beside it."""
    (files / "x.jsonl").mkdir()
    assert main([*WORDS, "-o", output]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("folder" in err or "is no path" in err)
    assert sorted(p.name for p in files.iterdir()) == ["c.h5", "w.h5", "x.jsonl"]


def test_what_cannot_be_drawn_is_refused_before_the_work(files: Path, corpus, capsys) -> None:
    for kind in ("text", "recite"):
        some = {n: p for n, p in corpus.populations.items() if p.kind != kind}
        rc.save_corpus(replace(corpus, populations=some), "c.h5")
        assert main([*WORDS, "--match", "rho", "--plot", "s.png"]) == 2
        assert f"no {kind} population to draw. Leave out --plot." in capsys.readouterr().err
    assert sorted(p.name for p in files.iterdir()) == ["c.h5", "w.h5"]


def test_a_layer_without_curvature_is_refused_before_the_work(
    model, corpus, basis, tmp_path
) -> None:
    """Also where it is edited last."""
    last = "blocks.2.mlp.up"
    flat = {**basis.layers, last: replace(basis[last], lam=0 * basis[last].lam)}
    with pytest.raises(EmptyError, match=f"'{last}': the curvature mass is 0"):
        rc.sweep(model, corpus, [LOW, last], [0.8], basis=replace(basis, layers=flat, source={}),
                 lines=tmp_path / "s.jsonl")  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_basis_of_other_weights_is_refused(model, corpus, basis) -> None:
    """And what is advised can be done: a sweep has no --force."""
    with pytest.raises(ConventionError, match=r"weights 000000000000\. Give the model of"):
        rc.sweep(model, corpus, [HIGH], [0.8], basis=replace(basis, weights="0" * 64))


def test_a_table_is_no_wider_than_a_terminal(found: rc.Sweep, on_terminal) -> None:
    """Every value is in it, however many populations there are."""
    wide = json.loads(json.dumps(found.to_json()))
    for left in [wide["baseline"]["test"], *(one["populations"]["test"] for one in wide["edits"])]:
        for n in range(9):
            left[f"a_population_of_a_long_name_{n}"] = left["text_test" if n % 2 else "sums_test"]
    whole = format_sweep(wide)
    assert "…" not in whole and "a population of a long name 8" in whole
    with on_terminal(80):
        text = format_sweep(wide)
    assert max(map(display_width, text.splitlines())) <= 80
    for name in found.edits[0].populations["test"]:
        assert name.removesuffix("_test") in text
    kfac = found.edits[0].populations["test"]["text_test"]["values"]["perplexity"]
    assert text.count(f"{kfac:.2f} ") == 1 + 4
    for kind in ("quotes", "text"):  # as often as there are populations of these values
        low, high = found.edits[0].populations["test"][f"{kind}_test"]["interval"]
        one = f"{low:.2f}–{high:.2f}" if kind == "text" else f"{100 * low:.1f}–{100 * high:.1f}"
        assert one in text
    assert text.count("n 9, 95 %") == 2 * (4 + 9)  # of each pattern
    assert "n: items; 95 %: the interval" in text
    assert text.count("p of no difference") == 2 * 2  # 7 populations with items right or wrong


@pytest.mark.slow
def test_a_sweep_block_by_block_finds_the_same(model, corpus, basis, tmp_path: Path) -> None:
    rc.save(model, tmp_path / "w.h5")
    lazy = rc.load(tmp_path / "w.h5")
    what = {"layers": [HIGH], "rho": [0.8], "methods": ["svd"], "basis": basis}
    want = rc.sweep(lazy, corpus, **what)
    with patch("refcurv.sweeps.sweep.holding", lambda *_: Holding(3, 2, 0)):
        assert rc.sweep(lazy, corpus, **what) == want


def test_the_front_is_the_points(found: rc.Sweep) -> None:
    figure = sweep_front(found.to_json())
    lines = figure.axes[0].get_lines()
    named = [one for one in lines if not str(one.get_label()).startswith("_")]
    assert len(named) == 6
    points = [pair for one in named for pair in zip(*one.get_data(), strict=True)]
    drawn = {(x, y) for x, y in points if not math.isnan(x)}
    want = {
        (left["text_test"]["values"]["perplexity"], left["quotes_test"]["values"]["strict"])
        for left in [found.baseline["test"], *(one.populations["test"] for one in found.edits)]
    }
    high = figure.axes[0].get_xlim()[1]
    far = {(x, y) for x, y in want if x > high}  # where a line ends
    assert drawn == want - far and far and len(drawn) > 1  # the cheapest edit is in sight
    assert "a line ends" in figure.legends[0].get_title().get_text()
    base = found.baseline["test"]["text_test"]["values"]["perplexity"]
    for place, label in zip(
        figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True
    ):
        rise = label.get_text().split("\n")[1].removesuffix(" %")
        assert place == pytest.approx(base * (1 + float(rise) / 100), rel=1e-12)
    bars = [one for one in figure.axes[0].containers if one.get_label() == "_interval"]
    lefts = [one.populations["test"] for one in found.edits]
    sure = [left[name]["interval"] for left in lefts for name in ("text_test", "quotes_test")]
    ends = {x for one in bars for c in one[2] for part in c.get_segments() for x in part.ravel()}
    assert len(bars) == len(sure) and all(
        any(x == pytest.approx(end) for x in ends) for one in sure for end in one
    )
    assert "(n 9)" in figure.axes[0].get_xlabel() and "95 %" in figure.axes[0].get_xlabel()
    assert "(n 9)" in figure.axes[0].get_ylabel()
    stars = [one for one in lines if one.get_label() == "_front"]
    assert len(stars) == sum(bool(one.front) and one.method == "kfac" for one in found.edits)
