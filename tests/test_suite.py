"""Populations whose values can be counted by hand, and text against naive loops."""

from __future__ import annotations

import json
import math
from unittest import mock

import numpy as np
import pytest
from strategies import config, random_parameters

from refcurv.evaluation import decode, suite
from refcurv.evaluation.metrics import ndcg
from refcurv.evaluation.suite import compare, evaluate, measure
from refcurv.law.checks import ConventionError, EmptyError, NameUnknownError, RangeError
from refcurv.law.conventions import HEAD_ROWS
from refcurv.model import transformer
from refcurv.model.config import NormPlace, QKNorm
from refcurv.model.corpus import Corpus, Population
from refcurv.model.layers import DEFINITIONS, causal_layout
from refcurv.model.weights import Model

V = 12


def counting_model(step: int = 1, scale: float = 1.0, dtype: str = "float64") -> Model:
    """After token v it expects v + step mod V with logit scale·sqrt(V), all others at 0."""
    made = config(
        vocabulary=V, width=V, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, norm_eps=0.0
    )
    parameters = {n: np.zeros(s, dtype) for n, s in made.parameter_shapes().items()}
    for name, value in parameters.items():
        if "norm" in name:
            value[:] = 1
    parameters["embed.weight"][:] = np.eye(V)
    parameters["head.weight"][:] = scale * np.roll(np.eye(V), step, axis=0)
    return Model(made, parameters, dtype=dtype)


def rows(*texts: str, split: str = "test", kind: str = "recite", chance: float = 0.0) -> Population:
    """Each text as "prompt suffix", space separated ids with "|" between the two."""
    parts = [[[int(x) for x in side.split()] for side in text.split("|")] for text in texts]
    lengths = [len(a) + len(b) for a, b in parts]
    tokens = np.full((len(parts), max(lengths) + 2), 10**6)  # padding that must not be read
    for n, (a, b) in enumerate(parts):
        tokens[n, : lengths[n]] = a + b
    prompt = np.array([len(a) for a, _ in parts])
    return Population(tokens, prompt, np.array(lengths), kind, split, chance)


def by_hand() -> Corpus:
    return Corpus(
        np.zeros((0, 1), np.int32),
        populations={
            "quotes": rows(
                "0 1 2 | 3 4 5 6",  # d = 0
                "5 | 6 7 8 9",  # d = 0
                "9 10 11 | 0 1 2 4",  # one substitution of four: loose
                "3 4 | 5 7 8 9 10",  # 5 6 7 8 9 was said: two edits of five
                "7 | 8 8 8",  # 8 9 10: two of three
            ),
            "sums": rows("3 | 4", "1 5 | 6 7", "2 2 | 3", "4 | 6", kind="answer", chance=0.25),
            "tuning": rows("3 | 4", kind="answer", split="dev"),
            "prose": rows("0 | 1 2 3", "5 5 | 6 8", kind="text"),
        },
    )


def naive_text(model: Model, population: Population) -> tuple[list[float], np.ndarray]:
    """Nats and logits of every scored position: one row at a time, on the definitions."""
    nats, logits = [], []
    wide = {n: np.asarray(x, dtype=np.float64) for n, x in model.parameters.items()}
    for row, prompt, length in zip(
        population.tokens, population.prompt_length, population.length, strict=True
    ):
        layout = causal_layout(np.ones((1, length), dtype=bool), np.zeros((1, length), dtype=int))
        final, _ = transformer.forward(model.config, wide, row[None, :length], layout, DEFINITIONS)
        z = transformer.head_logits(model.config, wide, final[0])
        for t in range(prompt, length):
            top = z[t - 1].max()
            nats.append(math.log(sum(math.exp(x - top) for x in z[t - 1])) + top - z[t - 1][row[t]])
            logits.append(z[t - 1])
    return nats, np.array(logits)


def random_model(seed: int, dtype: str = "float64") -> Model:
    made = config(vocabulary=30, width=8)
    parameters = {n: x.astype(dtype) for n, x in random_parameters(made, seed).items()}
    return Model(made, parameters, dtype=dtype)


def random_text(rng, ids: int = 30) -> Population:
    tokens = rng.integers(0, ids, (7, 11))
    return Population(
        tokens, [1, 1, 3, 1, 5, 2, 9], [11, 4, 8, 2, 5, 11, 10], "text", "test"
    )  # row 4 scores nothing


# ------------------------------------------------------------------ by hand


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_by_hand(dtype):
    """The model counts upwards, and does nothing else."""
    table = evaluate(counting_model(dtype=dtype), by_hand())
    assert (table.split, table.dtype, table.baseline_dtype) == ("test", dtype, None)
    assert [row.name for row in table.rows] == ["quotes", "sums", "prose"]
    quotes, sums, prose = table.rows
    assert (quotes.kind, quotes.items, quotes.tokens) == ("recite", 5, 20)
    assert quotes.after["strict"] == 2 / 5
    assert quotes.after["loose"] == 3 / 5
    assert quotes.after["distance"] == pytest.approx((0 + 0 + 1 / 4 + 2 / 5 + 2 / 3) / 5)
    assert (sums.kind, sums.items, sums.tokens, sums.chance) == ("answer", 4, 5, 0.25)
    assert sums.after == {"accuracy": 3 / 4}
    # four tokens are expected (1 2 3, 6), one is not (8)
    s, rest = math.exp(math.sqrt(V)), V - 1
    want = ((s + rest) ** 5 / s**4) ** (1 / 5)
    assert (prose.kind, prose.items, prose.tokens) == ("text", 2, 5)
    assert prose.after["perplexity"] == pytest.approx(
        want, rel=1e-6 if dtype == "float32" else 1e-13
    )
    for row in table.rows:
        assert row.before is None
        assert row.agreement == {}
        assert math.isnan(row.retention)
        assert math.isnan(row.retention_above_chance)


def test_before_and_after_by_hand():
    """Baseline counts upwards; the edited model by two: it knows "4 | 6" alone."""
    table = evaluate(counting_model(2), by_hand(), baseline=counting_model())
    sums = table["sums"]
    assert sums.before == {"accuracy": 3 / 4}
    assert sums.after == {"accuracy": 1 / 4}
    assert sums.retention == pytest.approx(1 / 3)
    assert sums.retention_above_chance == 0.0
    assert table["quotes"].after["strict"] == 0
    assert table["quotes"].retention == 0.0
    assert table["quotes"].before["strict"] == 2 / 5
    prose = table["prose"]
    assert prose.before["perplexity"] < prose.after["perplexity"]
    assert math.isnan(prose.retention)
    # after token v: B = (v+1, then the lowest nine others), E = (v+2, then the lowest nine others)
    base, edited = (np.zeros((5, V)) for _ in range(2))
    for n, v in enumerate([0, 1, 2, 5, 6]):
        base[n, (v + 1) % V] = edited[n, (v + 2) % V] = 1
    for gain in ("paper", "code"):
        assert prose.agreement[f"ndcg_{gain}"] == pytest.approx(ndcg(base, edited, 10, gain))
    assert prose.agreement["ndcg_paper"] == 1.0  # ids 0 .. 9 in both, in another order
    assert prose.agreement["ndcg_code"] < 0.9
    with pytest.raises(NameUnknownError, match="there are: quotes, sums, prose"):
        table["tuning"]


def test_strict_recitation_is_what_is_retained():
    """After 8 it says 0, not 9: "6 7 8 9" is lost by one token, so loosely kept."""
    slips = counting_model()
    head = slips.parameters["head.weight"].copy()
    head[:, 8] = np.eye(V)[0]
    slips = slips.with_parameters({"head.weight": head})
    quotes = evaluate(slips, by_hand(), baseline=counting_model())["quotes"]
    assert quotes.before["loose"] == quotes.after["loose"] == 3 / 5
    assert quotes.after["strict"] == 1 / 5
    assert quotes.retention == quotes.retention_above_chance == 1 / 2


def test_the_dev_split_is_its_own_table():
    table = evaluate(counting_model(), by_hand(), split="dev")
    assert [(row.name, row.after["accuracy"]) for row in table.rows] == [("tuning", 1.0)]


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("head_rows", [HEAD_ROWS, 3])
def test_text_is_the_naive_loop(rng, dtype, head_rows):
    """Rows of unequal lengths, more batches than one, chunks that cut a batch."""
    model, baseline = random_model(1, dtype), random_model(2, dtype)
    text = random_text(rng)
    corpus = Corpus(np.zeros((0, 1), np.int32), populations={"text": text})
    seen = []
    spy = lambda *a: seen.append(len(a[2])) or transformer.head_logits(*a)  # noqa: E731
    with (
        mock.patch.object(decode, "shard_sequences", lambda width: 3),
        mock.patch.object(decode, "HEAD_ROWS", head_rows),
        mock.patch.object(decode, "head_logits", spy),
    ):
        row = evaluate(model, corpus, baseline=baseline)["text"]
    assert sum(seen) == 2 * row.tokens == 2 * (10 + 3 + 5 + 1 + 0 + 9 + 1)
    assert max(seen) <= head_rows
    rel = 1e-5 if dtype == "float32" else 1e-12
    logits = []
    for one, values in ((model, row.after), (baseline, row.before)):
        nats, z = naive_text(one, text)
        logits.append(z)
        assert len(nats) == row.tokens
        assert values["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=rel)
    for gain in ("paper", "code"):
        want = ndcg(logits[1], logits[0], 10, gain)
        assert row.agreement[f"ndcg_{gain}"] == pytest.approx(want, rel=1e-12)


def test_a_model_agrees_with_itself(rng):
    model = random_model(1)
    corpus = Corpus(np.zeros((0, 1), np.int32), populations={"text": random_text(rng)})
    row = evaluate(model, corpus, baseline=model)["text"]
    assert row.agreement == {"ndcg_paper": 1.0, "ndcg_code": 1.0}
    assert row.before == row.after


def test_small_vocabularies_compare_all_their_tokens(rng):
    made = config(vocabulary=4)
    models = [Model(made, random_parameters(made, n)) for n in range(2)]
    corpus = Corpus(np.zeros((0, 1), np.int32), populations={"t": random_text(rng, ids=4)})
    agreement = evaluate(models[0], corpus, baseline=models[1])["t"].agreement
    assert agreement["ndcg_paper"] == 1.0  # all four are in both lists
    assert agreement["ndcg_code"] < 1


def test_padding_is_never_read(rng):
    """Ids of another vocabulary behind every row change no bit of any value."""
    model, baseline = random_model(1), random_model(2)
    tokens = rng.integers(0, 30, (6, 9))
    prompt, length = np.array([1, 2, 3, 1, 2, 3]), np.array([9, 4, 5, 6, 7, 8])
    padding = np.arange(9) >= length[:, None]
    tables = []
    for filler in (0, 10**6):
        filled = np.where(padding, filler, tokens)
        populations = {
            kind: Population(filled, prompt, length, kind, "test")
            for kind in ("text", "recite", "answer")
        }
        corpus = Corpus(np.zeros((0, 1), np.int32), populations=populations)
        tables.append(evaluate(model, corpus, baseline=baseline).to_json())
    assert json.dumps(tables[0]) == json.dumps(tables[1])


# ------------------------------------------------------------------ the baseline, progress, errors


def test_baseline_is_evaluated_once():
    read = []
    model, baseline = counting_model(2), counting_model()
    right = suite.held

    def spy(who: str, one: Model, *args: object) -> object:
        read.append(one)
        return right(who, one, *args)

    with mock.patch.object(suite, "held", spy):
        whole = evaluate(model, by_hand(), baseline=baseline)
        assert [m is baseline for m in read] == [True, False]
        measured = measure(baseline, by_hand())
        read.clear()
        again = evaluate(model, by_hand(), baseline=measured)
        assert len(read) == 1
        assert read[0] is model
    assert json.dumps(whole.to_json()) == json.dumps(again.to_json())


def test_what_was_evaluated_is_handed_over_at_once():
    """Each population as soon as it is done, the same rows that the whole table has."""
    measured, tables = [], []
    whole = evaluate(counting_model(2), by_hand(), baseline=counting_model(), each=tables.append)
    assert [len(table.rows) for table in tables] == list(range(1, len(whole.rows) + 1))
    assert json.dumps(tables[-1].to_json()) == json.dumps(whole.to_json())
    measure(counting_model(), by_hand(), each=measured.append)
    names = [row.name for row in whole.rows]
    assert [list(one.populations) for one in measured] == [
        names[: n + 1] for n in range(len(names))
    ]


def test_dtypes_may_differ():
    table = evaluate(counting_model(dtype="float32"), by_hand(), baseline=counting_model())
    assert (table.dtype, table.baseline_dtype) == ("float32", "float64")
    assert table["sums"].retention == 1.0


def test_measurements_must_match(rng):
    model = counting_model()
    one, dev = measure(model, by_hand()), measure(model, by_hand(), split="dev")
    with pytest.raises(ConventionError, match="split"):
        compare(one, dev)
    text = {"prose": random_text(rng, ids=12)}
    other = measure(model, Corpus(np.zeros((0, 1), np.int32), populations=text))
    with pytest.raises(ConventionError, match="same corpus"):
        compare(one, other)
    with pytest.raises(ConventionError, match="vocabulary"):
        compare(
            other, measure(random_model(0), Corpus(np.zeros((0, 1), np.int32), populations=text))
        )


def test_progress_counts_the_batches_of_both_models():
    for baseline, models in ((None, 1), (counting_model(), 2)):
        seen: list[tuple[int, int]] = []
        evaluate(
            counting_model(),
            by_hand(),
            baseline=baseline,
            progress=lambda *a, to=seen: to.append(a),
        )
        total = models * 3  # populations of one batch each
        assert [n for n, _ in dict.fromkeys(seen)] == list(range(total + 1))
        assert {t for _, t in seen} == {total}


def test_json_is_plain(rng):
    table = evaluate(counting_model(2), by_hand(), baseline=counting_model())
    data = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert [row["name"] for row in data["rows"]] == ["quotes", "sums", "prose"]
    assert data["rows"][2]["retention"] is None
    assert data["rows"][1]["before"] == {"accuracy": 0.75}
    assert evaluate(counting_model(), by_hand()).to_json()["rows"][0]["before"] is None


def test_refusals(rng):
    model = counting_model()
    none = Corpus(np.zeros((1, 2), np.int32))
    with pytest.raises(EmptyError, match="split 'test'; it has: none"):
        evaluate(model, none)
    dev = Corpus(np.zeros((0, 1), np.int32), populations={"a": rows("1 | 2", split="dev")})
    with pytest.raises(EmptyError, match=r"it has: a \(dev\)"):
        evaluate(model, dev)
    with pytest.raises(ConventionError, match="split"):
        evaluate(model, dev, split="train")
    wild = {"a": rows("1 | 2"), "b": rows("1 2 | 3", "1 | 12", kind="answer")}
    with pytest.raises(RangeError, match=r"population 'b' \[1, 1\] is 12"):
        evaluate(model, Corpus(np.zeros((0, 1), np.int32), populations=wild))
    silent = {"a": Population([[1, 2]], [2], [2], "text", "test")}
    with pytest.raises(EmptyError, match="'a' has no token"):
        evaluate(model, Corpus(np.zeros((0, 1), np.int32), populations=silent))
    with pytest.raises(ConventionError, match="vocabulary"):
        few = Corpus(np.zeros((0, 1), np.int32), populations={"a": rows("1 | 2")})
        evaluate(model, few, baseline=random_model(0))
