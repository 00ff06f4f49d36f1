"""Rules for rows that no list has: read off A, cell by cell, and named."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import prompted
from refcurv.judge.diagnosis.search import PLAIN as OURS
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.diagnosis.variants.positions import (
    BUT,
    FROM,
    OWN,
    cells,
    positions,
    supervised,
    tails,
    weights,
)
from refcurv.judge.diagnosis.variants.texts import (
    ENDED,
    LONGER,
    _behind,
    prompt,
    text_of,
    texts,
)
from refcurv.judge.dump import Dump
from refcurv.law.conventions import Rows
from refcurv.model.part import part_of

LAYERS = "blocks.0.mlp.up,blocks.1.attn.o,blocks.1.mlp.down"


@pytest.fixture(scope="module")
def answers():
    """Two documents in a sequence, labels at some tokens of each, and one document without any."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    rng = np.random.default_rng(11)
    tokens = rng.integers(3, made.vocabulary, (7, 12))
    segment = np.repeat([[0, 1]], 7, axis=0).repeat([7, 5], axis=1)
    tokens[:, [0, 7]] = 0
    real = np.arange(12) < rng.integers(9, 13, 7)[:, None]
    label = np.roll(tokens, -1, axis=1)
    label[:, [6, 11]] = -1
    label[(rng.random((7, 12)) < 0.5) | ~real | ~np.roll(real, -1, axis=1)] = -1
    label[2, 7:], label[:, 1] = -1, -1
    corpus = rc.Corpus(tokens, labels=label, mask=real.astype(np.uint8), segments=segment)
    model = rc.Model(made, random_parameters(made, 5))
    return model, corpus, rc.collect(model, corpus, LAYERS, "empirical")


def here(answers) -> Case:
    model, corpus, factors = answers
    return Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)


def verdict_of(answers, setting: Setting, arithmetic: str = "float64", counted: bool = True):
    """The verdict on A and G that a setting makes."""
    model, corpus, factors = answers
    made = next(moments(here(answers), [setting], list(factors)))[1]
    theirs = {k: (one.A, one.G, one.n_A if counted else None) for k, one in made.items()}
    return rc.validate(
        theirs, factors, model=model, corpus=corpus, declared={"fisher": "empirical"},
        arithmetic=arithmetic,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["with pads", "with pads, without last"])
def test_a_rule_of_the_last_sequences_has_its_name(answers, rule):
    """A mask that is made for a whole batch, and left out of the last one, which is smaller."""
    at, found = positions(answers[1], answers[0].config, Rows.REACHED), set()
    own, more_B = at.keep_BT.sum(), (weights(rule, at) - at.keep_BT).sum(axis=1)
    for first in range(1, len(more_B)):
        names = [x for x in tails(at, own + more_B[first:].sum()) if x.startswith(rule + FROM)]
        last = max(n for n in range(first, len(more_B)) if more_B[n:].sum() == more_B[first:].sum())
        assert names == ([f"{rule}{FROM}{last}"] if more_B[first:].any() else [])
        found |= {*names}
    assert len(found) > 3 and not [*tails(at, own)] and not [*tails(at, own + 0.5)]
    rows = min(found)
    verdict = verdict_of(answers, Setting(rows_A=rows, rows_G=rows, pads="apart"))
    assert [cause.fault for cause in verdict.causes] == ["B29"]
    assert f"A and G of 3 layers: as with rows `{rows}`." in verdict.causes[0].sentence


LABELS = {
    **{f"not shifted, at {name}": (dict(labels="no shift", where=name), ["B23"]) for name in OWN},
    "not shifted, with last": (
        dict(labels="no shift", where="every token", rows_A="with last", rows_G="with last"),
        ["B23", "B27"],
    ),
    "not shifted, everywhere": (
        dict(labels="no shift", where="ignored everywhere", pads="all"), ["B23", "B24"],
    ),
    "likeliest, at every token": (dict(labels="argmax", where="every token"), ["B16", "B19"]),
    "what follows a text": (dict(where="ignored last"), ["B24"]),
}  # fmt: skip
"""Labels at other positions than ours, and the faults that they are."""


QUICK_LABELS = ("not shifted, with last", "what follows a text")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in QUICK_LABELS else pytest.mark.slow) for x in LABELS],
)
def test_labels_that_are_not_shifted_are_at_any_token(answers, name) -> None:
    fields, faults = LABELS[name]
    verdict = verdict_of(answers, Setting(**fields))
    assert sorted({cause.fault for cause in verdict.causes}) == faults
    assert all(cause.after < 1e-12 for cause in verdict.causes)


def test_no_position_predicts_the_first_token_of_a_text() -> None:
    """Not the last one of the text before, whatever label it has."""
    own, tokens = config(), np.array([[1, 2, 3, 4, 5]])
    corpus = rc.Corpus(tokens, labels=tokens, segments=np.array([[0, 0, 0, 1, 1]]))
    at = positions(corpus, own, Rows.ALL)
    for where, wanted in zip(OWN, ([1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]), strict=True):
        assert supervised(where, at)[0].tolist() == wanted, where


def test_cells_are_all_positions_once(answers) -> None:
    model, corpus, factors = answers
    every = cells(positions(corpus, model.config, factors.rows))
    assert (sum(cell.astype(int) for cell in every.values()) == 1).all()
    assert all(cell.any() for cell in every.values()) and len(every) >= 9
    rolled = positions(corpus, model.config, factors.rows).rolled()
    assert {k: x.sum() for k, x in cells(rolled).items()} == {k: x.sum() for k, x in every.items()}


RULES = {
    "no between labels": "B20",
    "once behind every label": "B20",
    "no before every label; no before every label, first of a text; once last position": "B20",
    "once padding; no between labels": "B28",
    "twice labelled, first of a text": "B49",
}
"""Rows that are in no list, and the fault that each is."""


QUICK = (("once padding; no between labels", "float64"), ("once behind every label", "bfloat16"))


@pytest.mark.parametrize(
    ("rule", "arithmetic"),
    [
        pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow)
        for one in product(RULES, ("float64", "bfloat16"))
    ],
)
def test_any_rule_for_rows_is_found(answers, rule, arithmetic) -> None:
    pads = "real" if "padding" in rule else "blind"
    setting = Setting(rows_A=BUT + rule, rows_G=BUT + rule, pads=pads)
    for counted in (True, False) if arithmetic == "float64" else (True,):
        verdict = verdict_of(answers, setting, arithmetic, counted)
        assert [cause.fault for cause in verdict.causes] == [RULES[rule]], counted
        assert not verdict.passed and len(verdict.causes[0].layers) == 3


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        (Setting(text="a token is no label", token=7), "B25"),
        (Setting(text=f"{LONGER}, without a label", token=1), "B49"),
    ],
)
def test_labels_that_end_a_text_and_a_start_within_it(setting, fault) -> None:
    """In a stream that is cut anywhere: rows follow the labels; a start stands before no start."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    tokens = np.random.default_rng(3).integers(2, 7, 90)
    ends = np.arange(8, 90, 9)
    tokens[ends], tokens[ends[:-1] + 1], tokens[0] = 7, 1, 1
    segment = np.r_[0, np.cumsum(tokens == 7)[:-1]].reshape(6, 15)
    corpus = rc.Corpus(tokens.reshape(6, 15), segments=segment - segment[:, :1])
    made = replace(made, vocabulary=8)
    model = rc.Model(made, random_parameters(made, 5))
    answers = model, corpus, rc.collect(model, corpus, LAYERS, "empirical")
    verdict = verdict_of(answers, setting)
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == [fault]


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_text_that_ends_with_its_first_end_of_text_has_its_name(causal) -> None:
    """Where it has several, of documents or sentences: all behind the first is padding."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7, causal=causal)
    tokens = np.random.default_rng(3).integers(1, 6, (8, 12))
    tokens[np.arange(8), 3 + np.arange(8) % 5] = tokens[:, -1] = 6
    label = None if causal else np.where(np.arange(12) % 4, -1, tokens)
    corpus = rc.Corpus(tokens, label)
    model = rc.Model(made, random_parameters(made, 5))
    answers = model, corpus, rc.collect(model, corpus, LAYERS, "empirical")
    verdict = verdict_of(answers, Setting(text=ENDED, token=6))
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == ["B25"]
    assert f"`{ENDED}` (token 6)" in verdict.causes[0].sentence


def test_what_stands_behind_the_first_of_a_token_is_padding() -> None:
    """The token itself is real and has no label, or is real with it, or is padding too."""
    corpus = rc.Corpus(np.array([[1, 6, 3, 6], [1, 5, 4, 0]]))
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    at = positions(corpus, made, Rows.REACHED)
    for more, label, real, rows in (
        ("", [6, -1, -1, -1], 2, 1),
        (", which has its label", [6, 3, -1, -1], 2, 2),
        (", which is padding", [6, -1, -1, -1], 1, 1),
        (", which is padding and no label", [-1] * 4, 1, 0),
    ):
        found = text_of(at, f"{ENDED}{more}", 6, made, Rows.REACHED)
        assert found.label_BT[0].tolist() == label and found.label_BT[1].tolist() == [5, 4, 0, -1]
        assert found.real_BT.sum(axis=1).tolist() == [real, 4]
        assert found.keep_BT.sum(axis=1).tolist() == [rows, 3]


def test_rows_behind_the_first_of_a_token_are_counted() -> None:
    """In each sequence that has it, padding apart; and it ends no text where it is the last."""
    tokens = np.array([[1, 6, 3, 6], [1, 3, 6, 6], [6, 1, 0, 0]])
    mask = np.array([[1] * 4, [1] * 4, [1, 1, 0, 0]], np.uint8)
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    at = positions(rc.Corpus(tokens, mask=mask), made, Rows.REACHED)
    assert at.keep_BT.sum(axis=1).tolist() == [3, 3, 1]
    assert _behind(at).tolist() == [np.inf, 2 + 2, np.inf, 0 + 1, np.inf, np.inf, 1 + 0 + 0]
    at = positions(rc.Corpus(np.array([[1, 2, 3, 6], [1, 3, 2, 6]])), made, Rows.REACHED)
    every = {name for name, token in texts(at, made, Rows.REACHED, 6.0) if token == 6}
    assert every and not any(name.startswith(ENDED) for name in every)


PLAIN = "a prompt behind the first token"


@pytest.mark.parametrize(
    "text",
    [
        prompt(f"{PLAIN}, without a label", [3]),
        pytest.param(prompt(f"{PLAIN}, the last one cut off", [5, 4]), marks=pytest.mark.slow),
        pytest.param(prompt("a prompt before the first token", [4, 2, 4]), marks=pytest.mark.slow),
    ],
)
def test_a_prompt_of_a_template_has_its_name(text) -> None:
    """Which tokens it is of, whether it has labels, and what of the end is lost for it."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    tokens = np.random.default_rng(3).integers(2, 7, (6, 9))
    tokens[:, 0] = 1
    corpus = rc.Corpus(tokens, mask=(np.arange(9) < np.arange(4, 10)[:, None]).astype(np.uint8))
    model = rc.Model(made, random_parameters(made, 5))
    answers = model, corpus, rc.collect(model, corpus, LAYERS, "empirical")
    verdict = verdict_of(answers, Setting(text=text))
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == ["B49"]
    assert f"G of 3 layers: as with text `{text}`" in verdict.causes[0].sentence


def test_tokens_of_a_prompt_stand_where_its_name_says() -> None:
    """And predict the next one each, where the first token predicts one."""
    corpus = rc.Corpus(np.array([[1, 6, 3, 4], [1, 5, 0, 0]]), np.array([[6, 3, 4, 2], [-1] * 4]),
                       mask=np.array([[1] * 4, [1, 1, 0, 0]], np.uint8))  # fmt: skip
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    at = positions(corpus, made, Rows.REACHED)
    for text, tokens, label in (
        (PLAIN, [1, 5, 4, 6, 3, 4], [5, 4, 6, 3, 4, 2]),
        (f"{PLAIN}, the last one cut off", [1, 5, 4, 6], [5, 4, 6, 3]),
        ("a prompt before the first token", [5, 4, 1, 6, 3, 4], [4, 1, 6, 3, 4, 2]),
        (f"{PLAIN}, without a label", [1, 5, 4, 6, 3, 4], [-1, -1, 6, 3, 4, 2]),
    ):
        found = text_of(at, prompt(text, [5, 4]), -1, made, Rows.REACHED)
        assert found.inputs[0].tolist() == tokens and found.label_BT[0].tolist() == label
        assert found.real_BT[1].sum() == 4 and (found.label_BT[1] == -1).all()
        assert found.keep_BT[0].all() and not found.keep_BT[1].any()
    drawn = replace(at, drawn_BTN=np.array([[[7], [8], [9], [10]]] * 2))
    for text, label in ((PLAIN, [5, 4]), ("a prompt before the first token", [4, 1])):
        found = text_of(drawn, prompt(text, [5, 4]), -1, made, Rows.REACHED)
        assert found.drawn_BTN[0, :, 0].tolist() == [*label, 7, 8, 9, 10]


def test_a_beginning_of_a_prompt_that_is_not_the_nearest_goes_on(monkeypatch) -> None:
    """That of 2 and 1 is nearest, and is not that of 1 and 2, which is right."""
    far = {"2": 0.1, "1": 0.2, "3": 0.9, "1 2": 0.0, "2 1": 0.3}
    names = {prompt(PLAIN, map(int, one.split())): x for one, x in far.items()}
    asked = []

    def _far(_case, _layers, wanted):
        asked.append(len(wanted))
        return {one: names.get(one.text, 1.0) for one in wanted}

    monkeypatch.setattr(prompted, "_far", _far)
    found = prompted._nearest(None, [], PLAIN, 2, [3, 2, 1])
    assert found == (0.0, Setting(text=prompt(PLAIN, [1, 2]))) and asked == [3, 9]


@pytest.mark.parametrize(
    ("learned", "large", "side", "sizes"),
    [
        (11, False, "A", [2]),  # as long as there are positions for
        (10, False, "A", []),
        (0, False, "A", [2]),
        (0, True, "A", []),
        (0, False, "G", []),
    ],
)
def test_prompts_that_are_tried_fit_model_and_count(monkeypatch, learned, large, side, sizes):
    made = config(
        width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7, learned_positions=learned,
        **({"rope_theta": None} if learned else {}),
    )  # fmt: skip
    corpus = rc.Corpus(np.random.default_rng(3).integers(1, 7, (3, 9)))
    case = SimpleNamespace(
        corpus=corpus, model=SimpleNamespace(config=made),
        reference=SimpleNamespace(rows=Rows.REACHED),
    )  # fmt: skip
    tried = []

    def nearest(_case, _layers, name, size, usual):
        assert usual[0] == np.bincount(corpus.tokens.ravel()).argmax()
        tried.append((name, size))
        return 0.5, Setting(text=prompt(name, [1] * size))

    monkeypatch.setattr(prompted, "_nearest", nearest)
    monkeypatch.setattr(prompted, "is_large", lambda _: large)
    monkeypatch.setattr(prompted, "cost", lambda _: 1.0)
    monkeypatch.setattr(prompted, "theirs_n", lambda _: 3 * (8 + 2))
    one = Side(side, table={OURS: {"head": Left(0.4, 1.0)}})
    assert not [*prompted.prompted(case, one, ["head"])]  # none is nearer than ours
    assert {size for _, size in tried} == {*sizes}
    assert all("cut" not in name and "without" not in name for name, _ in tried)
    one.table[OURS]["head"] = Left(0.6, 1.0)
    assert len([*prompted.prompted(case, one, ["head"])]) == len(sizes)


def test_a_label_that_ends_few_texts_and_is_usual_within_them() -> None:
    """It is far more often a label than rows are lost without it: only at the end they are."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    made = replace(made, vocabulary=8)
    tokens = np.random.default_rng(3).integers(1, 7, (6, 15))
    tokens[:, 1:13:2] = 7
    tokens[:2, -1] = 7
    corpus = rc.Corpus(tokens)
    model = rc.Model(made, random_parameters(made, 5))
    answers = model, corpus, rc.collect(model, corpus, LAYERS, "empirical")
    verdict = verdict_of(answers, Setting(text="a token is no label", token=7))
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == ["B25"]
    assert "(token 7)" in verdict.causes[0].sentence and len(verdict.causes[0].layers) == 3


@pytest.mark.parametrize(
    ("power", "arithmetic"),
    [
        pytest.param(lambda n: n // 3, "float64", id="doubles"),
        pytest.param(lambda n: -(n >= 2), "float32", id="halves", marks=pytest.mark.slow),
    ],
)
def test_a_scale_of_the_loss_that_changes_on_the_way(answers, power, arithmetic) -> None:
    """Σ 4^(8 + power) g gᵀ, sequence by sequence, over the rows of all."""
    model, corpus, factors = answers
    theirs = {k: (one.A, 0 * one.G, one.n_A) for k, one in factors.items()}
    for n in range(7):
        part = part_of(corpus, slice(n, n + 1))
        for k, one in rc.collect(model, part, LAYERS, "empirical").items():
            A, G, count = theirs[k]
            theirs[k] = A, G + 4.0 ** (8 + power(n)) * one.sum_G / count, count
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, declared={"fisher": "empirical"},
        arithmetic=arithmetic,
    )  # fmt: skip
    assert not verdict.passed and {cause.fault for cause in verdict.causes} == {"B11"}
    assert "the loss that" in verdict.causes[0].sentence


@pytest.mark.parametrize(
    ("sides", "counts", "arithmetic"),
    [
        ("AG", "AG", "float64"),
        pytest.param("AG", "", "float64", marks=pytest.mark.slow),
        pytest.param("AG", "", "float32", marks=pytest.mark.slow),
        ("A", "A", "float32"),
        pytest.param("A", "", "float64", marks=pytest.mark.slow),
        ("G", "", "float64"),
    ],
)
def test_hooks_that_are_registered_anew_for_each_batch(answers, sides, counts, arithmetic) -> None:
    """Σ k times what the k-th batch of 3 adds, over as many rows or over those of all, by hand."""
    model, corpus, factors = answers
    sums = {k: [0.0, 0.0, 0, 0] for k in factors}
    for n in range(7):
        part, times = part_of(corpus, slice(n, n + 1)), n // 3 + 1
        for k, one in rc.collect(model, part, LAYERS, "empirical").items():
            more = one.sum_A, one.sum_G, one.n_A, one.n_G
            often = ("A" in sides, "G" in sides, "A" in counts, "G" in counts)
            sums[k] = [
                x + y * (times if o else 1) for x, y, o in zip(sums[k], more, often, strict=True)
            ]
    theirs = {k: (A / n, G / m, n if n == m else None) for k, (A, G, n, m) in sums.items()}
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, declared={"fisher": "empirical"},
        arithmetic=arithmetic,
    )  # fmt: skip
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == ["B39"]
    (cause,) = verdict.causes
    assert cause.layers == tuple(factors) and {*sides} == {"A", "G"} & {*cause.quantities}
    assert "the k-th batch of 3 sequences" in cause.sentence


def test_rows_without_a_gradient_beside_a_factor(answers) -> None:
    """The last positions count: G is over more rows than it has gradients of, and half a loss."""
    model, corpus, factors = answers
    last = Setting(rows_A="with last", rows_G="with last")
    made = next(moments(here(answers), [last], list(factors)))[1]
    theirs = {k: (one.A, 2 * one.G, one.n_A) for k, one in made.items()}
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, declared={"fisher": "empirical"},
        arithmetic="float64",
    )  # fmt: skip
    assert {cause.fault for cause in verdict.causes} == {"B27", "B5"}


@pytest.mark.parametrize(("frozen", "fault"), [(False, "B41"), (True, "B48")])
def test_an_A_of_zeros_where_the_last_batch_has_no_row(answers, frozen, fault) -> None:
    """A of the last sequence alone, which has no label; or one layer that nobody hooks."""
    model, corpus, _ = answers
    label = np.array(corpus.label)
    label[-1] = -1
    corpus = rc.Corpus(corpus.tokens, labels=label, mask=corpus.real, segments=corpus.segment)
    factors = rc.collect(model, corpus, LAYERS, "empirical")
    theirs = {
        k: (one.A * (frozen and k != "blocks.1.attn.o"), one.G, one.n_A)
        for k, one in factors.items()
    }
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, declared={"fisher": "empirical"},
        arithmetic="float64",
    )  # fmt: skip
    assert not verdict.passed and [cause.fault for cause in verdict.causes] == [fault]
