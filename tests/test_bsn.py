"""The learned mask: its gradient by complex step, its training in loops, what it leaves alone."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from itertools import pairwise

import budgets
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, scaled
from test_factors import corpus_of, model_of
from test_transformer import STEP, budget, loss_of

import refcurv as rc
from refcurv.demo import CORPUS, MODEL
from refcurv.editing import bsn
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.passes import parallel

MLP = "blocks.*.mlp.{gate,up}"
SEEDS = st.integers(0, 999)


def asked(one: Case, seed: int = 0, rows: int = 4, width: int = 5) -> rc.Population:
    """Random suffixes to forget, in the model's vocabulary."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, width, rows)
    length = rng.integers(prompt + 1, width + 1)
    tokens = rng.integers(0, one.config.vocabulary, (rows, width))
    return rc.Population(tokens, prompt, length, "recite", "dev")


def as_case(one: Case, corpus: rc.Corpus, parameters: dict[str, np.ndarray]) -> Case:
    """A corpus in a case's place."""
    fields = (corpus.tokens.astype(int), corpus.real, corpus.segment, corpus.label)
    return Case(one.config, parameters, *fields)


def train(one: Case, layers: str = MLP, **choices: object) -> rc.Scores:
    defaults: dict = dict(ratio=0.3, steps=3, batch=2)
    return rc.train_scores(
        model_of(one), layers, asked(one), corpus_of(one), **(defaults | choices)
    )


def same_bits(one: rc.Scores, two: rc.Scores) -> bool:
    return all(s.tobytes() == two.layers[n].tobytes() for n, s in one.layers.items())


# ------------------------------------------------------------------ the loss and its gradient


@given(cases(), SEEDS, st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_the_gradient_is_the_complex_step_of_a_soft_mask(
    one: Case, seed: int, weight: float
) -> None:
    """m ∘ W in the weights' place, m complex at the mask's values: dL/dm is exact, and is dL/dW'∘W.

    Labels of the corpus's own, padding, segments, every option of the model.
    """
    made, rng = one.config, np.random.default_rng(seed)
    assume(made.causal and (one.label >= 0).any())
    layers = [name for name in made.linear_layers() if not (made.tied and name == "head")]
    layers = [
        n for n, at in zip(layers, rng.random(len(layers)), strict=True) if at < 0.3
    ] or layers
    drawn = {"retain": corpus_of(one), "forget": bsn.suffixes("test", made, asked(one, seed))}
    m = {n: (rng.random(made.linear_layers()[n]) < 0.7).astype(float) for n in layers}
    masked = one.parameters | {f"{n}.weight": m[n] * one.parameters[f"{n}.weight"] for n in layers}
    found, slope = bsn.objective(made, masked, layers, drawn, weight)
    parts = [as_case(one, corpus, masked) for corpus in drawn.values()]
    count = [(part.label >= 0).sum() for part in parts]
    scales = [budgets.gradient_scale(made, masked, *part.batch) for part in parts]
    allowed = max(budget(part) for part in parts)

    def loss(soft: dict[str, np.ndarray]) -> list[np.complex128]:
        return [loss_of(part, soft) / n for part, n in zip(parts, count, strict=True)]

    for (side, nats), want, scale in zip(found.items(), loss(masked), scales, strict=True):
        whole = max(float(np.abs(scale[n] * masked[n]).sum()) for n in scale)
        assert abs(nats - want.real) <= allowed * max(whole, abs(want.real)), side
    for n in layers:
        W, v = one.parameters[f"{n}.weight"], rng.normal(size=m[n].shape)
        soft = {k: x.astype(complex) for k, x in masked.items()}
        soft[f"{n}.weight"] = (m[n] + 1j * STEP * v) * W
        kept, lost = loss(soft)
        truth = (kept - weight * lost if lost.real < 6 else kept).imag / STEP
        scale = scales[0][f"{n}.weight"] / count[0] + weight * scales[1][f"{n}.weight"] / count[1]
        # observed: 1 % of the budget
        assert_within((slope[n] * W * v).sum(), truth, allowed, (scale * np.abs(W * v)).sum(), n)


def test_beyond_the_cap_forgetting_has_no_gradient() -> None:
    """The head's scale is moved until CE(forget) is 0.1 below, and 0.1 above 6."""
    one = case(vocabulary=20)
    names = ["blocks.1.mlp.up", "head"]
    drawn = {"retain": corpus_of(one), "forget": bsn.suffixes("test", one.config, asked(one))}

    def at(c: float, weight: float) -> tuple[dict, dict]:
        parameters = one.parameters | {"head.weight": c * one.parameters["head.weight"]}
        return bsn.objective(one.config, parameters, names, drawn, weight)

    for target, differs in ((5.9, True), (6.1, False)):
        low, high = 1.0, 50.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle, 1)[0]["forget"] < target else (low, middle)
        found, slope = at(low, 1.0)
        assert found["forget"] == pytest.approx(target, abs=1e-4)
        _, alone = at(low, 0.0)
        assert all((slope[n].tobytes() != alone[n].tobytes()) == differs for n in names)


def test_the_suffix_alone_is_scored() -> None:
    """By loops: which position has which label; the last token and the padding are never read."""
    one = case()
    p = asked(one, rows=9, width=7)
    padding = np.arange(7) >= p.length[:, None]
    p = replace(p, tokens=np.where(padding, 999, p.tokens))  # ids that the model does not have
    corpus = bsn.suffixes("test", one.config, p)
    for n in range(9):
        for t in range(7):
            inside = p.prompt_length[n] <= t + 1 < p.length[n]
            assert corpus.labels[n, t] == (p.tokens[n, t + 1] if inside else -1)
            assert corpus.mask[n, t] == (t + 1 < p.length[n])
            assert corpus.tokens[n, t] == (p.tokens[n, t] if t + 1 < p.length[n] else 0)
    learned = case(learned_positions=6)  # of 7 tokens 6 are read
    whole = rc.Population(p.tokens % 7, np.full(9, 3), np.full(9, 7), "answer", "dev")
    assert rc.train_scores(
        model_of(learned), MLP, whole, corpus_of(learned), ratio=0.1, steps=1
    ).forget_nats.shape == (1,)


# ------------------------------------------------------------------ the mask


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=3),
       st.floats(0, 1))  # fmt: skip
def test_the_mask_equals_brute_force(scores: list[list[int]], ratio: float) -> None:
    """Whole scores, many of them equal: sort by descending score, then place; keep the first."""
    layers = {str(n): np.array([row, row], float) for n, row in enumerate(scores)}
    found = bsn.keep(layers, ratio)
    flat = [(-s, n) for n, s in enumerate(x for row in scores for x in row + row)]
    stays = sorted(flat)[: len(flat) - round(ratio * len(flat))]
    places = {n for _, n in stays}
    assert np.concatenate([found[n].ravel() for n in layers]).tolist() == [
        n in places for n in range(len(flat))
    ]
    assert all(found[n].shape == s.shape for n, s in layers.items())


@pytest.mark.parametrize("dropped", [1, 2, 500, 998, 999])
def test_the_mask_of_many_is_that_of_a_sort(dropped: int) -> None:
    """A selection leaves few numbers in order; of few numbers it sorts all."""
    scores = np.random.default_rng(0).permutation(1000).astype(float)
    kept = bsn.keep({"a": scores.reshape(10, 100)}, dropped / 1000)["a"]
    assert np.array_equal(kept.ravel(), scores >= dropped)


def test_half_a_weight_is_rounded_to_even() -> None:
    one, two = {"a": np.arange(3.0)}, {"a": np.arange(5.0)}
    assert bsn.keep(one, 0.5)["a"].tolist() == [False, False, True]
    assert bsn.keep(two, 0.5)["a"].tolist() == [False, False, True, True, True]
    assert bsn.keep(two, 0.0)["a"].all()
    assert not bsn.keep(two, 1.0)["a"].any()


# ------------------------------------------------------------------ the training


def uniform(seed: int, name: str, n: int) -> float:
    """The n-th uniform of key (seed, 4), counter (1 + ..., 0, the name's SHA-256)."""
    digest = hashlib.sha256(name.encode()).digest()
    high = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(2)]
    return (oracles.philox4x64([1 + n // 4, 0, *high], [seed, 4])[n % 4] >> 11) * 2.0**-53


def order(seed: int, side: str, rows: list[int], n: int) -> int:
    """The n-th row that is read: the rows by their uniforms, again and again."""
    turn, place = divmod(n, len(rows))
    drawn = [uniform(seed, side, turn * len(rows) + i) for i in range(len(rows))]
    return [row for _, row in sorted(zip(drawn, rows, strict=True))][place]


def test_the_training_is_the_recipe_in_loops() -> None:
    """Start, orders, cut and Adam in Python's own numbers; the loss is proved above."""
    made = case(batch=5)
    label = made.label.copy()
    label[2] = -1  # a row that has nothing to say
    one, p = replace(made, label=label), asked(made, rows=3)
    ratio, weight, steps, rate, batch, seed = 0.3, 0.7, 5, 0.02, 2, 11
    got = rc.train_scores(
        model_of(one), MLP, p, corpus_of(one),
        ratio=ratio, weight=weight, steps=steps, rate=rate, batch=batch, seed=seed,
    )  # fmt: skip
    layers = list(got.layers)
    assert layers == [f"blocks.{i}.mlp.{k}" for i in (0, 1) for k in ("gate", "up")]
    W = {n: one.parameters[f"{n}.weight"] for n in layers}
    s = {n: [0.5 + 0.01 * uniform(seed, n, i) for i in range(40)] for n in layers}
    m, v = ({n: [0.0] * 40 for n in layers} for _ in range(2))
    whole = {"retain": corpus_of(one), "forget": bsn.suffixes("test", one.config, p)}
    rows = {"retain": [0, 1, 3, 4], "forget": [0, 1, 2]}
    for step in range(steps):
        places = sorted(((-x, k, i) for k, n in enumerate(layers) for i, x in enumerate(s[n])))
        out = {(k, i) for _, k, i in places[160 - round(ratio * 160) :]}
        masked = dict(one.parameters)
        for k, n in enumerate(layers):
            kept = np.array([(k, i) not in out for i in range(40)]).reshape(5, 8)
            masked[f"{n}.weight"] = kept * W[n]
        drawn = {}
        for side, corpus in whole.items():
            row = [order(seed, side, rows[side], step * batch + b) for b in range(batch)]
            drawn[side] = rc.Corpus(corpus.tokens[row], corpus.label[row], corpus.real[row])
        found, slope = bsn.objective(one.config, masked, layers, drawn, weight)
        assert got.retain_nats[step] == found["retain"]
        assert got.forget_nats[step] == found["forget"]
        for n in layers:
            for i, d in enumerate((slope[n] * W[n]).ravel().tolist()):
                m[n][i] = 0.9 * m[n][i] + (1 - 0.9) * d
                v[n][i] = 0.999 * v[n][i] + (1 - 0.999) * d * d
                top, bottom = m[n][i] / (1 - 0.9 ** (step + 1)), v[n][i] / (1 - 0.999 ** (step + 1))
                s[n][i] -= rate * top / (math.sqrt(bottom) + 1e-8)
    for n in layers:
        # each step moves a score by about the rate, with the roundings of 20 operations
        allowed = tolerance.gamma(20 * steps, np.float64)
        assert_within(got.layers[n].ravel(), s[n], allowed, np.full(40, 0.51 + rate * steps), n)
        assert np.abs(got.layers[n] - 0.505).max() > rate


def test_steps_of_nothing_leave_the_start_and_the_scores_are_read_only() -> None:
    got = train(case(), steps=0)
    assert got.retain_nats.shape == got.forget_nats.shape == (0,)
    assert all((s >= 0.5).all() and (s < 0.51).all() for s in got.layers.values())
    assert all(not s.flags.writeable and s.dtype == np.float64 for s in got.layers.values())
    other = train(case(), steps=0, seed=1)
    assert not same_bits(got, other)
    some = train(case(), "blocks.1.mlp.up", steps=0)  # whatever else is chosen
    assert some.layers["blocks.1.mlp.up"].tobytes() == got.layers["blocks.1.mlp.up"].tobytes()
    assert got.settings() == {
        "layers": list(got.layers), "ratio": 0.3, "weight": 1.0, "steps": 0, "rate": 0.02,
        "batch": 2, "seed": 0, "dtype": "float64",
    }  # fmt: skip


def test_the_number_of_threads_changes_no_bit(monkeypatch) -> None:
    """Three shards of what is retained, two of what is forgotten; the first are the slowest."""
    one = case(batch=40, length=128)
    model, population = model_of(one, "float32"), asked(one, rows=110, width=20)
    quick, runs = bsn._slopes, []

    def slow(config, parameters, shard, layers):
        time.sleep(0.1 if shard.number == 0 else 0)
        return quick(config, parameters, shard, layers)

    monkeypatch.setattr(bsn, "_slopes", slow)
    for threads in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda n=threads: n)
        choices = dict(ratio=0.2, steps=2, batch=110)
        runs.append(rc.train_scores(model, MLP, population, corpus_of(one), **choices))
    for run in runs[1:]:
        assert same_bits(runs[0], run)
        assert run.retain_nats.tobytes() == runs[0].retain_nats.tobytes()
        assert run.forget_nats.tobytes() == runs[0].forget_nats.tobytes()


def test_the_model_computes_in_its_dtype_and_stays_as_it_is() -> None:
    one = case()
    wide, narrow = (model_of(one, dtype) for dtype in ("float64", "float32"))
    before = {n: x.tobytes() for n, x in narrow.parameters.items()}
    told: list[tuple[int, int]] = []
    scores = [
        rc.train_scores(
            model, MLP, asked(one), corpus_of(one), ratio=0.2, steps=2,
            progress=lambda *done: told.append(done),
        )
        for model in (wide, narrow)
    ]  # fmt: skip
    assert told == 2 * [(1, 2), (2, 2)]
    assert before == {n: x.tobytes() for n, x in narrow.parameters.items()}
    assert [x.dtype for x in scores] == ["float64", "float32"]
    first, second = (x.retain_nats for x in scores)
    assert 0 < np.abs(first - second).max() < budget(one, np.float32)


# ------------------------------------------------------------------ the edit


def test_prune_zeroes_the_lowest_scores_and_nothing_else() -> None:
    one = case()
    stored = {"blocks.0.mlp.up.weight": "float32"}
    parameters = dict(one.parameters)
    parameters["blocks.0.mlp.up.weight"] = parameters["blocks.0.mlp.up.weight"].astype("f4")
    model = rc.Model(
        one.config, {n: x.astype("f8") for n, x in parameters.items()}, "float64", stored
    )
    scores = train(one)
    masks = {}
    for ratio in (None, 0.0, 0.1, 0.5, 1.0):
        edited, record = rc.prune(model, scores, ratio, force=True)
        share = 0.3 if ratio is None else ratio
        kept = bsn.keep(scores.layers, share)
        masks[share] = np.concatenate([k.ravel() for k in kept.values()])
        assert masks[share].sum() == 160 - round(share * 160)
        for name, x in model.parameters.items():
            y, layer = edited.parameters[name], name.removesuffix(".weight")
            if share == 0 or layer not in kept:
                assert y is x, name
            else:
                assert y[kept[layer]].tobytes() == x[kept[layer]].tobytes(), name
                assert (y[~kept[layer]].view(np.uint64) == 0).all(), name
        for found in record.layers:
            W, k = model.parameters[f"{found.layer}.weight"], kept[found.layer]
            assert (found.method, found.rho, found.pairs) == ("bsn", 1 - share, 40)
            assert (found.kept, found.acceptable) == (k.sum(), 0)
            assert math.isnan(found.gap)
            mass = math.fsum((W**2)[k]) / math.fsum((W**2).ravel())
            assert found.mass == pytest.approx(mass, rel=1e-14)
            assert found.norm == pytest.approx(math.sqrt(mass), rel=1e-14)
    nested = [masks[share] for share in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert all((a >= b).all() for a, b in pairwise(nested))
    assert edited.stored == stored
    blank = model.with_parameters({"blocks.0.mlp.up.weight": np.zeros((5, 8))})
    assert math.isnan(rc.prune(blank, scores, force=True)[1].layers[1].mass)
    assert rc.prune(blank, scores, force=True)[1].to_json()[1]["mass"] is None


def test_a_model_that_recites_forgets_and_keeps_its_language() -> None:
    """The shipped one, a few steps on sixteen of its quotes; random weights do nothing."""
    model, corpus = rc.load(MODEL, "float32"), rc.load_corpus(CORPUS)
    quotes, text = (corpus.populations[f"{n}_dev"] for n in ("quotes", "language"))
    few, said = (
        replace(p, tokens=p.tokens[:16], prompt_length=p.prompt_length[:16], length=p.length[:16])
        for p in (quotes, text)
    )
    judged = rc.Corpus(corpus.tokens[:1], populations={"quotes": few, "language": said})
    # rows of the corpus without a line of theirs
    lines = {tuple(q[17:23]) for q in few.tokens.tolist()}
    clean = [
        n for n, row in enumerate(corpus.tokens[:200].tolist())
        if not lines & {tuple(row[t : t + 6]) for t in range(59)}
    ]  # fmt: skip
    found = {}
    for steps in (0, 8):
        scores = rc.train_scores(
            model, "blocks.3.mlp.{gate,up}", few, rc.Corpus(corpus.tokens[clean]),
            ratio=0.05, steps=steps, rate=0.05, batch=8,
        )  # fmt: skip
        found[steps] = rc.evaluate(rc.prune(model, scores)[0], judged, split="dev")
    unedited = rc.evaluate(model, judged, split="dev")
    recited = [x["quotes"].after["strict"] for x in (unedited, found[0], found[8])]
    language = [x["language"].after["perplexity"] for x in (unedited, found[0], found[8])]
    # observed: 14, 14 and 0 of 16; 22.7, 23.2 and 23.4
    assert min(recited[:2]) > 0.7
    assert recited[2] < 0.2
    assert language[2] < 1.05 * language[0]


# ------------------------------------------------------------------ refusals


def test_refusals() -> None:
    one = case()
    p, corpus, model = asked(one), corpus_of(one), model_of(one)

    def refused(error: type, says: str, *instead: object, **choices: object) -> None:
        given = [model, MLP, p, corpus]
        for thing in instead:
            kinds = [rc.Model, str, rc.Population, rc.Corpus]
            at = next((i for i, kind in enumerate(kinds) if isinstance(thing, kind)), 2)
            given[at] = thing
        with pytest.raises(error, match=says) as raised:
            rc.train_scores(*given, **{"ratio": 0.1, "steps": 1, **choices})
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith(("train_scores: ", "pattern ", "forward: "))

    refused(RangeError, r"ratio must lie in \[0, 1\]; got 1.5", ratio=1.5)
    refused(RangeError, "ratio must lie in .*; got nan", ratio=float("nan"))
    refused(RangeError, "weight must lie in .*; got -1", weight=-1)
    refused(RangeError, "weight must lie in .*; got inf", weight=float("inf"))
    refused(RangeError, "rate must be a number; got 'fast'", rate="fast")
    refused(RangeError, "steps must be an integer >= 0; got 2.0", steps=2.0)
    refused(RangeError, "batch must be an integer >= 1; got 0", batch=0)
    refused(RangeError, "steps must be below", steps=2**63)
    refused(RangeError, "seed must be an integer", seed=-1)
    refused(NameUnknownError, "matches none", "blocks.7.mlp.up")
    refused(ConventionError, "tied to the embedding", model_of(case(tied=True)), "head")
    refused(ConventionError, "of a causal model", model_of(case(causal=False)))
    text = replace(p, kind="text")
    refused(ConventionError, "must be one of recite, answer; got 'text'", text)
    refused(ConventionError, "forget must be a Population; got ndarray", p.tokens)
    images = rc.Corpus(images=np.zeros((2, 1, 2, 2)), labels=np.zeros(2, int))
    refused(ConventionError, "retain: the corpus has images, but the model reads tokens", images)
    refused(RangeError, "forget: tokens .* is 9, outside", replace(p, tokens=p.tokens * 0 + 9))
    refused(RangeError, "retain: tokens .* is 9, outside", rc.Corpus(np.full((2, 5), 9)))
    refused(
        EmptyError, "retain has no label in any of its 3 rows", rc.Corpus(np.zeros((3, 1), int))
    )
    nothing = rc.Corpus(np.zeros((0, 4), int), populations={"p": p})
    refused(EmptyError, "retain has no label in any of its 0 rows", nothing)
    refused(RangeError, "7 positions, but the model has learned 6",
            model_of(case(learned_positions=6)), rc.Corpus(np.zeros((2, 7), int)))  # fmt: skip
    broken = model.with_parameters({"blocks.0.mlp.up.weight": np.full((5, 8), np.nan)})
    refused(NonFiniteError, "the input of 'blocks.0.mlp.down' holds nan", broken)
    steep = model_of(scaled(1e-40), dtype="float32")
    refused(NonFiniteError, "the gradient of 'blocks.0.mlp.gate' in step 1 holds", steep)


def test_refusals_of_prune() -> None:
    one = case()
    scores, model = train(one), model_of(one)
    with pytest.raises(RangeError, match=r"prune: ratio must lie in \[0, 1\]; got -0.1"):
        rc.prune(model, scores, -0.1)
    with pytest.raises(NameUnknownError, match=r"prune: the model has no 'blocks.0.mlp.gate'\. Sc"):
        rc.prune(model_of(case(gated=False)), scores, force=True)
    with pytest.raises(
        ShapeError, match=r"prune: the scores of 'blocks.0.mlp.gate' must be \(9, 8"
    ):
        rc.prune(model_of(case(mlp_width=9)), scores, force=True)
    with pytest.raises(ConventionError, match="prune: the head is tied to the embedding"):
        rc.prune(model_of(case(tied=True)), train(one, "head"))
    with pytest.raises(NonFiniteError, match=r"prune: blocks.0.mlp.up.weight holds nan"):
        broken = {"blocks.0.mlp.up.weight": np.full((5, 8), np.nan)}
        rc.prune(model.with_parameters(broken), scores, force=True)
    wide = {"blocks.0.mlp.gate.weight": "float64"}
    with pytest.raises(DTypeError, match=r"prune: .* stored in float64 but .* loaded as float32"):
        rc.prune(replace(model_of(one, "float32"), stored=wide), scores, force=True)
