"""A grid of edits of one model, each measured on the corpus's populations: what `rc.sweep` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from refcurv.curvature import room
from refcurv.curvature.bases import Bases
from refcurv.editing.record import EditRecord
from refcurv.evaluation.held import Holding, holding, kept_bytes
from refcurv.evaluation.items import suffix_nats
from refcurv.evaluation.lines import Lines
from refcurv.evaluation.matching import LARGEST, Match, search_share, text_perplexity
from refcurv.evaluation.suite import Measured, finite, measure
from refcurv.files.digest import changed
from refcurv.files.paths import as_path, free_bytes, require_space
from refcurv.files.scratch import Scratch
from refcurv.law.checks import Array, NonFiniteError
from refcurv.law.words import number_of
from refcurv.model.corpus import Corpus, Population
from refcurv.model.given import require_bytes, require_callable, require_record
from refcurv.model.weights import Model, Overlay, resident
from refcurv.passes.below import Below
from refcurv.passes.held import Held
from refcurv.passes.sweep import lowest_block
from refcurv.progress import Progress, doing, goes_on, silent, size, span
from refcurv.sweeps.asked import Asked, Readable, checked, facts, require_basis, require_mass
from refcurv.sweeps.beside import Collecting, basis_of
from refcurv.sweeps.methods import STRONGEST, Method, methods, pairs_kept
from refcurv.sweeps.outcomes import NO_TARGET, Outcome, Sweep, Values, marked, unmeasured

DEFAULT: Final = ("kfac", "svd", "random-basis", "random-pairs")

MOST: Final = 16
"""Chosen: trials of one match. About 8 find what can be found; more only narrow a jump."""


# ------------------------------------------------------------------ records


@dataclass(frozen=True, slots=True)
class _Run:
    """A sweep at work.

    Fields: model; corpus; asked; basis; lines; whole, the weights in memory, None where they are
    read block by block; how the model is held; below, the states that edits share; progress; count
    of edits; done, seconds of each, 0 where all was known; tried, (pattern, method) → what a match
    tried, {removed: cost}; kept, likewise {removed: pairs}, as far as the lines know it.
    """

    model: Model
    corpus: Corpus
    asked: Asked
    basis: Bases
    lines: Lines
    whole: Mapping[str, Array] | None
    how: Holding | None
    below: Below
    progress: Progress
    count: int
    done: list[float] = field(default_factory=list)
    tried: dict[tuple[str, str], dict[float, float]] = field(default_factory=dict)
    kept: dict[tuple[str, str], dict[float, int]] = field(default_factory=dict)

    def held(self, model: Model) -> Model:
        """An edited model whose passes begin at the states that are kept."""
        if self.whole is not None:
            model = replace(model, parameters=Overlay(self.whole, changed(model)))
        together, in_flight = (self.how.together, self.how.in_flight) if self.how else (None, None)
        return replace(model, parameters=Held(model, together, in_flight, self.below))

    def measured(
        self, key: Mapping[str, Any], split: str, model: Callable[[], Model], what: str,
        base: Values | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """What is left in a split, a line for each population; `model` makes the edited one.

        With what the unedited model does, `base`, logits that are not finite are a result as well.
        """
        found = {}
        for name, population in self.corpus.populations.items():
            if population.split != split:
                continue

            def make(name: str = name, population: Readable = population) -> dict[str, Any]:
                self.say(f"{what}: {name}")
                held = self.held(model())
                alone = replace(self.corpus, populations={name: population})
                try:
                    one = measure(held, alone, split=split).populations[name]
                    return {"found": _plain(one, held, population)}
                except NonFiniteError as error:
                    if base is None:
                        raise
                    return {"found": unmeasured(base[name], str(error))}

            found[name] = self.lines.once("population", {**key, "name": name}, make)["found"]
        return found

    def say(self, what: str) -> None:
        """How long the rest will take, as far as that is known, and what is being done."""
        left = self.count - len(self.done)
        new = [seconds for seconds in self.done if seconds]
        if new:
            what = f"about {span(left * sum(new) / len(new))} left, {what}"
        doing(self.progress, what)


# ------------------------------------------------------------------ the sweep


def sweep(
    model: Model,
    corpus: Corpus,
    layers: Sequence[str],
    rho: Sequence[float],
    methods: Sequence[str] = DEFAULT,
    *,
    basis: Bases | None = None,
    collecting: Collecting = Collecting(),  # noqa: B008
    match: str = "perplexity",
    on: str | None = None,
    split: str = "test",
    seed: int = 0,
    lines: str | Path | None = None,
    states: int | None = None,
    memory: int | None = None,
    stage: Callable[[str], Progress] = lambda name: silent,
    told: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Many edits of a model, by several methods at equal cost, each measured on the populations.

    Definition
        For each pattern and rho: the K-FAC edit; then each other method on the same layers, as
        strong as makes it cost the same on a dev population (`match`). Dev chooses, test reports:
        strengths and the front come from dev populations alone.

    Args:
        model: the unedited one.
        corpus: its populations are measured; from its own tokens factors are collected, if no basis
            is given.
        layers: patterns over linear layers; each is edited by itself.
        rho: shares of the curvature mass that K-FAC keeps, each above 0 and below 1.
        methods: of kfac, svd, random-basis, random-pairs, inputs, outputs. K-FAC is always among
            them, and first.
        basis: of `decompose` or `load_bases`, of all these layers.
        collecting: without a basis, how it is collected. Factors and basis are then kept beside
            `lines`, PATH.factors.h5 and PATH.basis.h5 without PATH's own suffix, and used again.
        match: "perplexity", of a dev text; "forgetting", nats of dev passages; or "rho": every
            method has the number rho, whatever it costs.
        on: the dev population that `match` is about; by default the first of its kind.
        split: the populations that are reported. K-FAC edits are measured on dev as well.
        seed: of random controls.
        lines: a file to write each finished measurement to, a JSON value a line. If it exists, the
            sweep goes on from there, with the same results. Without one all is kept in memory.
        states: bytes of states below the edited blocks that may be kept, on the disk of `lines` or
            in memory; by default half of what is free on that disk, or a quarter of free memory.
        memory: bytes that the process may take, as for `rc.evaluate`.
        stage: given a stage's name, what to call with (done, all).
        told: called with lines of text about what will be done.

    Returns:
        Sweep: plain records, with `to_json()`. The bits of each measurement are those of
        `rc.evaluate` of the edited model. What an edit leaves that is no number is None, and the
        sweep goes on: an infinite perplexity, and all of a population at which logits are not
        finite (`fault` says so). With a K-FAC edit whose cost is infinite nothing is compared.

    Raises:
        ConventionError: an unknown method, match or split; a basis of other weights; `lines` of
        another sweep. SchemaError: `lines` that no sweep left, or changed since. RangeError: a
        rho out of range. NameUnknownError: a pattern that matches no layer. EmptyError: no
        population of the kind that is needed; a layer without curvature, or for svd of zeros.
        RoomError: too small a figure, before the work; says what the least would be.
        StorageError: the disk is full. What `edit`, `truncate`, `collect` and `evaluate` raise.

    Cost: for each edit one pass over the populations of the split, from the lowest edited block on;
        for each that is matched about 8 more over one dev population. What lies below the edited
        blocks is computed once, if there is room to keep it.
    Source: METHOD, Controls.
    Proof: tests/test_sweep.py::test_every_measurement_is_that_of_evaluate,
        ::test_a_killed_sweep_goes_on, ::test_methods_cost_the_same_on_dev,
        ::test_kept_states_change_no_bit, ::test_an_edit_that_costs_all_is_a_result
    """
    _require_given(states, collecting, {"stage": stage, "told": told})
    asked = checked(model, corpus, layers, rho, methods, match, on, split, seed)
    if basis is not None:
        require_basis(model, basis, asked)
    holding(asked.who, model, _read(corpus, asked), memory)  # it refuses too small a figure
    path = None if lines is None else as_path(asked.who, lines)
    known = Lines(path, facts(model, corpus, asked, basis, collecting))
    if basis is None:
        basis = basis_of(model, corpus, asked.names, collecting, path, stage)
    require_mass(basis, asked)
    run = begun(model, corpus, asked, basis, known, path, states, memory, stage("sweep"), told)
    return swept(run, told)


def _require_given(
    states: object, collecting: object, called: Mapping[str, Callable[..., object]]
) -> None:
    """Refuse options that are none, before the work."""
    require_bytes("sweep", "states", states)
    what, how = "collecting must be a Collecting", "Collecting(rows='all')"
    require_record("sweep", what, collecting, Collecting, how)
    for what, one in called.items():
        require_callable("sweep", what, one)


def _read(corpus: Corpus, asked: Asked) -> list[Readable]:
    """The populations that are measured."""
    return [p for p in corpus.populations.values() if p.split in (asked.split, "dev")]


def begun(
    model: Model, corpus: Corpus, asked: Asked, basis: Bases, lines: Lines, path: Path | None,
    states: int | None, memory: int | None, progress: Progress, told: Callable[[str], object],
) -> _Run:  # fmt: skip
    """How the model is held, and where states are kept."""
    wanted = _read(corpus, asked)
    how = holding(asked.who, model, wanted, memory, lambda chosen: told(chosen.text))
    whole = resident(model) if how is None or how.together is None else None
    places = [lowest_block(model.config, names) for names in asked.layers.values()]
    need = sum(kept_bytes(model, one, max(places)) for one in wanted)
    if path is None:
        most, where = (room.available() or 0) // 4 if states is None else states, "in memory"
        below = Below(places[0], {}, most)
    else:
        most, where = free_bytes(path) // 2 if states is None else states, "on the disk"
        require_space(asked.who, path, min(need, most))
        below = Below(places[0], Scratch(path.absolute().parent, asked.who), most)
    count = len(asked.layers) * len(asked.rho) * len(asked.methods)
    part = "" if need <= most else f", of which {size(most)} are kept"
    states_are = f"the states below the edited blocks are {size(need)} {where}{part}"
    told(f"{number_of(count, 'edit')}; {states_are}")
    if len(lines) > 1:
        goes_on(progress, number_of(len(lines) - 1, "measurement"))
    return _Run(model, corpus, asked, basis, lines, whole, how, below, progress, count)


def swept(run: _Run, told: Callable[[str], object]) -> Sweep:
    """Baseline, then every edit; what the lines know is not done again."""
    asked = run.asked
    has_dev = any(one.split == "dev" for one in run.corpus.populations.values())
    splits = list(dict.fromkeys((*(("dev",) if has_dev else ()), asked.split)))
    run.progress(0, run.count)
    begin, known = time.monotonic(), len(run.lines)
    key = {"layers": "", "rho": 1.0, "method": "none"}
    baseline = {split: run.measured(key, split, lambda: run.model, "baseline") for split in splits}
    if len(run.lines) > known:
        told(f"the baseline took {span(time.monotonic() - begin)}")
    run.progress(0, run.count)  # the edits begin now
    edits: list[Outcome] = []
    for pattern, names in asked.layers.items():
        run.below.rise(lowest_block(run.model.config, names))
        for share in asked.rho:
            ways = methods(asked.methods, run.basis, dict.fromkeys(names, share), asked.seed)
            edits += _edited(run, pattern, share, ways, baseline)
    return Sweep(asked.split, asked.match, asked.on, baseline, marked(edits))


def _edited(
    run: _Run, pattern: str, rho: float, ways: Mapping[str, Method], baseline: Mapping[str, Values]
) -> Iterator[Outcome]:
    """The edits that are compared with one another, K-FAC first."""
    target = math.nan  # of K-FAC itself, and at equal rho, none is needed
    for way in ways.values():
        begin, known = time.monotonic(), len(run.lines)
        one = _outcome(run, pattern, rho, way, baseline, target)
        if way.name == "kfac" and run.asked.on is not None:
            target = _cost(one.populations["dev"][run.asked.on])
        run.done.append(time.monotonic() - begin if len(run.lines) > known else 0.0)
        run.progress(len(run.done), run.count)
        yield one


def _outcome(
    run: _Run, pattern: str, rho: float, way: Method, baseline: Mapping[str, Values], target: float
) -> Outcome:
    """One edit: its strength, then what it leaves."""
    key = {"layers": pattern, "rho": rho, "method": way.name}
    what = f"{way.name} at rho {rho:g} of {pattern}"
    if target > LARGEST:
        why = f"the K-FAC edit's {run.asked.match} is beyond what can be matched"
        none = {name: unmeasured(one, why) for name, one in baseline[run.asked.split].items()}
        run.lines.once("edit", key, lambda: {"removed": None, "verdict": NO_TARGET, "kept": None})
        return Outcome(pattern, rho, way.name, None, NO_TARGET, None, {run.asked.split: none})
    same = way.name == "kfac" or run.asked.match == "rho"
    match = None if same else _matched(run, pattern, way, target, what)

    @cache
    def made() -> tuple[Model, EditRecord]:
        return way.cut(run.model, match.strength) if match else way.same(run.model)

    def make() -> dict[str, Any]:
        kept = made()[1].kept
        pairs = way.name == "random-pairs" and match is None  # as many as K-FAC keeps
        removed = match.strength if match else 1 - kept if pairs else 1 - rho
        return {"removed": removed, "verdict": match.verdict if match else "given", "kept": kept}

    row = run.lines.once("edit", key, make)
    where = baseline if way.name == "kfac" else [run.asked.split]
    left = {
        split: run.measured(key, split, lambda: made()[0], what, baseline[split]) for split in where
    }
    return Outcome(pattern, rho, way.name, row["removed"], row["verdict"], row["kept"], left)


def _matched(run: _Run, pattern: str, way: Method, target: float, what: str) -> Match:
    """The strength at which a method costs so much on dev."""
    population = run.corpus.populations[str(run.asked.on)]
    assert isinstance(population, Population)
    tried = run.tried.setdefault((pattern, way.name), {})
    kept = run.kept.setdefault((pattern, way.name), {})

    def measured(removed: float) -> float:
        def make() -> dict[str, Any]:
            run.say(f"{what}: matching")
            model, record = way.cut(run.model, removed)
            own = pairs_kept(record)
            same = (tried[share] for share, pairs in kept.items() if pairs == own)
            if (known := next(same, None)) is not None:  # the same edit
                return {"value": finite(known), "kept": own}
            try:
                value = finite(text_perplexity(run.held(model), population))
            except NonFiniteError:  # it costs more than any number
                value = None
            return {"value": value, "kept": own}

        key = {"layers": pattern, "method": way.name, "removed": removed}
        found = run.lines.once("trial", key, make)
        value = found["value"]
        if found.get("kept") is not None:  # an older line does not say
            kept[removed] = int(found["kept"])
        tried[removed] = math.inf if value is None else float(value)
        return tried[removed]

    low, high = bracket(tried, target, way.weakest)
    return search_share(measured, target, weakest=low, strongest=high, most=MOST,
                        pairs=kept.get)  # fmt: skip


def bracket(tried: Mapping[float, float], target: float, weakest: float) -> tuple[float, float]:
    """Between which shares to search, from what was tried at another rho: the weakest crossing.

    Proof: tests/test_sweep.py::test_what_was_tried_before_narrows_a_search
    """
    above = [share for share, cost in tried.items() if cost > target]
    if not above or min(above) <= weakest:
        return weakest, STRONGEST
    high = min(above)
    below = (share for share, cost in tried.items() if cost < target and share < high)
    return max(below, default=weakest), high


def _cost(one: Mapping[str, Any]) -> float:
    """exp of the nats of a token that is asked for, of a text or of passages; it may be infinite.

    Proof: tests/test_sweep.py::test_what_is_matched_is_the_cost_of_a_match,
        ::test_an_edit_that_costs_all_is_a_result
    """
    values = one["values"]
    value = values["perplexity" if one["kind"] == "text" else "nats"]
    if value is None:
        return math.inf
    try:
        return float(value) if one["kind"] == "text" else math.exp(value)
    except OverflowError:
        return math.inf


def _plain(one: Measured, model: Model, population: Readable) -> dict[str, Any]:
    """A population's values as JSON holds them; of passages also nats for each token."""
    values = {name: finite(value) for name, value in one.values.items()}
    if one.kind == "recite" and isinstance(population, Population):
        values["nats"] = finite(float(suffix_nats(model, population).sum()) / one.tokens)
    return {
        "kind": one.kind, "items": one.items, "tokens": one.tokens, "chance": one.chance,
        "values": values,
        "interval": None if one.interval is None else [finite(x) for x in one.interval],
        "right": None if one.right is None else "".join("01"[int(x)] for x in one.right),
    }  # fmt: skip
