"""What holds in some blocks, or on one side, and is taken to hold in all, or on the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import procedure
from refcurv.judge.diagnosis.ladders import Ladder
from refcurv.judge.diagnosis.search import PLAIN, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.variants import Setting, settings
from refcurv.judge.dump import Dump
from refcurv.judge.verdict import FAIL
from refcurv.model.config import RopeScaling, Scaling
from validation.judge import cases
from validation.judge.programs.numpy_collector import Collector


def mixed(kinds, **changes):
    """A model whose blocks have rotary positions of these kinds, a corpus, and A and G."""
    own = config(layers=len(kinds), head_width=4, rotary=kinds, **changes)
    model = rc.Model(own, random_parameters(own, 5))
    corpus = rc.Corpus(np.random.default_rng(1).integers(0, own.vocabulary, (12, 9)))
    return model, corpus, rc.collect(model, corpus, "**", "empirical")


def causes(made, **other):
    """What is named of what another config makes."""
    model, corpus, factors = made
    model = replace(model, config=replace(model.config, **other))
    theirs = rc.collect(model, corpus, "**", "empirical")
    return rc.validate(theirs, factors, model=made[0], corpus=corpus).causes


def named(made, **other):
    """Their ids."""
    return [cause.fault for cause in causes(made, **other)]


def in_all(made):
    """The changes of all blocks that can occur, with their levels."""
    model, corpus, factors = made
    case = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    return {one for each in settings(case) for one in each.network if "all blocks" in one[0]}


LINEAR = RopeScaling(kind=Scaling.LINEAR, factor=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["main", "local"])
@pytest.mark.parametrize("changes", [{"local_theta": 7.0}, {"local_theta": 100.0}])
def test_rotary_positions_of_some_blocks_are_tried_in_all(kind, changes) -> None:
    """Of another base, or of one base with and without a scaling."""
    made = mixed(("main", "local"), rope_scaling=LINEAR, **changes)
    assert (f"{kind} rotary positions in all blocks", 0.0) in in_all(made)
    assert named(made, rotary=(kind, kind)) == ["B51"]


def test_a_block_without_rotary_positions_may_get_them() -> None:
    made = mixed(("none", "main"))
    assert in_all(made) == {("main rotary positions in all blocks", 0.0)}
    assert named(made, rotary=()) == ["B51"]
    assert not in_all(mixed(("main", "main")))
    assert not in_all(mixed(("local", "main"), local_theta=100.0))  # of one base both are the same


def test_a_window_of_some_blocks_is_tried_in_all() -> None:
    """As wide as the texts it hides nothing; where all blocks have one it is no other."""
    made = mixed(("main", "main"), windows=(3, 0))
    assert in_all(made) == {("a window in all blocks", 3.0)}
    assert named(made, windows=(3, 3)) == ["B50"]
    for windows in ((9, 0), (3, 3)):
        assert not in_all(mixed(("main", "main"), windows=windows))


def lengths_of(made):
    """The lengths of other texts whose rotary positions can occur."""
    model, corpus, factors = made
    case = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    every = (one for each in settings(case) for one in each.network)
    return [n for name, n in every if name == "rotary positions of texts of length"]


LONG = RopeScaling(kind=Scaling.LONGROPE, original=6, short=(1.0, 1.1), long=(1.3, 9.0))
GROWN = RopeScaling(kind=Scaling.DYNAMIC, original=4, factor=2.0)


@pytest.mark.slow
def test_a_length_that_is_not_the_texts_own_has_its_name() -> None:
    """Short factors in long texts, as where each part is one, and long ones in short texts."""
    wide = replace(LONG, original=9)  # of 9 tokens
    for own, other, length in (
        (LONG, replace(LONG, long=LONG.short), 1),
        (wide, replace(wide, short=wide.long), 10),
    ):
        made = mixed(("main",), rope_scaling=own)
        assert lengths_of(made) == [length]
        (cause,) = causes(made, rope_scaling=other)
        assert cause.fault == "B51" and f"rotary positions of texts of length {length}" in (
            cause.sentence
        )


def test_the_length_of_the_longest_text_is_tried_where_texts_differ_in_length() -> None:
    model, corpus, factors = mixed(("main",), rope_scaling=GROWN)
    assert lengths_of((model, corpus, factors)) == []  # all are of one length
    mask = (np.arange(9) < np.full((12, 1), 9) - np.arange(12)[:, None] % 4).astype(np.uint8)
    shorter = rc.Corpus(corpus.tokens, mask=mask)
    assert lengths_of((model, shorter, rc.collect(model, shorter, "**", "empirical"))) == [9.0]


def factors_of(made):
    """The factors of other releases that can occur."""
    model, corpus, factors = made
    case = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    every = (one for each in settings(case) for one in each.network)
    return [by for name, by in every if name == "rotary scaling by"]


def test_the_factor_of_another_release_is_tried_where_it_scales_something() -> None:
    rule = RopeScaling(kind=Scaling.LLAMA3, factor=32.0, original=8, slow=1.0, fast=4.0)
    assert factors_of(mixed(("main",), rope_scaling=rule)) == [2.0, 4.0, 8.0, 16.0]
    longest = replace(rule, original=10**6)  # each frequency turns often, and stays
    assert not factors_of(mixed(("main",), rope_scaling=longest))
    assert not factors_of(mixed(("main",), rope_scaling=LONG))
    assert not factors_of(mixed(("main",)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_the_factor_of_another_release_has_its_name(kind: str) -> None:
    """8 is Llama 3.1's, and 32 that of 3.2."""
    rule = RopeScaling(kind=kind, factor=32.0, original=8, slow=1.0, fast=4.0)
    (cause,) = causes(mixed(("main",), rope_scaling=rule), rope_scaling=replace(rule, factor=8.0))
    assert cause.fault == "B51" and cause.sentence.startswith("Rotary frequencies scaled by 8")


@pytest.mark.slow
def test_a_scaling_that_is_passed_over_has_its_name() -> None:
    rule = RopeScaling(kind="llama3", factor=8.0, original=8, slow=1.0, fast=4.0)
    (cause,) = causes(mixed(("main",), rope_scaling=rule), rope_scaling=None)
    assert cause.fault == "B51" and "not scaled" in cause.sentence


def test_a_scale_of_embeddings_that_was_rounded_has_its_name() -> None:
    """As Gemma's: 34 for 33.94, which no later norm takes back."""
    made = mixed(("main",), embed_scale=33.94, norm_place="pre")
    assert named(made, embed_scale=34.0) == ["B54"]


class OtherSide(Collector):
    """Rows are counted as if padding were on the other side."""

    def batch(self, at):
        b = super().batch(at)
        real_B1, T = b.real.sum(1, keepdims=True), b.real.shape[1]
        order = np.arange(T) + (-real_B1 if self.setting.left else real_B1)
        b.keep = np.take_along_axis(b.keep, order % T, 1)
        return b


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["opt-scattered", "gpt2-prompts"])
def test_rows_of_the_other_side_are_padding_that_counts(setting) -> None:
    """Padding is on the left, then on the right."""
    case = cases.Case("numpy", setting, "gold", "float64")
    dump = OtherSide(cases.setting_of(setting), "gold", "float64").collect()
    assert [cause.fault for cause in cases.judged(case, dump).causes] == ["B28"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("olmo3-few", "B51_blocks"),
        ("gptneo-repeated", "B51_left"),
        ("esm2-tags", "B50_pads"),
    ],
)
@pytest.mark.slow
def test_positions_of_programs_have_their_name(setting, fault) -> None:
    case = cases.Case("numpy", setting, "gold", "float64", (fault,))
    id = fault.partition("_")[0]
    assert [one.fault for one in cases.judged(case, cases.dump_of(case)).causes] == [id]


@pytest.mark.parametrize(
    ("ours", "under", "offered"), [(0.0, 0.3, False), (0.3, 0.3, True), (0.0, 0.0, True)]
)
def test_what_A_would_show_explains_no_G_alone(ours, under, offered) -> None:
    """A network that A is not of; where A is no longer ours, or stays ours, it may be."""
    layer, steps = "head", Ladder((("float64", 1e-12),))
    network = (("no rotary positions", 0.0),)
    A, both = Setting(network=network), Setting(network=network, pooling_G="batch", batch=2)
    inputs = Side("A", {layer: steps})
    inputs.table = {PLAIN: {layer: Left(ours, 1.0)}, Idea(A.faults, A): {layer: Left(under, 1.0)}}
    side = Side("G", {layer: steps}, inputs=inputs)
    side.table = {PLAIN: {layer: Left(0.9, 1.0)}, Idea(both.faults, both): {layer: Left(0, 1.0)}}
    assert bool(side._options([layer], {layer: PLAIN})) == offered
    for table in inputs.table.values():  # below what the network changes A stays ours
        table["blocks.0.attn.q"] = Left(0.0, 1.0)
    inputs.ladders["blocks.0.attn.q"] = steps
    assert bool(side._options([layer], {layer: PLAIN})) == offered


@pytest.mark.parametrize("of_A", [0.0, 0.5, None])
def test_another_network_of_the_same_fault_is_not_free(of_A) -> None:
    """Unless its A is theirs too; what was not tried on A may be."""
    layer, steps = "head", Ladder((("float64", 1e-12),))
    shown, other = (Setting(network=((name, 3.0),)) for name in ("eps", "variance over d − 1"))
    known, another = Idea(shown.faults, shown), Idea(other.faults, other)
    assert known.faults == another.faults == ("B53",)
    inputs = Side("A", {layer: steps})
    inputs.table = {PLAIN: {layer: Left(0.9, 1.0)}, known: {layer: Left(0.0, 1.0)}}
    if of_A is not None:
        inputs.table[another] = {layer: Left(of_A, 1.0)}
    inputs.chosen = [Chosen(known, inputs.table[known])]
    side = Side("G", {layer: steps}, inputs=inputs)
    assert side.free(known, layer, known)
    assert side.free(another, layer, known) == (of_A != 0.5)
    assert not side.free(another, layer, PLAIN)
    lefts = {PLAIN: 0.9, known: 1e-13, another: 0.0}
    side.table = {idea: {layer: Left(error, 1.0)} for idea, error in lefts.items()}
    first = side.choose([layer], {layer: known})
    assert first is not None and first.idea == (known if of_A == 0.5 else another)


def test_the_search_of_G_knows_what_was_found_of_A(monkeypatch) -> None:
    found = {}

    class Enough(Exception):
        pass

    def stop(_case, sides, *_):
        found.update(sides)
        raise Enough

    monkeypatch.setattr(procedure, "_prepare", stop)
    wrong = SimpleNamespace(layer="head", verdict=FAIL, fault=None, cause="")
    with pytest.raises(Enough):
        procedure.diagnose(SimpleNamespace(), [wrong])
    assert found["G"].inputs is found["A"] and found["A"].inputs is None


@pytest.mark.slow
def test_a_mean_over_a_batch_is_no_moving_average_of_one_layer() -> None:
    """Of the head's three classes two fitted numbers leave nothing."""
    pytest.importorskip("torch")
    case = cases.Case("torch", "vit22b-gray", "given", "bfloat16", ("B44",))
    assert [one.fault for one in cases.judged(case, cases.dump_of(case)).causes] == ["B44"]
