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
from refcurv.curvature import bases, factors, forecast, room
from refcurv.curvature.bases import decompose_each
from refcurv.curvature.forecast import PROBE, Forecast, of_decomposition
from refcurv.curvature.plan import trace_bytes
from refcurv.law.conventions import Bias
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.passes.fast import FAST
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


@given(configs(), st.sampled_from([np.float32, np.float64]))
def test_a_trace_takes_what_is_foretold(made: ModelConfig, dtype: type) -> None:
    """Of any model. No kept array is uncounted; some that two layers share are counted twice."""
    made = replace(
        made, width=48, mlp_width=80, head_width=16, learned_positions=0, rope_scaling=None
    )  # a scaling counts the pairs of a head
    token = np.zeros((2, 40), dtype=int)
    ones = np.ones(token.shape, dtype=bool)
    layout = transformer.layout_of(made, ones, np.zeros_like(token))
    parameters = {name: x.astype(dtype) for name, x in random_parameters(made, 0).items()}
    _, trace = transformer.forward(made, parameters, token, layout, FAST)
    whole = [x if x.base is None else x.base for x in arrays_of(trace.blocks)]
    kept = sum({id(x): x.nbytes for x in whole}.values())
    foretold = made.layers * trace_bytes(made, token.shape, np.dtype(dtype).itemsize)
    assert 0.7 * foretold <= kept <= 1.1 * foretold


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
