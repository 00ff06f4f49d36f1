"""The settings of another program, recomputed: beside `collect`, loops, and what theory says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import budgets
import numpy as np
import oracles
import pytest
import test_images
from strategies import Case, assert_within, case, config, random_parameters
from test_factors import alone, corpus_of, gappy, model_of

import refcurv as rc
from refcurv.judge import case as judged
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.diagnosis import compared, recomputed
from refcurv.judge.diagnosis.deciding import joined
from refcurv.judge.diagnosis.looking import ours
from refcurv.judge.diagnosis.search import PLAIN, Idea, Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.variants import (
    REFERENCE,
    Moments,
    Setting,
    averaged,
    collecting,
    combined,
    inputs,
    moments,
    parts,
    settings,
)
from refcurv.judge.diagnosis.variants.flows import Flow, flows
from refcurv.judge.diagnosis.variants.networks import CHANGES, COARSE, Network, changed, occurring
from refcurv.judge.diagnosis.variants.positions import ONLY, cells, positions
from refcurv.judge.diagnosis.variants.rotary import ROPES
from refcurv.judge.diagnosis.variants.rounding import rounded
from refcurv.judge.diagnosis.variants.setting import PARTS, SWAPPED
from refcurv.judge.diagnosis.variants.sight import Sight, visible
from refcurv.judge.diagnosis.variants.stopped import BACKWARD
from refcurv.judge.diagnosis.work import extent
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays, of_factors
from refcurv.law import conventions
from refcurv.law.checks import Array, NonFiniteError
from refcurv.law.conventions import Fisher, Rows
from refcurv.model import transformer
from refcurv.model.config import RopeScaling
from refcurv.model.labels import shift_labels

BUDGET = 40 * budgets.path(2, 64, np.float64)


def beside(one: Case, fisher: str = "expected", layers: str = "**", **choices: object):
    """A case of the judge that has no dump."""
    model, corpus = model_of(one), corpus_of(one)
    reference = rc.collect(model, corpus, layers, fisher, **choices)
    return judged.Case(Dump("memory", {}, {}), reference, {}, Arithmetic(), model, corpus)


def of_images(fisher: str = "expected", rows: str = "all") -> judged.Case:
    """The same of a model that reads images, one of which has no label."""
    one, images = test_images.vit()
    one.label[1] = -1
    model, corpus = test_images.model_of(one), test_images.corpus_of(one, images)
    layers = "**" if rows == "all" else "{head,blocks.**}"
    reference = rc.collect(model, corpus, layers, fisher, rows=rows)
    return judged.Case(Dump("memory", {}, {}), reference, {}, Arithmetic(), model, corpus)


def under(here: judged.Case, setting: Setting, **options: int) -> dict[str, Moments]:
    """The moments of one setting."""
    ((_, found),) = moments(here, [setting], list(here.reference), **options)
    return found


def gap(one: Moments, two: Moments) -> float:
    """The larger of the two relative distances; infinite where sizes differ."""
    if (one.A.shape, one.G.shape) != (two.A.shape, two.G.shape):
        return np.inf
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


def everything(here: judged.Case, some: list[Setting]) -> dict[Setting, dict[str, list[Array]]]:
    """What moments and inputs find under some settings."""
    names = list(here.reference)
    found = {one: {n: [x.A, x.G] for n, x in of.items()} for one, of in moments(here, some, names)}
    for one, of in inputs(here, some, names):
        found[one] |= {f"{n}, alone": [A] for n, (A, _) in of.items() if one in found}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("fisher", "rows"), [("empirical", "labelled"), ("sampled", "all")])
def test_a_setting_is_the_same_whatever_a_shard_has(monkeypatch, fisher: str, rows: str) -> None:
    """One sequence alone may have no padding, no label, or no position of some kind."""
    here = beside(gappy(), fisher, rows=rows)
    assert here.model is not None and here.corpus is not None
    at = positions(here.corpus, here.model.config, here.reference.rows)
    kinds = [cells(at.of(slice(n, n + 1))) for n in range(len(at.index_B))]
    assert all({*of} < {*cells(at)} for of in kinds)
    some = [*settings(here), *(Setting(rows_A=ONLY + name) for name in cells(at))]
    whole = everything(here, some)
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 1)
    by_one = everything(here, some)
    assert {*whole} == {*by_one}
    for setting, of in whole.items():
        for name, each in of.items():
            for X, Y in zip(each, by_one[setting][name], strict=True):
                assert np.allclose(X, Y, rtol=1e-9, atol=1e-12 * np.abs(X).max()), (setting, name)


def test_runs_side_by_side_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here = beside(gappy(), "sampled", draws=2)
    some = [REFERENCE, *settings(here)][::3]
    made = []
    for cores in (1, 7):
        monkeypatch.setattr(collecting, "cores", lambda n=cores: n)
        made.append(everything(here, some))
    one, two = made
    assert list(one) == list(two) and len({x.run for x in one}) > 10
    for setting, layers in one.items():
        for name, own in layers.items():
            assert all(map(np.array_equal, own, two[setting][name])), (setting, name)


def test_under_a_limit_of_the_address_space_one_run_is_at_work(monkeypatch) -> None:
    here, taken = beside(gappy(), "empirical"), []
    monkeypatch.setattr(collecting.buffers, "address_space", lambda: 2**40)
    monkeypatch.setattr(collecting.buffers, "_taken", set())
    monkeypatch.setattr(collecting.buffers, "take_buffers", taken.append)
    monkeypatch.setattr(collecting, "cores", lambda: 5)
    assert collecting._in_flight(here.model.config, collecting.sample(here, 99)[0]) == 1
    assert taken == [2]


def test_as_many_runs_are_at_work_as_memory_holds(monkeypatch) -> None:
    here = beside(gappy(), "empirical")
    monkeypatch.setattr(collecting.buffers, "address_space", lambda: None)
    monkeypatch.setattr(collecting, "cores", lambda: 5)
    for free, runs in ((0, 1), (2**50, 5), (None, 5)):
        monkeypatch.setattr(collecting, "available", lambda free=free: free)
        assert collecting._in_flight(here.model.config, collecting.sample(here, 99)[0]) == runs


def test_runs_that_nobody_waits_for_are_told_so() -> None:
    told, begun = [], Event()

    def work(some: list[str], over: Event) -> list[str]:
        if some == ["long"]:
            begun.set()
            told.append(over.wait(60))
        return some

    runs = collecting._side_by_side([["short"], ["long"]], work, 2)
    assert next(runs) == (["short"], ["short"]) and begun.wait(60)
    del runs
    assert told == [True]


def test_what_leaves_the_range_of_the_dtype_half_way_is_left_out(monkeypatch) -> None:
    """The sums of the shards before are finite, and no sums of the whole."""
    here = beside(gappy(), "empirical")

    def broken(*of: object) -> Iterator[Flow]:
        yield next(flows(*of))
        raise NonFiniteError("nan")

    monkeypatch.setattr(collecting, "flows", broken)
    for made in (moments, inputs):
        assert not list(made(here, [REFERENCE], list(here.reference)))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["gappy", "packed", "image"])
def test_kernels_make_of_each_network_what_definitions_make(of: str, monkeypatch) -> None:
    """Where positions are hidden one by one, where dropout draws, where arrays round: too."""
    made = {"gappy": gappy, "packed": packed}
    here = of_images("sampled") if of == "image" else beside(made[of](), "sampled", draws=2)
    some = [REFERENCE, *(x for x in settings(here) if x.network or x.text != REFERENCE.text)]
    some += [Setting(network=((name, 0.1),)) for name in CHANGES if name.endswith("pass 3")]
    some += [Setting(network=((name, 0.0),)) for name in COARSE]

    def slow(*given: object, fast: bool = True) -> Network:
        return changed(*given, fast=False)

    fast = everything(here, some)
    monkeypatch.setattr(collecting, "changed", slow)
    by_definition = everything(here, some)
    assert fast.keys() == by_definition.keys() and len(fast) > 20
    for setting, layers in by_definition.items():
        for name, own in layers.items():
            for x, y in zip(own, fast[setting][name], strict=True):
                assert_within(y, x, BUDGET, np.trace(x), f"{setting.words}: {name}")


def test_logits_by_a_scale_are_those_of_a_larger_head() -> None:
    """But that the head's own gradient is times that scale."""
    here, by = beside(case(batch=3), "empirical"), 2.5
    assert here.model is not None and here.corpus is not None
    own = {name: np.asarray(x) for name, x in here.model.parameters.items()}
    larger = rc.Model(here.model.config, own | {"head.weight": by * own["head.weight"]})
    wanted = rc.collect(larger, here.corpus, ",".join(here.reference), "empirical")
    for name, one in under(here, Setting(network=(("logit scale", by),))).items():
        G = wanted[name].G * (by**2 if name == "head" else 1)
        assert_within(one.G, G, BUDGET, np.trace(G), name)
        assert_within(one.A, here.reference[name].A, BUDGET, np.trace(one.A), name)


@pytest.mark.slow
def test_no_change_leaves_the_dtype(monkeypatch) -> None:
    """Of a large model samples are in float32, and the kernels know no arrays of two dtypes."""
    one = case(
        batch=3, norm="layer", norm_place="post", qk_norm="head", rope_theta=20.0,
        rotary=("none", "main"),
    )  # fmt: skip
    here, seen = beside(one, "empirical"), set()
    some = [x for x in settings(here) if x.network]
    some += [Setting(network=((name, 0.1),)) for name in CHANGES if name.endswith("pass 3")]

    def take(flow, *more):
        seen.update(x.dtype for x in (*flow.states, *(tap.g for tap in flow.taps.values())))
        return took(flow, *more)

    took = collecting._take
    monkeypatch.setattr(collecting, "_take", take)
    found = [x for x, _ in moments(here, some, list(here.reference), dtype="float32")]
    assert {*found} == {*some} and seen == {np.dtype(np.float32)}


JOINED = {
    "LayerNorm, with gains and biases": dict(
        norm="layer", norm_bias=True, norm_place="pre", biases=("q", "k", "v", "o", "up", "down")
    ),
    "gains of 1 + w before and behind": dict(norm_offset=True, norm_place="both", gated=True),
    "no gains, in parallel": dict(norm_gain=False, norm_place="pre", residual="parallel"),
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) for x in JOINED])
def test_each_tensor_is_there_in_each_network(name: str) -> None:
    """What is taken from a pass goes together with whatever changes the pass."""
    here = beside(case(batch=2, **JOINED[name]), "empirical")
    every = settings(here)
    coarse = [Setting(network=((name, 0.0),)) for name in COARSE]  # these are tried late
    networks = [*dict.fromkeys([*(x for x in every if x.network), *coarse])]
    tensors = [x for x in every if (x.tensor_A, x.tensor_G) != ("input", "output")]
    layers = list(here.reference)
    alone = [x for x, _ in moments(here, tensors, layers)]  # of some no layer has the shape
    wanted = joined(networks, alone)
    assert len(networks) > 30 and len(alone) > 10 and len(wanted) > 300
    made = dict(moments(here, wanted, layers))
    assert {*made} == {*wanted}
    for setting, found in made.items():
        for one in found.values():
            assert np.isfinite(one.A).all() and np.isfinite(one.G).all(), setting


@pytest.mark.slow
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


@pytest.mark.parametrize(("fisher", "draws"), [("expected", 1), ("sampled", 2)])
def test_parts_add_up(fisher: Fisher, draws: int) -> None:
    here = beside(gappy(), fisher, rows="reached", draws=draws)
    found = parts(here, list(here.reference))
    assert found.exact and found.share == 1
    for name, part in found.layers.items():
        for side, at, sums in (("A", part.at_A, "sum_A"), ("G", part.at_G, "sum_G")):
            whole = found.whole(name, side, ["ordinary", "first", "prompts"]).sum(axis=0)
            ours = getattr(here.reference[name], sums)
            ours = ours / (draws if side == "G" else 1)
            assert_within(whole, ours[np.ix_(at, at)], BUDGET, np.trace(ours), f"{side} of {name}")


# ------------------------------------------------------------------ beside loops


LAYER = "blocks.0.attn.v"
"""Its gradients come from later positions too, through two blocks of attention."""


@pytest.fixture(scope="module")
def small() -> tuple[Case, list[oracles.Rows], list[Array]]:
    """Two sequences, all rows of LAYER in longdouble, and the probabilities."""
    one = tiny()
    P = one.astype(np.longdouble)
    rows = [oracles.rows(one.config, P, LAYER, token) for token in one.token]
    p = [np.exp(-oracles.nats(one.config, P, token)) for token in one.token]
    return one, rows, p


def tiny(**changes: object) -> Case:
    fields = dict(vocabulary=3, width=4, heads=2, kv_heads=2, mlp_width=4, length=4)
    one = case(3, **(fields | changes))
    label = one.label.copy()
    label[-1, 1:2] = -1  # a position in a prompt
    return replace(one, label=label)


def looped(
    small: tuple, worlds: Callable[[Array, Array, Array], list[oracles.World]], keep: Array
) -> tuple[Array, int]:
    """Σ weight · g gᵀ by `worlds` (p, labels, tokens of a sequence), and the rows."""
    one, rows, p = small
    total, n = 0, 0
    for b in range(len(rows)):
        some = worlds(p[b], one.label[b], one.token[b])
        _, S_G, count = oracles.factor_sums(rows[b], some, keep[b])
        total, n = total + S_G, n + count
    return total, n


def every_labelling(q_TV: Array, at: list[int]) -> list[tuple[float, dict[int, int]]]:
    """Each way to label these positions, and its probability."""
    ways = itertools.product(range(q_TV.shape[1]), repeat=len(at))
    return [
        (
            np.prod([q_TV[t, v] for t, v in zip(at, way, strict=True)]),
            dict(zip(at, way, strict=True)),
        )
        for way in ways
    ]


def labelled(label: Array) -> list[int]:
    return [t for t, v in enumerate(label) if v >= 0]


def one_way(labels: dict[int, int]) -> list[oracles.World]:
    return [(1, {(t, v): 1 for t, v in labels.items()})]


def joint_columns(p: Array, label: Array, _: Array) -> list[oracles.World]:
    return [(1, {(t, v): np.sqrt(p[t, v]) for t in labelled(label)}) for v in range(p.shape[1])]


def one_uniform(p: Array, label: Array, _: Array) -> list[oracles.World]:
    """u lies in the interval of every label at once: a product of intervals."""
    c, at = np.cumsum(p, axis=1), labelled(label)
    out = []
    for way in itertools.product(range(p.shape[1]), repeat=len(at)):
        pairs = list(zip(at, way, strict=True))
        low = max(c[t, v] - p[t, v] for t, v in pairs)
        high = min(c[t, v] for t, v in pairs)
        out.append((max(high - low, 0), {pair: 1 for pair in pairs}))
    return out


def tempered(p: Array, label: Array, _: Array) -> list[oracles.World]:
    q = p**2 / (p**2).sum(axis=1, keepdims=True)  # temperature 1/2
    ways = every_labelling(q, labelled(label))
    return [(weight, {(t, v): 1 for t, v in way.items()}) for weight, way in ways]


def nucleus(p: Array, label: Array, _: Array) -> list[oracles.World]:
    q = p.copy()
    for t in range(len(p)):
        order = sorted(range(len(p[t])), key=lambda v: -p[t, v])
        for rank, v in enumerate(order):
            if sum(p[t, w] for w in order[:rank]) >= 0.8:
                q[t, v] = 0
    ways = every_labelling(q / q.sum(axis=1, keepdims=True), labelled(label))
    return [(weight, {(t, v): 1 for t, v in way.items()}) for weight, way in ways]


def smoothed(p: Array, label: Array, _: Array) -> list[oracles.World]:
    out = []
    V = p.shape[1]
    for weight, way in every_labelling(p, labelled(label)):
        back = {(t, v): 0.1 / V + 0.9 * (v == y) for t, y in way.items() for v in range(V)}
        out.append((weight, back))
    return out


def smoothed_gold(p: Array, label: Array, _: Array) -> list[oracles.World]:
    V = p.shape[1]
    at = labelled(label)
    return [(1, {(t, v): 0.1 / V + 0.9 * (v == label[t]) for t in at for v in range(V)})]


def argmax(p: Array, label: Array, _: Array) -> list[oracles.World]:
    return one_way({t: int(np.argmax(p[t])) for t in labelled(label)})


def double_shift(_: Array, label: Array, __: Array) -> list[oracles.World]:
    at = [t for t in range(len(label) - 1) if label[t + 1] >= 0]  # also where there was none
    return one_way({t: int(label[t + 1]) for t in at})


def drawn_then_shifted(p: Array, label: Array, _: Array) -> list[oracles.World]:
    ways = every_labelling(p, [t for t in labelled(label) if t > 0])
    return [(weight, {(t - 1, v): 1 for t, v in way.items()}) for weight, way in ways]


def no_shift(_: Array, label: Array, token: Array) -> list[oracles.World]:
    return one_way({t: int(token[t]) for t in labelled(label)})


def own_everywhere(_: Array, label: Array, token: Array) -> list[oracles.World]:
    return one_way(dict(enumerate(token)))


def own_labels(_: Array, label: Array, token: Array) -> list[oracles.World]:
    return one_way({t + 1: int(label[t]) for t in labelled(label)})


def own_with_first(_: Array, label: Array, token: Array) -> list[oracles.World]:
    return one_way({t: int(token[t]) for t in range(len(label)) if label[max(t - 1, 0)] >= 0})


def argmax_everywhere(p: Array, label: Array, _: Array) -> list[oracles.World]:
    return one_way({t: int(np.argmax(p[t])) for t in range(len(label))})


def at_last(p: Array, label: Array, _: Array) -> list[oracles.World]:
    at = [*labelled(label), len(label) - 1]
    return [(p[t, v], {(t, v): 1}) for t in at for v in range(p.shape[1])]


def at_prompts(p: Array, label: Array, _: Array) -> list[oracles.World]:
    return [(p[t, v], {(t, v): 1}) for t in range(len(label) - 1) for v in range(p.shape[1])]


def gold_at_prompts(_: Array, label: Array, token: Array) -> list[oracles.World]:
    return one_way({t: int(token[t + 1]) for t in range(len(label) - 1)})


@pytest.mark.parametrize(
    ("setting", "worlds"),
    [
        (Setting(labels="argmax"), argmax),
        (Setting(labels="joint"), joint_columns),
        (Setting(labels="one uniform"), one_uniform),
        (Setting(labels="tempered", amount=0.5), tempered),
        (Setting(labels="nucleus", amount=0.8), nucleus),
        (Setting(smoothing=0.1), smoothed),
        (Setting(labels="empirical", smoothing=0.1), smoothed_gold),
        (Setting(labels="double shift"), double_shift),
        (Setting(labels="no shift"), no_shift),
        (Setting(labels="drawn, then shifted"), drawn_then_shifted),
        (Setting(labels="no shift", where="every token"), own_everywhere),
        (Setting(labels="no shift", where="labelled tokens"), own_labels),
        (Setting(labels="no shift", where="labelled tokens and first ones"), own_with_first),
        (Setting(labels="argmax", where="every token"), argmax_everywhere),
        (Setting(where="last"), at_last),
        (Setting(where="prompts"), at_prompts),
        (Setting(labels="empirical", where="ignored prompts"), gold_at_prompts),
    ],
    ids=lambda x: getattr(x, "words", ""),
)
def test_other_labels_are_the_loops(small: tuple, setting: Setting, worlds: Callable) -> None:
    """G against those labels, every drawn labelling enumerated with its probability."""
    one = small[0]
    keep = oracles.reached(one.label, one.real, one.segment)
    S_G, n = looped(small, worlds, keep)
    found = under(beside(one, layers=LAYER), setting)[LAYER]
    assert found.n_G == n
    assert_within(found.G, S_G / n, LOOPS, np.trace(S_G) / n, setting.words)
    assert_within(found.A, under(beside(one, layers=LAYER), REFERENCE)[LAYER].A, 1e-12, 1, "A")


LOOPS = 1e-10
"""Relative to tr G.  Chosen: the oracle's central differences in longdouble are good to 2e-11."""


def test_an_estimated_mean_is_near_the_mean() -> None:
    """Eight draws of signs, or of u, or of one sign for all positions, over sixty sequences."""
    here = beside(case(2, batch=60), layers="blocks.0.*.{v,down}")
    for setting in (
        REFERENCE,
        Setting(labels="one uniform"),
        Setting(labels="joint"),
        Setting(labels="tempered", amount=0.5),
    ):
        exact, rough = under(here, setting), under(here, setting, most=0)
        for name, one in exact.items():
            assert one.exact and not rough[name].exact
            error = float(np.linalg.norm(one.G - rough[name].G) / np.linalg.norm(one.G))
            assert 0 < error < 0.5, (setting.words, name, error)
            assert one.n_G == rough[name].n_G


# ------------------------------------------------------------------ other arithmetic


def interleaved(
    x: Array, position: int, theta: float, width: int = 0, scaling=None, length: int = 0
) -> Array:
    out = x.copy()
    for j in range(len(x) // 2):
        c, s = (f(position * theta ** (-2 * j / len(x))) for f in (np.cos, np.sin))
        u, v = x[2 * j], x[2 * j + 1]
        out[2 * j], out[2 * j + 1] = u * c - v * s, u * s + v * c
    return out


def coarse_rotation(part: str, dtype: str) -> Callable:
    """`oracles.rotate` in halves, of which a part is rounded, one pair after another."""

    def short(x: float) -> float:
        return float(rounded(np.array([x]), dtype)[0])

    def turned(
        x: Array, position: int, theta: float, width: int = 0, scaling=None, length: int = 0
    ) -> Array:
        out, half = x.copy(), len(x) // 2
        for j in range(half):
            f, p = theta ** (-2 * j / len(x)), float(position)
            f = f if part == "tables" else short(f)
            angle = short(short(p) * f) if part == "angles" else p * f
            c, s = math.cos(angle), math.sin(angle)
            c, s = (c, s) if part == "frequencies" else (short(c), short(s))
            u, v = x[j], x[j + half]
            out[j], out[j + half] = u * c - v * s, u * s + v * c
        return out

    return turned


def tiled(attention: Callable, sides: str = "kv") -> Callable:
    def every(q, k, v, visible, scale=None, cap=None):
        H, K = q.shape[1], k.shape[1]
        of = {x: [h % K if x in sides else h // (H // K) for h in range(H)] for x in "kv"}
        return attention(q, k[:, of["k"]], v[:, of["v"]], visible, scale, cap)

    return every


def outside(x: Array, gain: Array, eps: float) -> Array:
    return gain * x / (np.sqrt((x @ x) / len(x)) + eps)


def unbiased(x: Array, gain: Array, eps: float) -> Array:
    return gain * (x - x.mean()) / np.sqrt(x.var(ddof=1) + eps)


def sees_documents(config, i, segment, t, s) -> bool:
    return s <= t


def counts_positions(config, i, segment, t, s) -> bool:
    """Documents of three tokens see each other; a window is of positions in one's own."""
    return s <= t and (not config.windows[i] or t % 3 - s % 3 < config.windows[i])


def sees_ahead(config, i, segment, t, s) -> bool:
    """What comes later is hidden where a window is."""
    window = config.windows[i]
    return segment[s] == segment[t] and (not window or 0 <= t - s < window)


def sees_both_sides(config, i, segment, t, s) -> bool:
    window = config.windows[i]
    return segment[s] == segment[t] and (not window or abs(t - s) < window)


def sees_next(config, i, segment, t, s) -> bool:
    window = config.windows[i]
    return segment[s] == segment[t] and t - s >= -1 and (not window or t - s < window)


def sees_one_less(config, i, segment, t, s) -> bool:
    window = config.windows[i]
    return segment[s] == segment[t] and t >= s and (not window or t - s < window - 1)


WINDOWS = {"windows": (2, 0)}

ARITHMETIC = {
    "a position sees the next": (WINDOWS, {}, {"sees": sees_next}),
    "windows of one less": (WINDOWS, {}, {"sees": sees_one_less}),
    "documents see each other, windows count positions": (WINDOWS, {}, {"sees": counts_positions}),
    "no causal mask where no window is": (WINDOWS, {}, {"sees": sees_ahead}),
    "no causal mask, windows on both sides": (WINDOWS, {}, {"sees": sees_both_sides}),
    "rotary pairs interleaved": (dict(head_width=4), {}, {"rotate": interleaved}),
    **{
        name: (dict(head_width=4), {}, {"rotate": coarse_rotation(*some)})
        for name, some in ROPES.items()
    },
    "grouped heads tiled": (dict(kv_heads=2), {}, {"attention": tiled(oracles.attention)}),
    "grouped keys tiled": (dict(kv_heads=2), {}, {"attention": tiled(oracles.attention, "k")}),
    "grouped values tiled": (dict(kv_heads=2), {}, {"attention": tiled(oracles.attention, "v")}),
    "eps outside the root": (dict(norm_eps=0.1), {}, {"norm": outside}),
    "variance over d − 1": (dict(norm="layer", norm_eps=0.1), {}, {"layer_norm": unbiased}),
    "documents see each other": ({}, {}, {"sees": sees_documents}),
    "no causal mask": ({}, {"causal": False}, {}),
    "rotary base": (dict(head_width=4), {"rope_theta": 1e4}, {}),
    "eps": ({}, {"norm_eps": 1e-8}, {}),
    "gain and gain − 1": ({}, {"norm_offset": True}, {}),
    "LayerNorm and RMSNorm": ({}, {"norm": "layer"}, {}),
    "activation gelu": ({}, {"activation": "gelu"}, {}),
    "no score scale": ({}, {"score_scale": 1.0}, {}),
    "no QK-norm": ({}, {"qk_norm": "none"}, {}),
    "no soft-cap of scores": (dict(score_cap=0.5), {"score_cap": None}, {}),
    "no soft-cap of logits": (dict(logit_cap=0.5), {"logit_cap": None}, {}),
    "residual parallel": ({}, {"residual": "parallel"}, {}),
}
"""name → (the model, what the oracle's configuration has instead, what its functions are)."""


SLOWER = (
    "rotary angles in bfloat16",
    "rotary angles in float16",
    "rotary tables in bfloat16",
    "rotary frequencies in bfloat16",
)
"""Of which others of the same kind are run with every test."""

TOP = "blocks.1.mlp.down"
"""Its input has been through all of both blocks."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in SLOWER else ()) for x in ARITHMETIC],
)
def test_other_arithmetic_is_the_loops(name: str, monkeypatch) -> None:
    """A behind it all, beside the oracle with the same change; G too where functions differ."""
    fields, changed, functions = ARITHMETIC[name]
    one = tiny(**(dict(heads=4, batch=1, length=6) | fields))
    segment = np.array([[0, 0, 0, 1, 1, 1]])
    one = replace(one, segment=segment, label=np.array([[1, 2, -1, -1, 0, -1]]))
    here = beside(one, layers=f"{LAYER},{TOP}")
    level = changed.get("rope_theta", changed.get("norm_eps", 0.0))
    setting = Setting(network=((name, level),))
    assert setting in settings(here)
    found, true = under(here, setting), under(here, REFERENCE)
    for function, other in functions.items():
        monkeypatch.setattr(oracles, function, other)
    config, P = replace(one.config, **changed), one.astype(np.longdouble)
    record: dict[oracles.Place, Array] = {}
    z = oracles.logits(config, P, one.token[0], segment[0], None, record)
    keep = oracles.reached(one.label, one.real, one.segment)[0]
    a = np.array([record[TOP, t] for t in np.flatnonzero(keep)])
    A = a.T @ a / len(a)
    assert_within(found[TOP].A, A, LOOPS, np.trace(A), f"A under {name}")
    assert gap(found[LAYER], true[LAYER]) > 1e-8
    if functions:
        rows = oracles.rows(config, P, LAYER, one.token[0], segment[0])
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        worlds = oracles.worlds(p, one.label[0], "expected")
        _, S_G, n = oracles.factor_sums(rows, worlds, keep)
        assert_within(found[LAYER].G, S_G / n, LOOPS, np.trace(S_G) / n, f"G under {name}")


class Kept:
    """Numbers that are made in one forward of the loops, and are the same in all others."""

    def __init__(self) -> None:
        self.known: list[Any] = []
        self.done = False
        self.at = 0

    def __call__(self, make: Callable[[], Any]) -> Any:
        if not self.done:
            self.known.append(make())
            return self.known[-1]
        self.at += 1
        return self.known[(self.at - 1) % len(self.known)]


def with_kept_weights(kept: Kept) -> Callable:
    def attention(q, k, v, visible, scale=None, cap=None):
        k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))

        def weights() -> Array:
            score = np.einsum("the,she->ths", q, k) / np.sqrt(q.dtype.type(q.shape[2]))
            score = np.where(visible[:, None], score, -np.inf)
            p = np.exp(score - score.max(axis=-1, keepdims=True))
            return p / p.sum(axis=-1, keepdims=True)

        return np.einsum("ths,she->the", kept(weights), v)

    return attention


OWN_ACTIVATED = oracles.activated

LOW = "blocks.0.mlp.down"
"""Attention of another block lies behind it."""

DETACHED = {
    "attention weights detached": ({}, {"attention": with_kept_weights}),
    "norm statistics detached": (
        {},
        {
            "norm": lambda kept: (
                lambda x, gain, eps: gain * x * kept(lambda: 1 / np.sqrt((x @ x) / len(x) + eps))
            )
        },
    ),
    "norm statistics detached, of LayerNorm": (
        dict(norm="layer"),
        {
            "layer_norm": lambda kept: (
                lambda x, gain, eps: (
                    gain * (x - x.mean()) * kept(lambda: 1 / np.sqrt(x.var() + eps))
                )
            )
        },
    ),
    "gate detached": (
        {},
        {"activated": lambda kept: lambda kind, z: kept(lambda: OWN_ACTIVATED(kind, z))},
    ),
}


@pytest.mark.parametrize("name", DETACHED)
def test_what_is_detached_is_a_constant_of_the_loops(name: str, monkeypatch) -> None:
    """The loops take from the first forward what a program detaches; A is the same."""
    fields, functions = DETACHED[name]
    one = tiny(**(dict(heads=4, kv_heads=2, batch=1, length=4, gated=True) | fields))
    one = replace(one, token=np.array([[0, 1, 2, 1]]), label=np.array([[1, 2, 1, -1]]))
    here = beside(one, layers=LOW)
    setting = Setting(network=((name.partition(",")[0], 0.0),))
    assert setting in settings(here)
    found, true = under(here, setting), under(here, REFERENCE)
    kept = Kept()
    for function, other in functions.items():
        monkeypatch.setattr(oracles, function, other(kept))
    P, segment = one.astype(np.longdouble), one.segment[0]
    z = oracles.logits(one.config, P, one.token[0], segment)
    kept.done = True
    rows = oracles.rows(one.config, P, LOW, one.token[0], segment)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    worlds = oracles.worlds(p, one.label[0], "expected")
    keep = oracles.reached(one.label, one.real, one.segment)[0]
    _, S_G, n = oracles.factor_sums(rows, worlds, keep)
    assert_within(found[LOW].G, S_G / n, LOOPS, np.trace(S_G) / n, f"G under {name}")
    assert setting.network[0][0] in BACKWARD and np.array_equal(found[LOW].A, true[LOW].A)
    assert gap(found[LOW], true[LOW]) > 1e-8


# ------------------------------------------------------------------ rows, sums and tensors


def flowed(one: Case, layer: str, kind: str = "empirical") -> tuple[list[Array], list[Array]]:
    """a (T, I) and g (T, O) of each sequence, padding too where it is real in `one`."""
    P = one.astype(np.longdouble)
    a, g = [], []
    for b in range(len(one.token)):
        rows = oracles.rows(one.config, P, layer, one.token[b], one.segment[b])
        (world,) = oracles.worlds(
            np.exp(-oracles.nats(one.config, P, one.token[b])), one.label[b], kind
        )
        a.append(rows.a_SI)
        g.append(oracles.carried(rows.g_TVSO, world[1]))
    return a, g


def square(rows: list[Array]) -> Array:
    return sum(np.outer(x, x) for x in rows)


@pytest.fixture(scope="module")
def three() -> tuple[judged.Case, list[Array], list[Array], Array]:
    """Three sequences, gold labels: a case, a and g by the oracle, and the rows."""
    one = tiny(batch=3)
    a, g = flowed(one, LAYER)
    keep = oracles.reached(one.label, one.real, one.segment)
    return beside(one, "empirical", LAYER), a, g, keep


def test_other_rows_are_the_loops(three: tuple) -> None:
    here, a, g, keep = three
    label = here.corpus.label
    first = np.arange(keep.shape[1]) == 0
    times = {
        "with last": np.ones_like(keep),
        "without prompts": keep & (label >= 0),
        "without first": keep & ~first,
        "without first, with last": ~first | np.zeros_like(keep),
        "first twice": keep + (keep & first).astype(int),
    }
    for name, many in times.items():
        found = under(here, Setting(rows_A=name, rows_G=name))[LAYER]
        for x, X, n in ((a, found.A, found.n_A), (g, found.G, found.n_G)):
            places = [bt for bt in np.ndindex(keep.shape) for _ in range(int(many[bt]))]
            want = square([x[b][t] for b, t in places])
            assert n == many.sum()
            assert_within(X, want / n, LOOPS, np.trace(want) / n, name)
        alone = under(here, Setting(rows_A=name))[LAYER]
        assert (alone.A == found.A).all() and gap(alone, under(here, REFERENCE)[LAYER]) > 0
    n = under(here, Setting(rows_A="with last", count="reference"))[LAYER].n_A
    assert n == keep.sum()
    for name, n in (("sequences", 3), ("labels", (label >= 0).sum()), ("positions", keep.size)):
        one = under(here, Setting(count=name))[LAYER]
        assert (one.n_A, one.n_G) == (n, n)


def test_other_sums_are_the_loops(three: tuple) -> None:
    here, a, g, keep = three
    inside = [[x[b][keep[b]] for b in range(3)] for x in (a, g)]
    every = [np.concatenate(x) for x in inside]
    n = len(every[0])

    def batched(size: int, flat: bool, often: bool) -> Array:
        out = []
        for begin in range(0, 3, size):
            some = [g[b] * keep[b][:, None] for b in range(begin, min(begin + size, 3))]
            if flat:
                rows = keep[begin : begin + size].sum()
                out += [sum(x.sum(axis=0) for x in some) / rows] * (rows if often else 1)
            else:
                out += [row for t, row in enumerate(sum(some) / len(some)) if keep[begin, t]]
        return square(out) / len(out)

    mean = [x.mean(axis=0) for x in every]
    wanted = {
        Setting(pooling_A="sum", pooling_G="sum"): [
            square([x.sum(axis=0) for x in side]) / 3 for side in inside
        ],
        Setting(pooling_A="mean", pooling_G="mean"): [
            square([x.mean(axis=0) for x in side]) / 3 for side in inside
        ],
        Setting(pooling_A="centred", pooling_G="centred"): [
            square(x) / n - np.outer(m, m) for x, m in zip(every, mean, strict=True)
        ],
        **{
            Setting(pooling_G=name, batch=size): [
                square(every[0]) / n,
                batched(size or 3, "rows" in name, "row by row" in name),
            ]
            for name in ("batch", "batch and rows", "batch and rows, row by row")
            for size in (1, 2, 0)
        },
    }
    found = dict(moments(here, list(wanted), [LAYER]))
    for setting, (A, G) in wanted.items():
        one = found[setting][LAYER]
        assert_within(one.A, A, LOOPS, np.trace(square(every[0])), f"A, {setting.words}")
        assert_within(one.G, G, LOOPS, np.trace(square(every[1])), f"G, {setting.words}")


def padded() -> tuple[Case, Array, Array]:
    """Two sequences, the second of three tokens and a padding; real, and the rows."""
    one = tiny(batch=2)
    real = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    label = np.array([[1, 0, 2, -1], [2, 0, -1, -1]])
    return replace(one, real=real, label=label), real, oracles.reached(label, real, one.segment)


def test_padding_as_if_it_were_real_is_a_corpus_without_padding() -> None:
    one, _, _ = padded()
    full = replace(one, real=np.ones_like(one.real))
    want = rc.collect(model_of(full), corpus_of(full), "**", "empirical", rows="all")
    every = Setting(rows_A="with pads", rows_G="with pads", pads="all")
    for name, found in under(beside(one, "empirical"), every).items():
        assert_within(found.A, want[name].A, BUDGET, np.trace(want[name].A), f"A of {name}")
        scale = np.trace(want[name].G) + 1e-9  # saturated heads leave rounding alone
        assert_within(found.G, want[name].G, BUDGET, scale, f"G of {name}")


def test_padding_may_see_the_text_and_not_itself(monkeypatch) -> None:
    one, real, _ = padded()
    here = beside(one, "empirical", TOP)
    found = under(here, Setting(rows_A="with pads", pads="real"))[TOP].A
    record: dict[oracles.Place, Array] = {}
    a = []
    for b in range(2):
        monkeypatch.setattr(
            oracles, "sees", lambda config, i, segment, t, s, b=b: s <= t and real[b, s]
        )
        record.clear()
        oracles.logits(one.config, one.astype(np.longdouble), one.token[b], None, None, record)
        a += [record[TOP, t] for t in range(4)]
    assert_within(found, square(a) / 8, LOOPS, np.trace(found), "A")


def test_padding_may_see_itself_alone() -> None:
    """It is then a document of its own, whose positions begin anew."""
    one, real, _ = padded()
    full = replace(one, real=np.ones_like(real), segment=np.where(real, one.segment, 9))
    want = rc.collect(model_of(full), corpus_of(full), TOP, "empirical", rows="all")[TOP].A
    found = under(beside(one, "empirical", TOP), Setting(rows_A="with pads", pads="apart"))[TOP].A
    assert_within(found, want, BUDGET, np.trace(want), "A")
    at = positions(corpus_of(one), one.config, Rows.ALL)
    layout = Network(one.config, {}, pads="apart").layout(at)
    s = np.arange(real.shape[1])
    seen = (layout.first_BT[..., None] <= s) & (s <= layout.last_BT[..., None])
    assert np.array_equal(visible(at, Sight(), 0, "apart"), seen)


def test_padding_on_the_left_is_read_as_text() -> None:
    one, _, rows = padded()
    found = under(
        beside(one, "empirical", LAYER),
        Setting(network=(("padding attended on the left", 0.0),)),
    )[LAYER]
    token, label, real = one.token.copy(), one.label.copy(), np.ones_like(one.real)
    for array in (token, label, rows):
        array[1] = np.roll(array[1], 1)
    a, g = flowed(replace(one, token=token, label=label, real=real), LAYER)
    for X, x in ((found.A, a), (found.G, g)):
        want = square([x[b][t] for b, t in np.argwhere(rows)]) / rows.sum()
        assert_within(X, want, LOOPS, np.trace(want), "left")


def test_a_bidirectional_model_may_attend_to_padding() -> None:
    one, _, _ = padded()
    one = replace(one, config=replace(one.config, causal=False))
    full = replace(one, real=np.ones_like(one.real))
    want = rc.collect(model_of(full), corpus_of(full), TOP, "empirical", rows="labelled")[TOP]
    here = beside(one, "empirical", TOP, rows="labelled")
    found = under(here, Setting(network=(("padding attended", 0.0),)))[TOP]
    assert_within(found.A, want.A, BUDGET, np.trace(want.A), "A")
    assert gap(found, under(here, REFERENCE)[TOP]) > 1e-3


@pytest.mark.parametrize(
    ("places", "causal", "other"),
    [
        ({"rope_theta": None, "learned_positions": 9}, False, True),
        ({"rope_theta": 1e4}, False, True),
        ({"rope_theta": None}, False, False),  # a set has no left
        ({"rope_theta": None}, True, True),  # but what comes before is on the left
    ],
)
def test_the_side_of_padding_counts_where_positions_do(places, causal, other) -> None:
    token = np.arange(18).reshape(2, 9) % 5
    mask = (np.arange(9) < [[9], [6]]).astype(np.uint8)
    corpus = rc.Corpus(token, np.where(mask > 0, token, -1), mask=mask)
    made = config(causal=causal, **places)
    found = {name for name, _ in occurring(made, positions(corpus, made, Rows.ALL))}
    assert ("padding attended on the left" in found) == other


def test_a_bidirectional_model_may_attend_to_padding_on_the_left() -> None:
    """Each position sees another one in another distance; padding sees all, or itself alone."""
    one, _, _ = padded()
    one = replace(one, config=replace(one.config, causal=False))
    token, label, real = one.token.copy(), one.label.copy(), one.real.copy()
    for array in (token, label, real):
        array[1] = np.roll(array[1], 1)
    full = replace(one, token=token, label=label, real=np.ones_like(real))
    want = rc.collect(model_of(full), corpus_of(full), TOP, "empirical", rows="labelled")[TOP]
    here = beside(one, "empirical", TOP, rows="labelled")
    left, alone = (
        Setting(network=((name, 0.0),))
        for name in (
            "padding attended on the left",
            "padding, which sees itself alone, attended on the left",
        )
    )
    assert {left, alone} <= {*settings(here)}
    found = under(here, left)[TOP]
    assert_within(found.A, want.A, BUDGET, np.trace(want.A), "A")
    assert gap(found, under(here, Setting(network=(("padding attended", 0.0),)))[TOP]) > 1e-3
    layout = Network(one.config, {}, left=True, pads="apart").layout(
        positions(corpus_of(one), one.config, Rows.ALL).rolled()
    )
    s = np.arange(real.shape[1])
    seen = (layout.first_BT[..., None] <= s) & (s <= layout.last_BT[..., None])
    assert np.array_equal(seen, real[:, :, None] | ~real[:, None])
    assert (layout.position_BT == s).all()


@pytest.mark.parametrize("place", ["pre", "post", "both"])
def test_other_tensors_are_what_the_oracle_records(place: str) -> None:
    one = tiny(norm_place=place, batch=1)
    here, P = beside(one, "empirical"), one.astype(np.longdouble)
    record: dict[oracles.Place, Array] = {}
    oracles.logits(one.config, P, one.token[0], None, None, record)
    keep = np.flatnonzero(oracles.reached(one.label, one.real, one.segment)[0])

    def read(layer: str) -> Array:
        return np.array([record[layer, t] for t in keep])

    at = "blocks.1."
    gate, up = (read(f"{at}mlp.up") @ P[f"{at}mlp.{k}.weight"].T for k in ("gate", "up"))
    wanted = {
        "attention's input": read(f"{at}attn.q"),
        "context": read(f"{at}attn.o"),
        "attention's output": read(f"{at}attn.o") @ P[f"{at}attn.o.weight"].T,
        "mlp's input": read(f"{at}mlp.up"),
        "gate's output": gate,
        "up's output": up,
        "activation": gate / (1 + np.exp(-gate)),
        "hidden": read(f"{at}mlp.down"),
        "mlp's output": read(f"{at}mlp.down") @ P[f"{at}mlp.down.weight"].T,
        "mlp's output before": read("blocks.0.mlp.down") @ P["blocks.0.mlp.down.weight"].T,
    }
    if place == "post":  # nothing stands between the stream and what reads it
        wanted |= {"stream between": read(f"{at}mlp.up")}
    for name, x in wanted.items():
        found = under(here, Setting(tensor_A=name))
        for layer in (f"{at}attn.v", f"{at}mlp.down"):
            if layer in found:
                A = x.T @ x / len(keep)
                assert_within(found[layer].A, A, LOOPS, np.trace(A), f"{name} for {layer}")
    for short, name in (("attn", "attention's"), ("mlp", "mlp's")):
        if place == "pre":
            continue
        gain = f"{at}{short}_{'norm' if place == 'post' else 'post_norm'}"
        x = wanted[f"{name} output"]
        x = np.array([oracles.norm(row, P[f"{gain}.weight"], one.config.norm_eps) for row in x])
        found = under(here, Setting(tensor_A=f"{name} update"))[f"{at}attn.v"]
        assert_within(found.A, x.T @ x / len(keep), LOOPS, np.trace(x.T @ x), f"{name} update")
    if place != "post":
        before, between, behind = (
            under(here, Setting(tensor_A=name))
            for name in ("norm's input", "stream between", "stream behind")
        )
        assert (before[f"{at}attn.q"].A == behind["blocks.0.attn.q"].A).all()
        assert (before[f"{at}mlp.up"].A == between[f"{at}mlp.up"].A).all()
        assert gap(before[f"{at}attn.q"], between[f"{at}attn.q"]) > 1e-3


@pytest.mark.parametrize("place", ["post", "both"])
def test_behind_a_norm_g_is_the_gradient_of_its_bias(place: str) -> None:
    """Of sequences of one position, which a bias does not sum over."""
    one = tiny(norm_place=place, norm_bias=True, length=1)
    one.label[:] = [[1], [2]]
    here = beside(one, "empirical")
    slopes = [
        rc.loss_and_gradient(here.model, one.token[b : b + 1], one.label[b : b + 1])[1]
        for b in range(2)
    ]
    found = under(here, Setting(tensor_G="update"))
    for layer, part in (("attn.o", "attn"), ("mlp.down", "mlp")):
        for block in ("blocks.0.", "blocks.1."):
            name = f"{block}{part}_{'norm' if place == 'post' else 'post_norm'}.bias"
            G = square([slope[name] for slope in slopes]) / 2
            assert_within(found[block + layer].G, G, BUDGET, np.trace(G), f"{block}{layer}")
            # the sum that is behind this norm is what the next layers or their norm read
            after = f"{block}mlp.up" if part == "attn" else "blocks.1.attn.k"
            if (block, part) != ("blocks.1.", "mlp"):
                read = under(here, Setting(tensor_G="stream"))[after]
                assert_within(read.G, G, BUDGET, np.trace(G), f"{after} reads {block}{part}")


def test_of_two_layers_each_has_the_gradient_of_the_other() -> None:
    """All pairs of a block whose outputs are of one size, where they are offered."""
    here = beside(case(batch=3, mlp_width=8), "empirical")
    true, tried = under(here, REFERENCE), []
    for setting in settings(here):
        if setting.tensor_G in SWAPPED:
            tried.append(SWAPPED[setting.tensor_G])
            found = under(here, setting)
            for name, one in found.items():
                block, _, kind = name.rpartition(".")
                other = {*tried[-1]} - {kind}
                assert kind in tried[-1] and len(other) == 1
                (other,) = other
                block = f"{block.rpartition('.')[0]}.{PARTS[other]}"
                assert (one.G == true[f"{block}.{other}"].G).all()
                assert (one.A == true[name].A).all()
    width = {"q": 8, "k": 4, "v": 4, "o": 8, "gate": 8, "up": 8, "down": 8}
    assert tried == [(x, y) for x, y in itertools.combinations(PARTS, 2) if width[x] == width[y]]


def test_behind_the_activation_g_is_not_yet_multiplied_by_its_slope() -> None:
    """Of one row, g of gate is d f'(gate); and g of down W_down is that of what down reads."""
    one = tiny(batch=1, length=1)
    one.label[:] = 1
    here = beside(one, "empirical")
    found, true = under(here, Setting(tensor_G="activation")), under(here, REFERENCE)
    W, at = one.parameters, "blocks.0.mlp."
    record: dict[oracles.Place, Array] = {}
    oracles.logits(one.config, one.parameters, one.token[0], None, None, record)
    gate = W[f"{at}gate.weight"] @ record[f"{at}gate", 0]
    s = 1 / (1 + np.exp(-gate))
    slope = s * (1 + gate * (1 - s))
    G = true[f"{at}gate"].G / np.outer(slope, slope)
    assert_within(found[f"{at}gate"].G, G, BUDGET, np.trace(G), "gate")
    G = W[f"{at}down.weight"].T @ true[f"{at}down"].G @ W[f"{at}down.weight"]
    assert_within(found[f"{at}up"].G, G, BUDGET, np.trace(G), "up")
    inner = under(here, Setting(tensor_G="input"))[f"{at}down"].G
    assert_within(inner, G, BUDGET, np.trace(G), "down's input")
    weights = [(k, W[f"{at}{k}.weight"]) for k in ("gate", "up")]
    gates = [w.T @ true[at + k].G @ w for k, w in weights]
    both = under(here, Setting(tensor_G="shared input"))[f"{at}up"].G
    assert np.trace(both) <= 2 * sum(map(np.trace, gates)), "the square of a sum of two"
    assert gap(Moments(both, 1, both, 1), Moments(gates[1], 1, gates[1], 1)) > 1e-3


# ------------------------------------------------------------------ what theory says


def test_O13_joint_columns_agree_where_positions_do_not_mix() -> None:
    here = beside(case(batch=3))
    joint, true = under(here, Setting(labels="joint")), under(here, REFERENCE)
    for name in ("blocks.1.attn.o", "blocks.1.mlp.down", "head"):
        assert gap(joint[name], true[name]) < 1e-13, name
    assert gap(joint["blocks.1.attn.v"], true["blocks.1.attn.v"]) > 0.01


def test_O41_the_trace_of_the_head_tells_the_labels() -> None:
    """Per row, 1 − Σp² of drawn labels, 1 − 2 p_max + Σp² of the likeliest, 1 − 2 p_y + Σp²."""
    one = case(batch=3)
    here = beside(one, layers="head")
    z = rc.logits(here.model, one.token)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    has = one.label >= 0
    square_p, top = (p**2).sum(axis=-1)[has], p.max(axis=-1)[has]
    own = np.take_along_axis(p, np.maximum(one.label, 0)[..., None], -1)[..., 0][has]
    for labels, trace in (
        ("reference", 1 - square_p),
        ("argmax", 1 - 2 * top + square_p),
        ("empirical", 1 - 2 * own + square_p),
    ):
        G = under(here, Setting(labels=labels))["head"].G
        assert np.trace(G) == pytest.approx(trace.mean(), rel=1e-12)


def test_the_mean_stands_for_labels_that_nobody_knows() -> None:
    """Of a reference that is drawn, the mean over labels is the reference that is expected."""
    one = gappy()
    drawn, expected = beside(one, "sampled", seed=3), beside(one, "expected")
    for setting in (REFERENCE, Setting(where="last"), Setting(labels="tempered", amount=0.7)):
        got, want = under(drawn, averaged(setting)), under(expected, setting)
        assert max(gap(got[name], want[name]) for name in want) < 1e-12
    assert gap(under(drawn, REFERENCE)["head"], under(expected, REFERENCE)["head"]) > 1e-3


# ------------------------------------------------------------------ the record


def test_what_differs_is_named_and_combined() -> None:
    two = combined(Setting(labels="empirical"), Setting(rows_A="with last"))
    assert two is not None
    assert (two.faults, two.sides) == (("B15", "B27"), {"A", "G"})
    assert two.words == "labels empirical, rows of A with last"
    assert combined(Setting(labels="empirical"), Setting(labels="argmax")) is None
    assert combined(Setting(count="labels"), Setting(pooling_A="sum")) is None
    some = [Setting(network=((name, 0.0),)) for name in ("no QK-norm", "grouped heads tiled")]
    both = combined(*some)
    assert both is not None and both.faults == ("B54", "B52")
    assert combined(some[0], some[0]) is None
    assert REFERENCE.faults == () and REFERENCE.sides == frozenset()
    assert Setting(rows_A="with pads", count="reference").faults == ("B29",)
    assert Setting(labels="argmax", mean=True).sides == {"G"}


def test_a_pair_is_both_at_once(three: tuple) -> None:
    here = three[0]
    pair = combined(Setting(pooling_A="centred"), Setting(labels="argmax"))
    assert pair is not None
    both = under(here, pair)[LAYER]
    assert (both.A == under(here, Setting(pooling_A="centred"))[LAYER].A).all()
    assert (both.G == under(here, Setting(labels="argmax"))[LAYER].G).all()


AT_LAST = ("last", "every token")
"""Where labels are that nothing but a text's last position may have."""


def test_what_cannot_occur_is_not_tried() -> None:
    """No padding, no packing, no caps, no grouped heads: none of their faults."""
    here = beside(case(kv_heads=4, batch=1))
    offered = settings(here)
    names = {name for s in offered for name, _ in s.network}
    assert not names & {
        "documents see each other", "padding attended on the left", "grouped heads tiled",
        "no soft-cap of logits", "no windows", "no embedding scale",
    }  # fmt: skip
    assert not {"B19", "B25", "B28"} & {
        id for s in offered if s.where not in AT_LAST for id in s.faults
    }
    without = judged.Case(here.dump, here.reference, {}, Arithmetic())
    assert settings(without) == []
    assert {"B25"} <= {id for s in settings(beside(shared_pad())) for id in s.faults}


def test_of_texts_of_one_token_none_is_left_out() -> None:
    """Without their start token nothing would be left to read."""
    one = case(batch=3, length=1)
    here = beside(replace(one, label=(one.token + 1) % one.config.vocabulary), "empirical")
    assert all(found for _, found in moments(here, settings(here), list(here.reference)))


def shared_pad() -> Case:
    """Padding by a token that the text has too."""
    one = gappy()
    token = one.token.copy()
    token[~one.real] = token[0, 2]
    return replace(one, token=token)


def test_a_sample_says_so() -> None:
    here = beside(case(batch=8), "empirical")
    found = under(here, REFERENCE, limit=13)["head"]
    assert (found.share, found.n_A) == (2 / 8, 10)
    assert parts(here, ["head"], limit=13).sequences.tolist() == [0, 7]


@pytest.mark.slow
def test_images_too() -> None:
    for rows in ("all", "cls"):
        here = of_images(rows=rows)
        model, reference = here.model, here.reference
        found = dict(moments(here, [REFERENCE, *settings(here)], list(reference)))
        for name, moment in found[REFERENCE].items():
            ours = reference[name]
            assert (moment.n_A, moment.n_G) == (ours.n_A, ours.n_G)
            assert_within(moment.A, ours.A, BUDGET, np.trace(ours.A), f"A of {name}")
            assert_within(moment.G, ours.G, BUDGET, np.trace(ours.G) + 1e-9, f"G of {name}")
        assert len(found) > 20
        each = 1 if rows == "cls" else model.config.image.positions
        assert (
            parts(here, list(reference)).kept.tolist()
            == (each * (here.corpus.label[:, 0] >= 0)).tolist()
        )


def test_inputs_alone_need_no_backward(monkeypatch) -> None:
    here = beside(gappy(), "empirical")
    wanted = [REFERENCE, *settings(here)]
    both = dict(moments(here, wanted, list(here.reference)))
    monkeypatch.setattr(transformer, "block_backward", None)
    alone = dict(inputs(here, wanted, list(here.reference)))
    assert alone.keys() >= both.keys()
    for setting, layers in both.items():
        for name, one in layers.items():
            A, n = alone[setting][name]
            assert n == one.n_A
            assert_within(A, one.A, 1e-14, np.trace(one.A), f"{setting.words}, {name}")


def test_a_joint_input_has_a_last_coordinate_that_is_one() -> None:
    """A of a layer that is judged with its bias is A_joint, also where only inputs are read."""
    here = beside(case(2, biases=("up", "down")), layers="blocks.*.mlp.*")
    names = [name for name in here.reference if here.reference[name].sum_a is not None]
    joint = replace(here, joint=frozenset(names), known={})
    assert names
    for _, found in moments(joint, [REFERENCE], names):
        for name, one in found.items():
            want = here.reference[name].A_joint
            assert_within(one.A, want, 1e-12, np.trace(want), name)
            assert one.A[-1, -1] == 1
    for _, means in inputs(joint, [REFERENCE], names):
        assert all(A.shape == here.reference[name].A_joint.shape for name, (A, _) in means.items())


def test_a_sample_keeps_matrices_of_the_last_layers_alone(monkeypatch) -> None:
    """As `_verify` asks, a few layers at a time: all of them would be all of ours in memory."""
    one = beside(case(batch=8), "empirical")
    here = replace(one, dump=of_factors(one.reference), matched={x: x for x in one.reference})
    runs = []
    monkeypatch.setattr(
        compared, "moments", lambda *of, **more: runs.append(of[1]) or moments(*of, **more)
    )

    def held(known: object) -> set[str]:
        some = list(known.items()) if isinstance(known, dict) else list(enumerate(known))
        inner = [held(x) for _, x in some if isinstance(x, dict | tuple | list)]
        return {name for name, x in some if isinstance(x, Moments)}.union(*inner)

    for layers in (["blocks.0.mlp.up"], ["blocks.1.mlp.up"], ["blocks.1.mlp.up", "head"]):
        for limit in (13, 26, 13):
            assert list(compared.by_setting(here, layers, [Setting(labels="argmax")], limit))
        assert held(here.known) == {*layers}
    assert runs.count([REFERENCE]) == 2 * 3
    both = REFERENCE, Setting(labels="argmax")
    one, two = (compared.made_on(here, ["head"], 13, x) for x in both)
    assert (one["head"].A == two["head"].A).all() and (one["head"].G != two["head"].G).any()


def sides(table: dict[str, dict[tuple[Idea, str], float]]) -> dict[str, Side]:
    """Both sides, and what of an error is left by an idea in a layer."""
    found = {name: Side(name) for name in "AG"}
    for name, lefts in table.items():
        for (idea, layer), error in lefts.items():
            found[name].add(idea, layer, Left(error, 1.0))
    return found


def test_on_a_sample_each_setting_is_tried_once_in_the_same_layers(monkeypatch) -> None:
    """What counts is the layer of which it leaves most; of two that agree on a side, the first."""
    one, errors, runs = Setting(labels="argmax"), {"x": 0.7, "y": 0.2, "z": 0.4}, []
    idea, twin = Idea(one.faults, one), replace(one, rows_A="with last")

    def each(_case, layers, wanted, limit, _under):
        runs.append((*layers, limit, *wanted))
        return [(s, [("G", x, idea, Left(errors[x], 1.0)) for x in layers]) for s in wanted]

    monkeypatch.setattr(recomputed, "by_setting", each)
    here = beside(case(), "empirical")
    found = sides({"G": {(PLAIN, "x"): 1.0, (PLAIN, "y"): 2.0, (PLAIN, "z"): 0.5}})
    for layers, worst in ((["x", "y"], 0.7), (["y"], 0.1), (["x", "z"], 0.8), (["x", "y"], 0.7)):
        for limit in (8, 2):
            got = recomputed._on_some(here, found, layers, [one, twin], limit)
            assert got == {("G", one): (pytest.approx(worst), one)}
    assert sum(one in run for run in runs) == 2 * 3
    # where ours is no multiple of theirs, what a setting leaves counts as it is
    far = sides({"G": {(PLAIN, "x"): np.inf}})
    for error in (0.7, np.inf):
        errors["x"] = error
        here.known.clear()
        got = recomputed._on_some(here, far, ["x"], [one], 8)
        assert got == {("G", one): (error, one)}


def test_what_is_known_of_both_sides_and_all_layers_is_not_run_again() -> None:
    one = Setting(network=(("no windows", 0.0),))
    idea = Idea(one.faults, one)
    some, every = {(idea, "x"): 0.5}, {(idea, "x"): 0.5, (idea, "y"): 0.5}
    for A, G, known in ((every, every, True), (every, some, False), (every, {}, False)):
        assert recomputed._tried(sides({"A": A, "G": G}), ["x", "y"], one) == known
        assert recomputed._tried(sides({"A": G, "G": A}), ["x", "y"], one) == known


@pytest.mark.parametrize(("exact", "entered"), [("", 4), ("a", 3), ("ab", 4)])
def test_what_leaves_more_than_the_exact_one_is_run_no_more(exact, entered, monkeypatch) -> None:
    """But all of the run that is exact, and what leaves of the sample as much as that does."""
    some = dict(
        a=Setting(labels="argmax"), c=Setting(labels="no shift"), d=Setting(labels="double shift"),
        b=Setting(labels="argmax", pooling_G="mean"),
    )  # fmt: skip
    left = dict(zip(some.values(), (0.1, 0.1005, 0.5, 0.9), strict=True))
    names = {one: name for name, one in some.items()}
    run, kept = [], []
    for name, stub in {
        "is_large": lambda _: False, "extent": lambda _: 100, "few_positions": lambda _: 10,
        "_best": lambda *_: left, "_enter": lambda _, one: kept.extend(one),
        "by_setting": lambda _c, _l, wanted, _n: ((x, run.append(x) or [x]) for x in wanted),
        "_enough": lambda _f, _l, group: names[group[0]] in exact,
    }.items():  # fmt: skip
        monkeypatch.setattr(recomputed, name, stub)
    recomputed.recompute(beside(case(), "empirical"), sides({}), ["x"], list(left))
    assert [names[x] for x in kept] == [names[x] for x in run] == [*"abcd"][:entered]


@pytest.mark.parametrize(("sampled", "most"), [(True, recomputed.HOPEFUL), (False, np.inf)])
def test_a_sample_leaves_nothing_out_where_it_may_not(sampled, most, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(recomputed, "is_large", lambda _: False)
    monkeypatch.setattr(recomputed, "few_positions", lambda _: 6)
    monkeypatch.setattr(recomputed, "MOST", 0)
    monkeypatch.setattr(recomputed, "_best", lambda *of: asked.append(of[-2]) or {})
    one = beside(case(batch=4), "empirical")
    recomputed.recompute(one, sides({}), ["x"], [Setting(labels="argmax")], sampled)
    assert asked == [most]


def test_a_sample_says_what_a_setting_changes_in_ours() -> None:
    """Labels that are the reference's own change nothing, however few sequences tell."""
    one = beside(case(batch=8), "empirical")
    here = replace(one, dump=of_factors(one.reference), matched={x: x for x in one.reference})
    own = Setting(labels="empirical")
    ((_, entries),) = compared.by_setting(here, ["blocks.0.mlp.up"], [own], 13)
    assert entries and all(left.error < 1e-12 for *_, left in entries)


@pytest.fixture
def watched(monkeypatch):
    """Factors, theirs by other labels, more positions than a sample has; runs on all, and finals.

    A is ours, so that nothing is run for it.
    """
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (24, 9))
    corpus, layer = rc.Corpus(tokens), "blocks.1.mlp.up"
    labels = np.full(tokens.shape, -1)
    labels[:, :8] = rc.logits(model, tokens)[:, :8].argmax(-1)
    truth = rc.collect(model, corpus, layer, "empirical")
    theirs = rc.collect(model, rc.Corpus(tokens, labels=labels), layer, "empirical")
    whole, tried = [], []

    def counted(case, wanted, layers, limit, **more):
        for setting, made in moments(case, wanted, layers, limit, **more):
            whole.extend([setting] if limit >= corpus.label.size else ())
            yield setting, made

    monkeypatch.setattr(compared, "moments", counted)
    for module in (recomputed, compared):
        monkeypatch.setattr(module, "few_positions", lambda _: 198)
    best = recomputed._best
    monkeypatch.setattr(recomputed, "_best", lambda *of: tried.append(best(*of)) or tried[-1])
    return lambda given: rc.validate(given, truth, model=model, corpus=corpus), theirs, whole, tried


@pytest.mark.parametrize("crowd", [128, 8])
def test_what_is_exact_ends_the_runs_on_all_sequences(watched, crowd, monkeypatch):
    """Also where the many are first tried on a part of the sample."""
    monkeypatch.setattr(recomputed, "CROWD", crowd)
    validate, theirs, whole, tried = watched
    assert [cause.fault for cause in validate(theirs).causes] == ["B16"]
    assert {one.labels for one in whole} == {"argmax"}, whole
    assert max(map(len, tried)) == recomputed.BEST


@pytest.mark.parametrize("least", [0.05, 0.99])
def test_nothing_is_run_on_all_sequences_without_hope(watched, least, monkeypatch):
    """Rows and columns are scaled by chance, which no setting does; on a sample few come nearer."""
    monkeypatch.setattr(recomputed, "HOPEFUL", least)
    validate, theirs, whole, tried = watched
    name, one = next(iter(theirs.items()))
    by = np.random.default_rng(0).uniform(0.3, 1.7, len(one.G))
    verdict = validate({name: {"A": one.A, "G": one.G * by * by[:, None], "n": one.n_A}})
    assert not verdict.passed and not any(one.fault for one in verdict.causes)
    assert bool(whole) == (least > 0.9) and {*whole} <= {one for few in tried for one in few}
    assert all(left < least for few in tried for left in few.values())


@pytest.mark.parametrize("pads", ["real", "all"])
def test_padding_makes_no_text_longer(pads):
    """Rotary frequencies of longrope are those of the text, and padding has its document's."""
    scaling = RopeScaling(kind="longrope", original=4, short=(1.5,), long=(6.0,))
    one = case(3, batch=2, rope_theta=20.0, rope_scaling=scaling)
    real = np.arange(6) < np.array([[4], [6]])
    one = replace(one, real=real, label=shift_labels(one.token, real, one.segment))
    here = beside(one, "empirical", "blocks.*.{attn.o,mlp.up}")
    for name, found in under(here, Setting(pads=pads)).items():
        assert_within(found.A, here.reference[name].A, BUDGET, np.trace(found.A), name)
    rows = Setting(rows_A="with pads", rows_G="with pads", pads=pads)
    short = replace(one.config, rope_scaling=replace(scaling, original=9))  # of any text here
    alike = [replace(alone(one, 0), config=config) for config in (one.config, short)]
    both = [under(beside(x, "empirical", "blocks.*.{attn.o,mlp.up}"), rows) for x in alike]
    for name, found in both[0].items():
        assert_within(found.A, both[1][name].A, BUDGET, np.trace(found.A), name)


def test_of_a_sample_what_comes_beside_a_fault_is_told_the_better() -> None:
    """It begins at what the fault makes of all, so that the fault itself is no noise."""
    here = beside(case(batch=60, rope_theta=100.0, head_width=4), "empirical")
    first, second = (("rotary base", 777.0),), (("score scale", 0.6),)
    base, pair = Setting(network=first), Setting(network=first + second)
    theirs = {x: (one.A, one.G, one.n_A) for x, one in under(here, pair).items()}
    here = replace(here, dump=of_arrays(theirs), matched={x: x for x in theirs})
    layers = [x for x in here.reference if x.endswith("mlp.up")]
    found = {name: Side(name) for name in "AG"}
    for layer in layers:
        for name, left in ours(here, layer).items():
            found[name].add(PLAIN, layer, left)
    every = extent(here)
    recomputed._enter(found, compared.entries(here, layers, [base], every))
    for limit in (every // 6, every // 2, every - 9):
        alone = recomputed._on_some(here, found, layers, [base], limit, base)
        assert {share for share, _ in alone.values()} == {1.0}
    shares = recomputed._on_some(here, found, layers, [pair], every - 9, base)
    assert all(share < 0.2 for share, _ in shares.values())
