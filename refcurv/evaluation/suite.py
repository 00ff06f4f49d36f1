"""Every population of a split, before and after: what `rc.evaluate` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.evaluation.classify import classify, image_batches, require_image_population
from refcurv.evaluation.decode import (
    at_scored,
    batches,
    by_item,
    decode_population,
    require_population,
    suffixes,
)
from refcurv.evaluation.held import Holding, held
from refcurv.evaluation.intervals import bootstrap, paired, wilson
from refcurv.evaluation.metrics import (
    NDCG_K,
    accuracy,
    exact_match,
    ndcg_of_ids,
    perplexity,
    recitation,
    retention,
    retention_above_chance,
    top_ids,
)
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NameUnknownError,
    require_choice,
)
from refcurv.law.conventions import Gain
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import SPLITS, Corpus, ImagePopulation, Population, Populations
from refcurv.model.given import (
    require_callable,
    require_corpus,
    require_model,
    require_record,
)
from refcurv.model.loss import cross_entropy
from refcurv.model.transformer import Parameters
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, silent

RETAINED = MappingProxyType({"answer": "accuracy", "recite": "strict", "label": "accuracy"})
"""By kind, the value whose retention is given; perplexity has none."""


# ------------------------------------------------------------------ records


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on one population.

    Fields:
        kind; chance: of the population.
        items: rows or images. tokens: how many tokens are decoded or scored; 0 for images.
        values: by name (answer, label: accuracy; recite: strict, loose, distance; text:
            perplexity).
        top: for text, the ids (tokens, min(10, V)) of the likeliest tokens at every scored
            position; else None.
        right: (items,) bool, which items are right (recite: strict); None for text.
        interval: (low, high), at 95 %, of what `right` is the mean of, by Wilson; of text's
            perplexity, by drawing its rows again. None where no model was measured.
        said: the greedy continuation of each prompt; None where nothing is decoded.
    """

    kind: str
    items: int
    tokens: int
    chance: float
    values: Mapping[str, float]
    top: Array | None = None
    right: Array | None = None
    interval: tuple[float, float] | None = None
    said: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model on every population of one split; `compare` takes two of them."""

    split: str
    vocabulary: int
    dtype: str
    populations: Mapping[str, Measured]

    def only(self, names: Iterable[str]) -> Measurement:
        """The same with these populations only."""
        known = {name: self.populations[name] for name in names if name in self.populations}
        return replace(self, populations=MappingProxyType(known))


@dataclass(frozen=True, slots=True)
class Row:
    """One population of an Evaluation.

    Fields:
        name, kind, items, tokens, chance: of the population, as in `Measured`.
        before, after: values by name of the baseline (None without one) and of the model.
        agreement: for text with a baseline, nDCG@10 by both readings, "ndcg_paper" and
            "ndcg_code"; else empty.
        retention, retention_above_chance: of the accuracy or of strict recitation. NaN for text,
            without a baseline, and where it has no meaning (`metrics.retention`).
        interval: of the model, as in `Measured`.
        p: of the model's being as often right as the baseline, item by item (`intervals.paired`);
            NaN for text and without a baseline.
    """

    name: str
    kind: str
    items: int
    tokens: int
    chance: float
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    agreement: Mapping[str, float]
    retention: float
    retention_above_chance: float
    interval: tuple[float, float] | None = None
    p: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; a number that is NaN or infinite becomes null."""
        return {
            "name": self.name,
            "kind": self.kind,
            "items": self.items,
            "tokens": self.tokens,
            "chance": self.chance,
            "before": None if self.before is None else _plain(self.before),
            "after": _plain(self.after),
            "agreement": _plain(self.agreement),
            "retention": finite(self.retention),
            "retention_above_chance": finite(self.retention_above_chance),
            "interval": None if self.interval is None else [finite(x) for x in self.interval],
            "p": finite(self.p),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A table: one Row per population of the split, in the corpus's order.

    Fields: split; dtype, baseline_dtype: what each model computed in (None without a baseline);
    rows.
    """

    split: str
    dtype: str
    baseline_dtype: str | None
    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        """The row of one population."""
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise NameUnknownError(f"Evaluation: no population {name!r}; there are: {names}.")

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return {
            "split": self.split,
            "dtype": self.dtype,
            "baseline_dtype": self.baseline_dtype,
            "rows": [row.to_json() for row in self.rows],
        }


def finite(value: float) -> float | None:
    """The value as JSON can hold it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


# ------------------------------------------------------------------ the table


def evaluate(
    model: Model,
    corpus: Corpus,
    *,
    split: str = "test",
    baseline: Model | Measurement | None = None,
    progress: Progress = silent,
    each: Callable[[Evaluation], object] = lambda table: None,
    memory: int | None = None,
    told: Callable[[Holding], object] = lambda _: None,
) -> Evaluation:
    """What a model still does, population by population, beside what its baseline does.

    Definition
        answer: accuracy, exact match of the greedy answer.
        recite: strict, loose and mean distance of the greedy suffix.
        text:   perplexity, and nDCG@10 against the baseline by both readings, at the positions
                whose next token lies in [prompt_length, length).
        label:  of images, accuracy: the likeliest class (the lowest id on ties) is the label.

    Args:
        model: the (edited) model.
        corpus: its populations are evaluated; its own tokens or images are not read.
        split: "test" to report, "dev" to tune on.
        baseline: the unedited model, or the Measurement that `measure` made of it. The latter
            serves many edits.
        progress: called with (batches done, batches), of both models together.
        each: called with the table so far, after each population of the model.
        memory: bytes that the process may take, with what it has already; by default what is free.
            Weights that it does not hold are read block by block, with the same bits.
        told: called with how the model is held, before the work.

    Returns:
        Evaluation: plain records, one per population, with `to_json()`.

    Raises:
        EmptyError: the corpus has no population of this split, or one without rows or suffixes.
        RangeError: a token or label outside the vocabulary, or more positions than were learned or
            than decoding has fixed rotary frequencies for (dynamic, longrope).
        ShapeError: images of another size than the model's.
        NonFiniteError: a model's logits are not finite.
        RoomError: memory holds not even one block and one batch; says what the least would be.
        ConventionError: an unknown split; a baseline of another vocabulary or split; tokens for a
            model of images or the reverse; a bidirectional model of tokens.

    Cost: for each model one forward pass over each population's tokens. Logits exist for at most
        HEAD_ROWS positions per thread. Block by block, the weights are read once for all batches
        that memory holds together; when decoding, once for each token.
    Source: METHOD, Metrics.
    Proof:  tests/test_suite.py::test_by_hand; ::test_text_is_the_naive_loop;
            tests/test_suite.py::test_padding_is_never_read;
            tests/test_images.py::test_evaluation_is_argmax_one_image_at_a_time
    """
    _require_given(model, corpus, baseline, {"progress": progress, "each": each, "told": told})
    pending = [model, baseline] if isinstance(baseline, Model) else [model]
    wanted = judged(corpus, split, *pending)
    total = len(pending) * _batch_count(model.config, wanted)
    if isinstance(baseline, Model):
        baseline = measure(
            baseline,
            corpus,
            split=split,
            progress=lambda n, _: progress(n, total),
            memory=memory,
            told=told,
        )
        ahead = total // 2
    else:
        ahead = 0
    before = baseline

    def table(so_far: Measurement) -> Evaluation:
        return compare(so_far, None if before is None else before.only(so_far.populations))

    after = measure(
        model,
        corpus,
        split=split,
        progress=lambda n, _: progress(ahead + n, total),
        each=lambda so_far: each(table(so_far)),
        memory=memory,
        told=told,
    )
    return compare(after, before)


def _require_given(
    model: object, corpus: object, baseline: object, called: Mapping[str, Callable[..., object]]
) -> None:
    """Refuse what is no model, no corpus, no baseline, and no function that could be called."""
    require_model("evaluate", model)
    require_corpus("evaluate", corpus)
    if baseline is not None and not isinstance(baseline, Measurement):
        require_record("evaluate", "the baseline must be a Model", baseline, Model, "rc.load(path)")
    for what, one in called.items():
        require_callable("evaluate", what, one)


def measure(
    model: Model,
    corpus: Corpus,
    *,
    split: str = "test",
    progress: Progress = silent,
    each: Callable[[Measurement], object] = lambda so_far: None,
    memory: int | None = None,
    told: Callable[[Holding], object] = lambda _: None,
) -> Measurement:
    """One model on every population of the split; arguments and errors as `evaluate`.

    Proof:  tests/test_suite.py::test_baseline_is_evaluated_once,
        ::test_what_was_evaluated_is_handed_over_at_once
    """
    wanted = judged(corpus, split, model)
    parameters = held("evaluate", model, wanted.values(), memory, told)
    total = _batch_count(model.config, wanted)
    done = counter(progress, total)
    progress(0, total)
    found = Measurement(split, model.config.vocabulary, model.dtype, MappingProxyType({}))
    for name, population in wanted.items():
        measured = _measured(model.config, parameters, population, done)
        known = MappingProxyType({**found.populations, name: measured})
        found = replace(found, populations=known)
        each(found)
    return found


def compare(after: Measurement, before: Measurement | None) -> Evaluation:
    """The table of two measurements of the same populations, or of one if `before` is None.

    Raises:
        ConventionError: they differ in vocabulary, split, populations, or numbers of tokens.

    Proof:  tests/test_suite.py::test_by_hand; ::test_measurements_must_match
    """
    if before is not None:
        _require_alike(before, after)
    rows = tuple(
        _row(name, None if before is None else before.populations[name], measured)
        for name, measured in after.populations.items()
    )
    return Evaluation(after.split, after.dtype, None if before is None else before.dtype, rows)


def _row(name: str, before: Measured | None, after: Measured) -> Row:
    agreement: dict[str, float] = {}
    kept = above = p = math.nan
    if before is not None:
        if before.top is not None and after.top is not None:
            for gain in Gain:
                score_N = ndcg_of_ids(before.top, after.top, gain)
                agreement[f"ndcg_{gain}"] = float(score_N.mean())
        if after.kind in RETAINED:
            value = RETAINED[after.kind]
            was, is_now = before.values[value], after.values[value]
            kept = retention(was, is_now)
            above = retention_above_chance(was, is_now, after.chance)
        if before.right is not None and after.right is not None:
            p = paired(before.right, after.right)
    return Row(
        name=name,
        kind=after.kind,
        items=after.items,
        tokens=after.tokens,
        chance=after.chance,
        before=None if before is None else before.values,
        after=after.values,
        agreement=MappingProxyType(agreement),
        retention=kept,
        retention_above_chance=above,
        interval=after.interval,
        p=p,
    )


def _require_alike(before: Measurement, after: Measurement) -> None:
    for what in ("vocabulary", "split"):
        if getattr(before, what) != getattr(after, what):
            raise ConventionError(
                f"evaluate: the baseline's {what} is {getattr(before, what)!r}, the model's "
                f"{getattr(after, what)!r}. They must be equal to be compared."
            )
    facts = [
        {name: (p.kind, p.items, p.tokens, p.chance) for name, p in m.populations.items()}
        for m in (before, after)
    ]
    if facts[0] != facts[1]:
        raise ConventionError(
            "evaluate: the baseline was measured on other populations: (kind, items, tokens, "
            f"chance) {facts[0]}, the model on {facts[1]}. Were they made from the same corpus?"
        )


# ------------------------------------------------------------------ one population


def judged(corpus: Corpus, split: str, *models: Model) -> Populations:
    """The populations of a split; refuses those that a model cannot be judged on."""
    require_choice("evaluate", "split", split, SPLITS)
    wanted = {name: p for name, p in corpus.populations.items() if p.split == split}
    if not wanted:
        have = ", ".join(f"{n} ({p.split})" for n, p in corpus.populations.items()) or "none"
        raise EmptyError(
            f"evaluate: the corpus has no population of split {split!r}; it has: {have}."
        )
    for model in models:
        require_readable(wanted, model.config)
    return wanted


def require_readable(wanted: Populations, config: ModelConfig) -> None:
    """Refuse populations that the model cannot be judged on, before any work."""
    for name, population in wanted.items():
        if isinstance(population, ImagePopulation):
            require_image_population("evaluate", name, population, config)
            continue
        require_population("evaluate", name, population, config)
        if (population.length == population.prompt_length).all():
            raise EmptyError(f"evaluate: population {name!r} has no token behind any prompt.")


def _batch_count(config: ModelConfig, wanted: Populations) -> int:
    return sum(
        len(image_batches(config, p) if isinstance(p, ImagePopulation) else batches(p))
        for p in wanted.values()
    )


def _measured(
    config: ModelConfig,
    parameters: Parameters,
    population: Population | ImagePopulation,
    done: Callable[[], object],
) -> Measured:
    if isinstance(population, ImagePopulation):
        said = classify(config, parameters, population, done)
        values = {"accuracy": accuracy(said, population.labels)}
        facts = (population.kind, len(population.labels), 0, population.chance)
        return _judged(facts, values, said == population.labels)
    kind, chance = str(population.kind), float(population.chance)
    tokens = int((population.length - population.prompt_length).sum())
    facts = (kind, len(population.tokens), tokens, chance)
    if kind == "text":
        nats, top = _text(config, parameters, population, done)
        value = MappingProxyType({"perplexity": perplexity(nats, tokens)})
        return Measured(*facts, value, top, interval=_interval(nats, population))
    decoded = decode_population(config, parameters, population, done)
    truth = suffixes(population)
    right = exact_match(decoded, truth)
    values = {"accuracy": float(right.mean())}
    if kind == "recite":
        found = recitation(decoded, truth)
        values = {"strict": found.strict, "loose": found.loose, "distance": found.distance}
    return replace(_judged(facts, values, right), said=tuple(decoded))


def _judged(facts: tuple[str, int, int, float], values: dict[str, float], right: Array) -> Measured:
    """What items that are right or wrong come to."""
    return Measured(*facts, MappingProxyType(values), right=right, interval=wilson(right))


def _interval(nats: Array, population: Population) -> tuple[float, float]:
    """A perplexity's, of the nats of every scored position."""
    tokens = population.length - population.prompt_length
    low, high = bootstrap(by_item(population, nats), tokens)
    return perplexity(low, 1), perplexity(high, 1)


def _text(
    config: ModelConfig,
    parameters: Parameters,
    population: Population,
    done: Callable[[], object],
) -> tuple[Array, Array]:
    """Nats (N,) float64 and likeliest ids (N, K) of every scored position, batch by batch."""
    K = min(NDCG_K, config.vocabulary)

    def take(logit_NV: Array, label_N: Array) -> tuple[Array, Array]:
        top_NK = top_ids(logit_NV, K).astype(np.int32)
        return cross_entropy(logit_NV, label_N)[0].astype(np.float64), top_NK

    found = at_scored(config, parameters, population, take, done)
    return np.concatenate([n for n, _ in found]), np.concatenate([top for _, top in found])
