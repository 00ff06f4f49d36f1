"""Evaluation of a model that memory does not hold: block by block, with the same bits."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from strategies import Case, config, few, random_parameters
from test_images import corpus_of as images_of
from test_images import labelled_images
from test_room import peak

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import room
from refcurv.evaluation import decode, held, suite
from refcurv.evaluation.bands import bands
from refcurv.evaluation.held import Holding
from refcurv.evaluation.items import suffix_nats
from refcurv.files.lazy import Lazy
from refcurv.law.checks import RoomError
from refcurv.model.corpus import ImagePopulation, Population
from refcurv.model.weights import Model, resident
from refcurv.passes.held import Held

LAYERS, IDS = 3, 30
PLENTY = 2**40


def model_of(**changes: object) -> Model:
    """A model whose weights are read when they are asked for."""
    made = config(vocabulary=IDS, width=8, layers=LAYERS, **changes)
    stored = {name: x.astype("float32") for name, x in random_parameters(made, 3).items()}
    return Model(made, Lazy(list(stored), lambda name: stored[name].copy()), "float32")


def corpus() -> rc.Corpus:
    """Rows of one prompt length and of several, with suffixes of several lengths."""
    rng = np.random.default_rng(0)

    def rows(kind: str, n: int) -> Population:
        prompt = np.sort(rng.integers(1, 6, n))
        length = prompt + rng.integers(1, 5, n)
        return Population(rng.integers(0, IDS, (n, 12)), prompt, length, kind, "test")

    made = {"said": rows("recite", 9), "sums": rows("answer", 5), "prose": rows("text", 11)}
    return rc.Corpus(np.zeros((0, 1), np.int32), populations=made)


@pytest.fixture
def two_rows():
    """Batches of two rows, so that there are many."""
    with patch.object(decode, "shard_sequences", lambda _: 2):
        yield


def same(one: suite.Measurement, other: suite.Measurement) -> None:
    for name, measured in one.populations.items():
        want = other.populations[name]
        assert measured.values == want.values, name
        if want.top is not None:
            np.testing.assert_array_equal(measured.top, want.top)


HOW = {"alone": (1, 1), "three": (3, 2), "together": (99, 2), "whole": (None, 1)}


@pytest.mark.usefixtures("two_rows")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
def test_an_evaluation_block_by_block_has_the_same_bits(how: str, tied: bool) -> None:
    model, wanted = model_of(tied=tied), corpus()
    want = suite.measure(Model(model.config, resident(model), "float32"), wanted)
    with patch.object(suite, "held", lambda _, m, *rest: Held(m, *HOW[how])):
        counts: list[int] = []
        got = suite.measure(model, wanted, progress=lambda n, _: counts.append(n))
    same(got, want)
    batches = sum(len(decode.batches(p)) for p in wanted.populations.values())
    assert counts == list(range(batches + 1))


class Counted(dict[str, np.ndarray]):
    """Parameters that are made anew at each access, and how often each was."""

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        super().__init__(parameters)
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return super().__getitem__(name).copy()


def test_one_block_is_in_memory_at_a_time() -> None:
    """Each parameter is read once for a pass; of another block nothing is kept meanwhile."""
    made = config(vocabulary=IDS, width=8, layers=LAYERS)
    counted = Counted(random_parameters(made, 0))
    model = Model(made, counted)
    token = np.arange(6).reshape(2, 3)
    want = rc.logits(Model(made, dict(counted)), token)
    counted.reads.clear()
    live: list[int] = []
    forward = decode.final_states_each.__globals__["transformer"].block_forward

    def spied(config, parameters, i, *rest):
        live.append(len({name.split(".")[1] for name in parameters._kept if "blocks" in name}))
        return forward(config, parameters, i, *rest)

    with patch("refcurv.model.transformer.block_forward", spied):
        np.testing.assert_array_equal(rc.logits(model, token), want)
    assert sorted(counted.reads) == sorted(made.parameter_shapes())
    assert max(live) == 1 and len(live) == LAYERS
    held = Held(model)
    for name in ("embed", "blocks.0.attn.q", "blocks.1.attn.q", "final_norm", "head", "embed"):
        before = set(held._kept)
        held[f"{name}.weight"]
        assert set(held._kept) == {f"{name}.weight"} | (before if name == "head" else set())


@pytest.mark.usefixtures("two_rows")
def test_a_block_is_read_once_for_all_batches_that_go_together() -> None:
    made = config(vocabulary=IDS, width=8, layers=LAYERS)
    counted = Counted(random_parameters(made, 0))
    prose = corpus().populations["prose"]
    steps = corpus().populations["said"]
    assert isinstance(prose, Population) and isinstance(steps, Population)
    for together, passes in ((99, 1), (1, len(decode.batches(prose)))):
        counted.reads.clear()
        suite._text(made, Held(Model(made, counted), together), prose, lambda: None)
        for name in ("embed", "blocks.1.mlp.up", "final_norm", "head"):
            assert counted.reads.count(f"{name}.weight") == passes, name
    counted.reads.clear()
    decode.decode_population(made, Held(Model(made, counted), 99), steps)
    most = int((steps.length - steps.prompt_length).max())
    assert counted.reads.count("blocks.1.mlp.up.weight") == most


@few(3)
@given(labelled_images)
def test_images_block_by_block(both: tuple[Case, np.ndarray]) -> None:
    one, images = both
    found = images_of(one, images)
    labels = np.zeros(len(found.images), int)
    population = ImagePopulation(found.images, labels, "test", 0.0)
    wanted = rc.Corpus(images=found.images, labels=labels, populations={"seen": population})
    model = Model(one.config, one.parameters)
    want = suite.measure(model, wanted)
    with (
        patch.object(suite, "held", lambda _, m, *rest: Held(m, 99, 2)),
        patch("refcurv.evaluation.classify.shard_sequences", lambda _: 1),
    ):
        same(suite.measure(model, wanted), want)


# ------------------------------------------------------------------ what is chosen


def chosen(model: Model, memory: int) -> Holding:
    told: list[Holding] = []
    rc.evaluate(model, corpus(), memory=memory, told=told.append)
    return told[0]


@pytest.mark.usefixtures("two_rows")
def test_too_small_a_figure_is_refused_with_the_least(tmp_path: Path, capsys) -> None:
    model, wanted = model_of(), corpus()
    with patch.object(held.room, "used", lambda: 0), patch.object(room, "CODE", 0):
        with pytest.raises(RoomError, match=r"evaluate: needs at least .* GiB") as refused:
            rc.evaluate(model, wanted, memory=1)
        assert chosen(model, PLENTY).together is None
        parts = [b for p in wanted.populations.values() for b in held._batches(model, p)]
        every = list(held._holdings(model, parts))
        least = min(every, key=lambda one: one.bytes)
        assert refused.value.values["need"] == least.bytes
        assert (least.together, least.in_flight) == (1, 1)
        assert chosen(model, least.bytes).together == 1
        assert chosen(model, every[0].bytes - 1) != every[0]
        with pytest.raises(RoomError):
            chosen(model, least.bytes - 1)
    rc.save(model, tmp_path / "w.h5")
    rc.save_corpus(wanted, tmp_path / "c.h5")
    words = ["evaluate", str(tmp_path / "w.h5"), str(tmp_path / "c.h5"), "--dtype", "float32"]
    assert main([*words, "--memory", "1MB"]) == 3
    assert main([*words, "--memory", "64GiB"]) == 0
    said = capsys.readouterr().err
    assert "needs at least" in said and "all weights in memory" in said


def test_what_all_prompts_begin_with_is_counted_once() -> None:
    """Of a float32 model: keys and values of 5 tokens in 3 blocks, beside the batches."""
    model, tokens = model_of(), np.tile(np.arange(8), (4, 1))
    told: list[Holding] = []
    for prompt in (6, 1):
        asked = Population(tokens, np.full(4, prompt), np.full(4, 8), "answer", "test")
        held.held("hits", model, [asked], PLENTY, told.append)
        (one,) = held._batches(model, asked)
        (fastest, *_) = held._holdings(model, [one])
        heads = model.config.kv_heads * model.config.head_width
        assert told.pop().bytes - fastest.bytes == 4 * 2 * LAYERS * (prompt - 1) * heads


@pytest.mark.usefixtures("two_rows")
def test_weights_that_do_not_fit_are_read_block_by_block_unasked() -> None:
    model = model_of()
    prose = corpus().populations["prose"]
    found = held.held("hits", model, [prose])
    assert isinstance(found, Held) and found.together is None
    parts = list(held._batches(model, prose))
    least = min(one.bytes for one in held._holdings(model, parts))
    with patch.object(room, "available", lambda: least):
        found = held.held("hits", model, [prose])
        assert isinstance(found, Held) and found.together == 1
        assert isinstance(held.held("hits", Model(model.config, resident(model), "float32"),
                                    [prose]), dict)  # fmt: skip
        changed = model.with_parameters({"final_norm.weight": np.ones(8)})
        assert isinstance(held.held("hits", changed, [prose]), Held)
    with patch.object(room, "available", lambda: least - 1), pytest.raises(RoomError):
        held.held("hits", model, [prose])
    want = suffix_nats(model, prose)
    with patch.object(room, "available", lambda: least):
        np.testing.assert_array_equal(suffix_nats(model, prose), want)


def test_weights_for_several_uses_are_read_once() -> None:
    """Where they fit; else the model is as it was, to be read block by block."""
    model, prose = model_of(), corpus().populations["prose"]
    read: list[str] = []
    lazy = Lazy(list(model.parameters), lambda name: read.append(name) or model.parameters[name])
    given = Model(model.config, lazy, "float32")
    once = held.read_once("items", given, [prose])
    for _ in range(2):
        np.testing.assert_array_equal(suffix_nats(once, prose), suffix_nats(model, prose))
    assert sorted(read) == sorted(model.parameters)
    least = min(one.bytes for one in held._holdings(given, list(held._batches(given, prose))))
    with patch.object(room, "available", lambda: least):
        assert held.read_once("items", given, [prose]) is given


def test_bands_block_by_block() -> None:
    model, wanted = model_of(), corpus()
    tokens = np.random.default_rng(1).integers(0, IDS, (4, 6))
    basis = rc.decompose(rc.collect(model, rc.Corpus(tokens), "blocks.1.mlp.*"))
    two = wanted.populations["said"], wanted.populations["prose"]
    want = bands(model, basis, *two)
    with patch("refcurv.evaluation.bands.held", lambda _, m, *rest: Held(m)):
        assert {n: b.to_json() for n, b in bands(model, basis, *two).items()} == {
            n: b.to_json() for n, b in want.items()
        }


@pytest.mark.parametrize("kind", ["text", "recite"])
@pytest.mark.parametrize("last", [0, -1], ids=["fastest", "least"])
def test_an_evaluation_takes_the_memory_that_is_foreseen(kind: str, last: int) -> None:
    """Never more than is said, and not far below. Observed: see the bounds."""
    made = config(
        width=96, layers=3, heads=6, kv_heads=6, head_width=16, mlp_width=384, vocabulary=400
    )
    stored = {name: x.astype("float32") for name, x in random_parameters(made, 0).items()}
    model = Model(made, Lazy(list(stored), lambda name: stored[name].copy()), "float32")
    tokens = np.random.default_rng(0).integers(0, 400, (16, 64))
    population = Population(tokens, np.full(16, 48), np.full(16, 56), kind, "test")
    with (
        patch.object(decode, "shard_sequences", lambda _: 4),
        patch.object(held, "batches", decode.batches),
        patch.object(held, "cores", lambda: 1),
    ):
        every = list(held._holdings(model, list(held._batches(model, population))))
        one = every[last]

        def work() -> None:
            how = Held(model, one.together, 1)
            if kind == "text":
                suite._text(made, how, population, lambda: None)
            else:
                decode.decode_population(made, how, population)

        work()
        used = peak(work)
    assert 0.6 * one.bytes <= used <= 1.05 * one.bytes, (one, used)
