"""What a sweep says before and while it works, what it keeps, and which facts tell two apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature import room
from refcurv.evaluation.held import kept_bytes
from refcurv.evaluation.lines import Lines
from refcurv.evaluation.matching import search_share
from refcurv.files import paths
from refcurv.law.checks import ConventionError, RoomError
from refcurv.model.corpus import ImagePopulation
from refcurv.progress import silent, size, span
from refcurv.sweeps import asked as sweeps_asked
from refcurv.sweeps import sweep as sweeps
from refcurv.sweeps.asked import checked
from refcurv.sweeps.beside import Collecting, basis_of
from refcurv.sweeps.methods import STRONGEST, WEAKEST
from refcurv.sweeps.outcomes import unmeasured

LAYERS = ("blocks.1.mlp.up", "blocks.2.mlp.up")


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, done: int, total: int) -> None:
        pass

    def doing(self, what: str) -> None:
        self.said.append(what)


@pytest.fixture(scope="module")
def model() -> rc.Model:
    made = config(layers=3)
    return rc.Model(made, {name: 3 * x for name, x in random_parameters(made, 0).items()})


@pytest.fixture(scope="module")
def corpus(model: rc.Model) -> rc.Corpus:
    """Of what the model says itself: each edit raises its perplexity."""
    token = np.random.default_rng(0).integers(0, 7, (6, 9)).astype(np.int32)
    token[:, 3:] = rc.greedy(model, token[:, :3], 6)
    texts = {split: rc.Population(token, np.full(6, 3), np.full(6, 9), "text", split)
             for split in ("dev", "test")}  # fmt: skip
    quotes = replace(texts["test"], kind="recite")  # keys and values of each block are kept
    return rc.Corpus(token, populations={**texts, "quotes": quotes})


@pytest.fixture(scope="module")
def basis(model: rc.Model, corpus: rc.Corpus) -> rc.Bases:
    return rc.decompose(rc.collect(model, corpus, ",".join(LAYERS)))


def begun(
    model: rc.Model, corpus: rc.Corpus, basis: rc.Bases, path: Path | None, told: list[str],
    states: int | None = None, progress: Callable[[int, int], object] = lambda *_: None,
) -> Any:  # fmt: skip
    what = checked(model, corpus, LAYERS, [0.9, 0.5], ["kfac", "svd"], "rho", None, "test", 0)
    return sweeps.begun(model, corpus, what, basis, Lines(None, {}), path, states, None, progress,
                        told.append)  # fmt: skip


@pytest.mark.parametrize("on_disk", [True, False])
def test_room_for_states_is_a_part_of_what_is_free(
    model, corpus, basis, on_disk: bool, tmp_path: Path, monkeypatch
) -> None:
    """Half of the disk or a quarter of memory; of the highest edited block; said in bytes."""
    need = sum(kept_bytes(model, one, 2) for one in corpus.populations.values())
    free = need - 1
    least = free // (2 if on_disk else 4)
    for module in (sweeps, paths):
        monkeypatch.setattr(module, "free_bytes", lambda _: free)
    monkeypatch.setattr(room, "available", lambda: free)
    told: list[str] = []
    run = begun(model, corpus, basis, tmp_path / "s.jsonl" if on_disk else None, told)
    assert run.below._most == least and run.below.first == 1
    where = "on the disk" if on_disk else "in memory"
    want = f"8 edits; the states below the edited blocks are {size(need)} {where}, of which "
    assert told == [f"{want}{size(least)} are kept"]
    run = begun(model, corpus, basis, None, told, states=need)
    assert run.below._most == need and told[1].endswith("kB in memory")


def test_too_small_a_figure_is_refused_before_factors_are_collected(
    model, corpus, tmp_path: Path
) -> None:
    rc.save(model, tmp_path / "w.h5")
    rc.save_corpus(corpus, tmp_path / "c.h5")
    of = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    for kept in (tmp_path / "s.jsonl", None):
        with patch("refcurv.sweeps.beside.collect", side_effect=AssertionError):
            with pytest.raises(RoomError, match=r"^sweep: needs at least"):
                rc.sweep(*of, LAYERS, [0.9], ["kfac"], memory=10**6, lines=kept)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["c.h5", "w.h5"]


def test_the_time_that_is_left_is_that_of_edits_that_were_measured(model, corpus, basis) -> None:
    """Those that were known took none, and say nothing of the others."""
    progress = Told()
    run = begun(model, corpus, basis, None, [], progress=progress)
    for done, left in (([], ""), ([0.0], ""), ([0.0, 2.0, 6.0], f"about {span(4 * 5)} left, ")):
        run.done[:] = done
        run.say("svd")
        assert progress.said.pop() == f"{left}svd"


def test_an_edit_that_is_known_counts_no_seconds(model, corpus, basis, tmp_path: Path) -> None:
    what = {"layers": [LAYERS[0]], "rho": [0.9, 0.5], "methods": ["kfac"], "match": "rho",
            "basis": basis, "lines": tmp_path / "s.jsonl"}  # fmt: skip
    want = rc.sweep(model, corpus, **what)
    lines = what["lines"].read_text().splitlines(keepends=True)
    what["lines"].write_text("".join(lines[:-3]))  # the second edit's row and populations
    told = Told()
    assert rc.sweep(model, corpus, **what, stage=lambda _: told) == want
    assert told.said and not any("left" in text for text in told.said)


def test_what_is_not_measured_has_no_value_at_all() -> None:
    base = {"kind": "recite", "items": 2, "tokens": 8, "chance": 0.0, "values": {"strict": 0.5},
            "interval": [0.1, 0.9], "right": "01"}  # fmt: skip
    assert unmeasured(base, "NaN") == {
        "kind": "recite", "items": 2, "tokens": 8, "chance": 0.0, "values": {"strict": None},
        "interval": None, "right": None, "fault": "NaN",
    }  # fmt: skip


def test_every_array_tells_two_sweeps_apart(model, corpus, basis) -> None:
    """Of the corpus where factors are collected, of each population, and of each basis."""
    what = checked(model, corpus, LAYERS, [0.9], ["kfac"], "rho", None, "test", 0)

    def told(of: rc.Corpus, by: rc.Bases | None = None) -> str:
        how = Collecting()
        return str(sorted(sweeps_asked.facts(model, of, what, by, how).items()))

    shape = corpus.tokens.shape
    full = replace(corpus, mask=np.ones(shape, np.uint8), segments=np.zeros(shape, np.int32),
                   labels=np.where(np.arange(9) < 8, 0, -1) + 0 * corpus.tokens)  # fmt: skip
    text = corpus.populations["test"]
    cut = {"mask": np.arange(9) < np.full((6, 1), 8), "segments": np.arange(9) // 5 + 0 * full.mask,
           "labels": np.where(full.labels < 0, -1, 1), "tokens": full.tokens[::-1]}  # fmt: skip
    corpora = [full, *(replace(full, **{name: x.astype(getattr(full, name).dtype)})
                       for name, x in cut.items())]  # fmt: skip
    corpora += [replace(full, populations={"test": one}) for one in (
        text, replace(text, tokens=text.tokens[::-1]), replace(text, length=text.length - 1),
        replace(text, prompt_length=text.prompt_length - 1), replace(text, split="dev"),
        replace(text, kind="recite"),
    )]  # fmt: skip
    pixels, digests = np.zeros((2, 1, 4, 4), np.float32), []
    for images, labels in ((pixels, [0, 1]), (pixels, [0, 0]), (pixels + 1, [0, 1])):
        one = ImagePopulation(images, np.array(labels), "test")
        seen = SimpleNamespace(populations={"p": one})
        digests.append(str(sweeps_asked.population_digests(seen)))
    own = basis[LAYERS[0]]
    turned = {"U_A": -own.U_A, "U_G": -own.U_G, "mu": 2 * own.mu, "lam": 2 * own.lam}
    bases = [basis, *(replace(basis, layers={**basis.layers, LAYERS[0]: replace(own, **{name: x})})
                      for name, x in turned.items())]  # fmt: skip
    every = [told(one) for one in corpora] + [told(full, by) for by in bases]
    assert len(set(every)) == len(every) == 5 + 6 + 5
    assert len(set(digests)) == 3


def test_a_search_begins_between_what_was_tried_at_another_rho(model, corpus, basis) -> None:
    """Of its pattern and method, by `bracket`, with the target of its own rho."""
    asked: list[tuple[float, float, float]] = []
    tried: list[dict[float, float]] = [{}]

    def searched(measured, target: float, *, weakest: float, strongest: float, **others):
        asked.append((target, weakest, strongest))
        found = search_share(measured, target, weakest=weakest, strongest=strongest, **others)
        tried.append({**tried[-1], **dict(found.tried)})
        return found

    with patch.object(sweeps, "search_share", searched):
        rc.sweep(model, corpus, [LAYERS[0]], [0.9, 0.5, 0.7], ["svd"], basis=basis)
    assert len(asked) == 3 and len({target for target, *_ in asked}) == 3
    for (target, low, high), before in zip(asked, tried, strict=False):
        assert (low, high) == sweeps.bracket(before, target, WEAKEST["svd"])
    assert asked[0][1:] == (WEAKEST["svd"], STRONGEST) != asked[2][1:]


def test_factors_that_lie_beside_a_sweep_serve_no_other(model, corpus, tmp_path: Path) -> None:
    """Of another seed, Fisher, layer, corpus or model; nor a basis of other factors."""
    rc.save(model, tmp_path / "w.h5")
    for name, one in (("c", corpus), ("c2", replace(corpus, tokens=corpus.tokens[::-1]))):
        rc.save_corpus(one, tmp_path / f"{name}.h5")
    of, by, other = (rc.load(tmp_path / "w.h5"), *(rc.load_corpus(tmp_path / f"{name}.h5")
                                                   for name in ("c", "c2")))  # fmt: skip
    moved = of.with_parameters({"head.weight": 2 * of.parameters["head.weight"]})
    plain, layers, out = Collecting(), LAYERS[:1], tmp_path / "s.jsonl"

    def made(*asked: Any) -> rc.Bases:
        return basis_of(*asked, out, lambda _: silent)

    first = made(of, by, layers, plain)
    with patch("refcurv.sweeps.beside.collect", side_effect=AssertionError):
        again = made(of, by, layers, plain)
        assert np.array_equal(again[layers[0]].U_G, first[layers[0]].U_G)
        for asked in (
            (of, by, layers, Collecting(seed=1)), (of, by, layers, Collecting("empirical")),
            (of, by, layers, Collecting(rows="all")), (of, by, LAYERS, plain),
            (of, other, layers, plain), (moved, by, layers, plain),
        ):  # fmt: skip
            with pytest.raises(ConventionError, match=r"s\.factors\.h5' was made from other"):
                made(*asked)
        rc.save_bases(rc.random_basis(first, 0), tmp_path / "s.basis.h5")
        with pytest.raises(ConventionError, match=r"s\.basis\.h5' was made from other factors"):
            made(of, by, layers, plain)
