"""What is said before the work: how long, how much memory and disk."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays_of, config, configs, random_parameters
from test_room import peak

import refcurv as rc
from refcurv.algebra import attention
from refcurv.curvature import bases, factors, forecast, plan, room
from refcurv.curvature.bases import decompose_each
from refcurv.curvature.forecast import PROBE, Forecast, of_decomposition
from refcurv.curvature.plan import block_bytes, head_bytes, passed, rounding_runs, trace_bytes
from refcurv.law.conventions import NO_LABEL, Bias, Fisher
from refcurv.model import transformer
from refcurv.model.config import ModelConfig, Norm, NormPlace, QKNorm, Residual
from refcurv.passes.fast import FAST
from refcurv.passes.rounding import looked_at, other_runs
from refcurv.passes.shards import shards
from refcurv.passes.sweep import Sweep, sweep, sweep_of
from refcurv.report.printed import format_forecast


def test_the_line() -> None:
    found = Forecast(12, "33,500 tokens", 240.0, int(1.31 * 2**30), 780_000_000)
    assert format_forecast(found) == (
        "12 layers, 33,500 tokens: about 4 min, 1.3 GiB of memory, 780.0 MB on disk"
    )
    assert format_forecast(Forecast(1, "", 7.0, 2**28, 5000)) == (
        "1 layer: about 7 s, 0.25 GiB of memory, 5.0 kB on disk"
    )


def wide() -> rc.Model:
    made = config(vocabulary=300, width=16, head_width=4, mlp_width=300, layers=3)
    return rc.Model(made, random_parameters(made, 1))


@pytest.mark.parametrize(
    ("fisher", "draws"), [("sampled", 1), ("signed", 3), ("empirical", 1), ("expected", 1)]
)
def test_a_collection_takes_about_what_is_foretold(fisher: str, draws: int, monkeypatch) -> None:
    """A clock that counts: a pass takes its positions, twice that backward, each time."""
    monkeypatch.setattr("refcurv.law.conventions.SHARD_TOKENS", 12)
    clock, spent = [0.0], []
    for module, kept in ((forecast, False), (factors, True)):

        def passing(
            made: ModelConfig, parameters, unit, job, take, *rest, right=module.sweep, kept=kept
        ) -> None:
            passes = job.cotangents(unit, made.vocabulary)
            cost = unit.layout.position_BT.size * (1 + 2 * len(list(passes)))
            clock[0] += cost
            if kept:
                spent.append(cost)
            right(made, parameters, unit, job, take, *rest)

        monkeypatch.setattr(module, "sweep", passing)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    made = config(vocabulary=5)
    model = rc.Model(made, random_parameters(made, 1))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 5, (5, 6)))
    said: list[Forecast] = []

    def told(found: Forecast) -> None:
        assert not spent, "said after the work has begun"
        said.append(found)

    rc.collect(model, corpus, "blocks.*.mlp.*", fisher, draws=draws, in_flight=1, told=told)
    assert (said[0].layers, said[0].of) == (6, "30 tokens")
    assert said[0].seconds == pytest.approx(sum(spent), rel=1e-12)


def test_the_memory_is_about_what_is_foretold(monkeypatch) -> None:
    """Less what the process has already. A trace is counted whole, and sums as triangles."""
    model, said = wide(), []
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 300, (16, 64)))
    monkeypatch.setattr(room, "used", lambda: 0)

    def work() -> None:
        rc.collect(model, corpus, "blocks.*.mlp.*", in_flight=1, told=said.append)

    work()  # what is made once
    used = peak(work)
    assert 0.7 * used <= said[0].memory <= 1.5 * used
    sizes = [model.config.linear_layers()[f"blocks.0.mlp.{name}"] for name in ("up", "down")]
    assert said[0].disk >= 3 * 8 * sum(a * a + b * b for a, b in sizes)


NARROW = dict(
    width=53, heads=6, kv_heads=2, head_width=14, mlp_width=83, norm_place=NormPlace.PRE,
    qk_norm=QKNorm.NONE,
)  # fmt: skip
"""Widths of which no few sum up to another."""

EVERY_BIAS = ("q", "k", "v", "o", "gate", "up", "down")
KINDS = {
    "pre": {},
    "post": dict(norm_place=NormPlace.POST),
    "both": dict(norm_place=NormPlace.BOTH),
    "parallel": dict(residual=Residual.PARALLEL),
    "parallel, layer": dict(residual=Residual.PARALLEL, norm=Norm.LAYER),
    "parallel, both": dict(residual=Residual.PARALLEL, norm_place=NormPlace.BOTH),
    "shared": dict(residual=Residual.SHARED),
    "layer": dict(norm=Norm.LAYER, norm_bias=True, biases=EVERY_BIAS),
    "normed heads": dict(qk_norm=QKNorm.HEAD),
    "normed together": dict(qk_norm=QKNorm.FULL),
    "clipped": dict(qkv_clip=0.8),
    "without a gate": dict(gated=False),
    "not turned": dict(rope_theta=None),
    "windows": dict(windows=(9, 8)),
}
"""Each way in which blocks differ in what they hold."""


def kept_of(made: ModelConfig, dtype: type) -> float:
    """Bytes of all arrays that the blocks' traces keep, over what is foretold."""
    token = np.zeros((3, 61), dtype=int)
    ones = np.ones(token.shape, dtype=bool)
    layout = transformer.layout_of(made, ones, np.zeros_like(token))
    parameters = {name: x.astype(dtype) for name, x in random_parameters(made, 0).items()}
    _, trace = transformer.forward(made, parameters, token, layout, FAST)
    whole = [x if x.base is None else x.base for x in arrays_of(trace.blocks)]
    known = {id(x) for x in (*parameters.values(), layout.first_BT)}
    kept = sum({id(x): x.nbytes for x in whole if id(x) not in known}.values())
    return kept / (made.layers * trace_bytes(made, token.shape, np.dtype(dtype).itemsize))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_takes_what_is_foretold(kind: str, dtype: type) -> None:
    """Every array that is kept, once; of windows and gains a few numbers more."""
    assert kept_of(config(**NARROW | KINDS[kind]), dtype) == pytest.approx(1, abs=0.002)


@given(configs(), st.sampled_from([np.float32, np.float64]))
def test_a_trace_of_any_model_takes_what_is_foretold(made: ModelConfig, dtype: type) -> None:
    made = replace(
        made, width=53, mlp_width=83, head_width=14, learned_positions=0, rope_scaling=None
    )  # a scaling counts the pairs of a head
    assert kept_of(made, dtype) == pytest.approx(1, abs=0.01)


@pytest.fixture
def seen_tiles(monkeypatch) -> None:
    """Attention whose tiles `peak` sees: what makes them is not compiled."""
    for name in ("attention_forward", "attention_backward", "_head", "_slopes", "bend"):
        kernel = getattr(attention, name)
        monkeypatch.setattr(attention, name, getattr(kernel, "py_func", kernel))


HEADS = dict(width=17, mlp_width=19, heads=3, kv_heads=3, head_width=64)
LONG = dict(width=5, mlp_width=7, heads=1, kv_heads=1, head_width=4)
BLOCKS = {
    "narrow": {},
    "narrow, both": dict(norm_place=NormPlace.BOTH),
    "wide MLP": dict(mlp_width=499),
    "wide MLP without a gate": dict(mlp_width=499, gated=False),
    "wide heads": HEADS,
    "wide heads, normed": HEADS | dict(qk_norm=QKNorm.FULL),
    "wide heads, shared": HEADS | dict(kv_heads=1),
    "wide heads, not turned": HEADS | dict(rope_theta=None),
    "wide heads, normed, not turned": HEADS | dict(rope_theta=None, qk_norm=QKNorm.HEAD),
    "wide heads, clipped, not turned": HEADS | dict(rope_theta=None, qkv_clip=0.8),
    "wide": dict(width=499),
    "wide, post": dict(width=499, norm_place=NormPlace.POST),
    "wide, both": dict(width=499, norm_place=NormPlace.BOTH),
    "long": LONG,
    "long, capped": LONG | dict(score_cap=0.7),
}
"""Blocks in which one thing takes most."""


@pytest.mark.usefixtures("seen_tiles")
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_takes_what_is_foretold(kind: str) -> None:
    """On the way up, where all is counted as if at one time, and back. Observed from 0.954 on."""
    made = config(layers=1, **NARROW | BLOCKS[kind])
    shape = (1, 127) if "long" in kind else (11, 32) if "not turned" in kind else (3, 37)
    layout = transformer.layout_of(made, np.ones(shape, dtype=bool), np.zeros(shape, dtype=int))
    parameters = {name: x.astype("float32") for name, x in random_parameters(made, 0).items()}
    read = np.random.default_rng(0).normal(size=(*shape, made.width)).astype("float32")

    def block(back: bool) -> None:
        rope = transformer.rope_of(made, 0, layout, read.dtype, FAST)
        forward = transformer.block_forward(made, parameters, 0, read.copy(), layout, rope, FAST)
        if back:
            _, trace, _ = forward
            del forward
            steps = transformer.block_backward(made, parameters, 0, read.copy(), trace, rope, FAST)
            transformer.drain(steps, lambda _: None)

    for back, most in ((False, 1.45), (True, 1.2)):
        block(back)  # what is made once
        used = peak(lambda back=back: block(back))
        assert 0.94 * used <= block_bytes(made, shape, 4, back=back) <= most * used, (
            block_bytes(made, shape, 4, back=back) / used
        )


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "signed"])
@pytest.mark.parametrize("length", [512, 1100])
def test_the_head_takes_what_is_foretold(fisher: str, cap: float | None, length: int) -> None:
    """One chunk of rows, or three; the bent logits of a soft-cap take most."""
    made = config(vocabulary=997, width=53, logit_cap=cap)
    unit, job = shards(labelled((1, length), 997), made)[0], Sweep(frozenset(), Fisher(fisher))
    final = np.random.default_rng(0).normal(size=(1, length, 53)).astype("float32")
    cotangent = next(job.cotangents(unit, 997))
    run = made, small(made).parameters, final, unit.head_BT, cotangent

    def head() -> None:
        transformer.drain(transformer.head_transpose(*run), lambda _: None)

    head()  # what is made once
    used, said = peak(head), head_bytes(made, (1, length), 4, job.fisher)
    assert 0.95 * used <= said <= 1.25 * used, said / used


def foretold(made: ModelConfig, corpus: rc.Corpus, layers: str, in_flight: int = 1) -> int:
    """The memory that is said before the work, which is left undone."""
    said: list[Forecast] = []

    def told(found: Forecast) -> None:
        said.append(found)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rc.collect(small(made), corpus, layers, in_flight=in_flight, told=told)
    return said[0].memory


def small(made: ModelConfig) -> rc.Model:
    parameters = {name: x.astype("float32") for name, x in random_parameters(made, 0).items()}
    return rc.Model(made, parameters, "float32")


def labelled(shape: tuple[int, int], entries: int = 50, **more: np.ndarray) -> rc.Corpus:
    """Text whose every token is its own label, but for padding."""
    token = np.random.default_rng(0).integers(0, entries, shape)
    label = np.where(more.get("mask", 1), token, NO_LABEL)
    return rc.Corpus(token, label, **more)


PADDED = (np.arange(600) < np.array([[540], [600]])).astype(np.uint8)
IN_MEMORY = {
    "causal": (dict(layers=8), {}, "blocks.*.mlp.*"),
    "not cut": (dict(layers=8, causal=False), {}, "blocks.*.mlp.*"),
    "not cut, one block": (dict(layers=8, causal=False), {}, "blocks.7.attn.q"),
    "not cut, head": (LONG | dict(layers=1, causal=False, vocabulary=397), {}, "head"),
    "wide": (dict(layers=1, width=499), {}, "blocks.0.attn.q"),
    "not cut, all": (dict(layers=1, causal=False, vocabulary=397), {}, "**"),
    "many words": (dict(layers=1, vocabulary=1999, logit_cap=1.5), {}, "blocks.0.attn.q"),
    "padded": (
        dict(layers=1, causal=False, mlp_width=499, gated=False),
        dict(mask=PADDED),
        "blocks.*.mlp.*",
    ),
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_what_passes_again_is_foretold(kind: str, monkeypatch) -> None:
    """Two copies of a sequence that is not cut take more than its shard, which is one of two."""
    monkeypatch.setattr(room, "used", lambda: 0)
    if kind == "not cut, head":  # in many chunks
        for module in (transformer, plan):
            monkeypatch.setattr(module, "HEAD_ROWS", 16)
    changes, more, layers = IN_MEMORY[kind]
    made, corpus = config(**NARROW | dict(vocabulary=50) | changes), labelled((2, 600), **more)
    model = small(made)
    said = foretold(made, corpus, layers)  # and what is made once
    used = peak(lambda: rc.collect(model, corpus, layers, in_flight=1))
    assert 0.95 * used <= said <= 1.4 * used, said / used


def test_each_shard_in_flight_is_foretold_and_no_more_than_there_are(monkeypatch) -> None:
    """A second one takes what its pass takes; where there are two, nine take what two take."""
    monkeypatch.setattr(room, "used", lambda: 0)
    made, corpus = config(layers=5, **NARROW | dict(vocabulary=50)), labelled((2, 600))
    one, two, nine = (foretold(made, corpus, "blocks.*.mlp.up", n) for n in (1, 2, 9))
    unit, names = shards(corpus, made)[1], [f"blocks.{i}.mlp.up" for i in range(5)]
    job, model = sweep_of("collect", names, "sampled", 0, 1), small(made)
    used = peak(lambda: sweep(made, model.parameters, unit, job, lambda *_: None))
    assert 0.95 * used <= two - one <= 1.2 * used
    assert nine == two


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [9, 200])
def test_what_passes_again_are_the_runs_of_rounding(causal: bool, length: int, monkeypatch) -> None:
    """Of each shard that is looked at, in shape and kept rows."""
    monkeypatch.setattr("refcurv.law.conventions.SHARD_TOKENS", 200)
    monkeypatch.setattr("refcurv.passes.rounding.BLOCK_SHARDS", 2)
    made = config(causal=causal)
    mask = np.ones((80, length), np.uint8)
    mask[:, -2:] = 0
    units = shards(labelled(mask.shape, 7, mask=mask), made)
    job, want = sweep_of("collect", ["head"], "sampled", 0, 1), []
    for unit in units:
        if unit.number in looked_at(units):
            runs = other_runs(made, unit, job, np.dtype("float32"))
            want += [passed(shard) for _, _, shard, _ in runs]
    assert rounding_runs(made, units) == want
    assert len(want) > 1


def test_a_decomposition_takes_about_what_is_foretold(monkeypatch) -> None:
    """A clock that counts n^3; what is known already is not counted."""
    clock = [0.0]

    def solving(M: np.ndarray, *rest: object, right=forecast.blas.eigh, **more: object):
        clock[0] += len(M) ** 3
        return right(M, *rest, **more)

    monkeypatch.setattr(forecast.blas, "eigh", solving)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    width = {"A of 'x'": 8, "G of 'x'": 20, "G of 'y'": 20}
    assert of_decomposition(2, width, 1, 0).seconds == pytest.approx(8**3 + 2 * 20**3)
    assert of_decomposition(2, width, 2, 0).seconds == pytest.approx((8**3 + 2 * 20**3) / 2)
    assert of_decomposition(2, width, 9, 0).seconds == pytest.approx(20**3)  # the largest alone
    assert clock[0] == 3 * 2 * PROBE**3
    made = config()
    model = rc.Model(made, random_parameters(made, 1))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 7, (2, 8)))
    found = rc.collect(model, corpus, "blocks.*.mlp.up")
    known, said = dict(rc.decompose(found)), []
    known.pop("blocks.0.mlp.up")
    monkeypatch.setattr(bases, "cores", lambda: 1)
    next(decompose_each(found, Bias.SEPARATE, known=known, told=lambda *x: said.append(x)))
    assert [set(width) for width, _ in said] == [
        {"A of 'blocks.0.mlp.up'", "G of 'blocks.0.mlp.up'"}
    ]
