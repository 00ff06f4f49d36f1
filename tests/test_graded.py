"""evaluation/graded.py: items by definition, and the own-continuation control."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.evaluation import graded
from refcurv.evaluation import items as by_item
from refcurv.evaluation.graded import items, own_continuations
from refcurv.law.checks import EmptyError, RangeError, RoomError
from refcurv.model.corpus import Population


@pytest.fixture(scope="module")
def model() -> rc.Model:
    made = config(vocabulary=7, layers=2)
    return rc.Model(made, {k: 2 * x for k, x in random_parameters(made, 4).items()})


def asked(kind: str = "recite", seed: int = 0, many: int = 9) -> Population:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, 4, many)
    length = prompt + rng.integers(kind != "text", 5, many)
    return Population(rng.integers(0, 7, (many, 8)), prompt, length, kind, "test")


@pytest.mark.parametrize("kind", ["recite", "text"])
def test_by_definition(model: rc.Model, kind: str) -> None:
    population = asked(kind)
    found = items(model, population)
    for n, row in enumerate(population.tokens):
        P, L = int(population.prompt_length[n]), int(population.length[n])
        z = rc.logits(model, row[None, :L])[0] if L > 1 else np.empty((0, 7))
        true, z = row[P:L], z[P - 1 : L - 1]
        nats = [np.log(np.exp(a).sum()) - a[y] for a, y in zip(z, true, strict=True)]
        rank = [sorted(range(7), key=lambda v, a=a: (-a[v], v)).index(y) + 1
                for a, y in zip(z, true, strict=True)]  # fmt: skip
        assert found.tokens[n] == L - P
        assert found.nats[n] == pytest.approx(sum(nats), rel=1e-13)
        assert found.right[n] == sum(r == 1 for r in rank)
        if L > P:
            assert found.rank[n] == pytest.approx(np.mean(rank), rel=1e-15)
        else:
            assert np.isnan(found.rank[n])
    assert (found.said is None) == (kind == "text")


@pytest.mark.parametrize("seed", range(4))
def test_what_is_said_is_what_is_decoded(model: rc.Model, seed: int) -> None:
    population = asked(seed=seed, many=40)
    tokens = population.tokens.copy()
    said = [row["said_ids"] for row in items(model, population).rows()]
    for n in range(0, 40, 3):
        tokens[n, population.prompt_length[n] : population.length[n]] = said[n]
    population = replace(population, tokens=tokens)
    found = items(model, population)
    assert 0 < found.strict.sum() < 40
    assert found.strict.tolist() == by_item.hits(model, population).tolist()
    share = by_item.distances(model, population)
    assert found.distance == pytest.approx(share * found.tokens, abs=1e-12)
    assert [row["strict"] for row in found.rows()] == found.strict.tolist()
    for one, n in zip(found.said, found.tokens, strict=True):
        assert len(one) == n


def test_ties_go_to_the_lowest_id() -> None:
    made = config(vocabulary=7, layers=1)
    flat = {k: np.zeros_like(x) for k, x in random_parameters(made, 0).items()}
    population = Population([[1, 0, 3, 0]], [1], [4], "recite", "test")
    found = items(rc.Model(made, flat), population)
    assert (found.right[0], found.rank[0]) == (2, (1 + 4 + 1) / 3)
    assert found.said[0].tolist() == [0, 0, 0] and found.distance[0] == 1


def test_a_model_recites_its_own_continuations(model: rc.Model) -> None:
    text = asked("text", many=12)
    found = own_continuations(model, text, prompt=3, count=4)
    assert len(found.tokens) == (text.length >= 3).sum() < 12
    assert found.tokens[:, :3].tolist() == text.tokens[text.length >= 3, :3].tolist()
    assert by_item.hits(model, found).all() and found.kind == "recite"
    other = rc.Model(model.config, random_parameters(model.config, 9))
    assert not by_item.hits(other, found).all()
    with pytest.raises(EmptyError, match="no row has 9 tokens"):
        own_continuations(model, text, prompt=9)
    with pytest.raises(RangeError, match="count"):
        own_continuations(model, text, prompt=3, count=0)


def test_continuations_that_memory_does_not_hold(model: rc.Model, monkeypatch) -> None:
    """A billion tokens: the process was killed by the system."""
    text = asked("text", many=12)
    monkeypatch.setattr(graded, "Population", None)  # nothing is made before
    with pytest.raises(RoomError, match=r"own_continuations: .* are free\. Give a smaller count"):
        own_continuations(model, text, prompt=3, count=10**12)
    monkeypatch.setattr("refcurv.curvature.room.available", lambda: 100_000)
    with pytest.raises(RoomError, match="and 100"):
        own_continuations(model, text, prompt=3, count=10**4)


def test_items_of_an_evaluation_are_written(model, tmp_path: Path, monkeypatch, capsys) -> None:
    """One line an item, before and after; their means are the table's values."""
    monkeypatch.chdir(tmp_path)
    rc.save(model, "w.h5")
    rc.save(rc.Model(model.config, random_parameters(model.config, 9)), "e.h5")
    quotes, text = asked(many=30), asked("text", 1)
    rc.save_corpus(rc.Corpus(quotes.tokens, populations={"q": quotes, "t": text}), "c.h5")
    words = ["evaluate", "e.h5", "c.h5", "--baseline", "w.h5", "--json", "table.json"]
    with patch.object(graded, "decode_population", side_effect=AssertionError):  # not once more
        assert main([*words, "--items", "items.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("items.jsonl").read_text().splitlines()]
    table = {one["name"]: one for one in json.loads(Path("table.json").read_text())["rows"]}
    for when in ("before", "after"):
        q = [row[when] for row in rows if row["population"] == "q"]
        t = [row[when] for row in rows if row["population"] == "t"]
        assert np.mean([one["strict"] for one in q]) == pytest.approx(table["q"][when]["strict"])
        nats, tokens = (sum(one[key] for one in t) for key in ("nats", "tokens"))
        assert np.exp(nats / tokens) == pytest.approx(table["t"][when]["perplexity"])
    low, high = table["q"]["interval"]
    assert low <= table["q"]["after"]["strict"] <= high
    assert 0 < table["q"]["p"] <= 1
    assert "95 %" in capsys.readouterr().out
