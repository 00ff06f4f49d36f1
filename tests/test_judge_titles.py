"""What a cause is called: the bug that was found, where its fault covers several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.diagnosis import telling
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.titles import ANOTHER, FIELDS, NETWORKS, joined, of_size, titles
from refcurv.judge.diagnosis.variants import Setting
from refcurv.judge.diagnosis.variants.networks import CHANGES
from refcurv.judge.diagnosis.variants.positions import BUT, ROWS, WHERE
from refcurv.judge.diagnosis.variants.setting import (
    COUNTS,
    HALVES,
    INPUTS,
    LABELS,
    OPERANDS,
    OUTPUTS,
    OVERWRITTEN,
    POOLING,
)
from refcurv.judge.diagnosis.variants.texts import LONGER, PROMPT, PROMPTS, TEXTS
from refcurv.law.conventions import Fisher
from refcurv.model.config import Activation

AS_NAMED = {
    "network": ("rotary pairs interleaved", "grouped heads tiled", "all in bfloat16"),
    "labels": ("empirical", "argmax", "one uniform", "joint", "double shift", "no shift"),
    "where": ("pads", "every token", "ignored pads", "ignored prompts", "ignored everywhere",
              "last class", "first class", "class at -100", "without eos"),
    "rows_A": ("with last", "with pads", "with pads, without last",
               "with pads, without the last column", "without eos"),
    "count": ("reference", "sequences", "labels", "every sequence"),
    "pooling_A": tuple(POOLING),
    "tensor_A": tuple(OPERANDS),
    "tensor_G": (*HALVES, *OPERANDS),
}  # fmt: skip
"""What its fault names, and nothing else."""


def values():
    """Every value of a field of a Setting that is a fault."""
    every = {
        "labels": LABELS, "where": WHERE, "rows_A": ROWS, "count": COUNTS, "pooling_A": POOLING,
        "tensor_A": (*INPUTS, *OVERWRITTEN, *OPERANDS), "tensor_G": (*OUTPUTS, *HALVES, *OPERANDS),
    }  # fmt: skip
    yield from ((field, value) for field, some in every.items() for value in some)
    yield "rows_A", f"{BUT}no padding"
    for text in (*TEXTS, *PROMPTS):
        yield "text", text


def test_every_bug_has_a_title_of_its_own():
    """Or it is listed here as what its fault names."""
    changes = {name.partition(", draw ")[0]: one.fault for name, one in CHANGES.items()}
    own = {*AS_NAMED["network"], *(x for x in changes if x.startswith(("dropout", "products in")))}
    assert NETWORKS.keys() == changes.keys() - own
    seen = set()
    for field, value in values():
        starts = [x for x in (BUT, LONGER, PROMPT) if value.startswith(x)]
        known = (field, starts[0] if starts else value)
        as_named = value in AS_NAMED.get(field, ()) or (field == "text" and "a t" in value[:3])
        assert (known in FIELDS) != as_named, (field, value)
        seen.add(known)
    assert FIELDS.keys() <= seen
    for one in (*NETWORKS.values(), *FIELDS.values(), *ANOTHER.values()):
        assert one.remedy.endswith(".") and not one.name.endswith(".")
        assert one.name not in {fault.name for fault in FAULTS.values()}


def of(model, fault, setting, side="G", note="", fisher=Fisher.EXPECTED):
    dump = SimpleNamespace(program="official")
    case = SimpleNamespace(model=model, dump=dump, reference=SimpleNamespace(fisher=fisher))
    return joined(titles(case, fault, setting, side, note))


@pytest.fixture(scope="module")
def model():
    own = config(norm_eps=1e-5, rope_theta=1e4, activation=Activation.SILU)
    return rc.Model(own, random_parameters(own, 0))


FOUND = {
    "B51": (("rotary base", 5e5), "another rotary base: rope_theta 500000, ours 10000",
            "(rope_theta)"),
    "B53": (("eps", 1e-6), "another eps in the norms: norm_eps 1e-06, ours 1e-05", "rms_norm_eps"),
    "B54": (("activation gelu", 0.0), "another activation: activation gelu, ours silu", "GELU"),
    "B56": (("attention in bfloat16", 0.0), "attention in bfloat16", "float32"),
    "B57": (("weights to bits", 4.0), "weights rounded to 4 bits", "unrounded"),
    "B60": (("all in float16", 0.0), "model in float16", "float16"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOUND)
def test_a_cause_is_called_by_the_bug_that_was_found(model, fault):
    level, name, remedy = FOUND[fault]
    one = of(model, fault, Setting(network=(level,)))
    assert one.name == name and remedy in one.remedy


def test_float16_is_not_called_tf32():
    """They have as many digits, so that a size alone tells neither."""
    assert of_size("B59", "What is left has the size of bfloat16.", "").name == FAULTS["B59"].name
    assert of_size("B60", "A network in float16 is 1.1 times as far", "").name == "model in float16"
    for fault, dtype in (("B59", "bfloat16"), ("B60", "float16")):
        words = f"A network under autocast to {dtype} is 1.1 times as far from ours as theirs."
        assert of_size(fault, words, "").name == f"a model under autocast to {dtype}"
    both = of_size("B60", "What is left has the size of tf32.", "official")
    assert "float16" in both.name and "TF32" in both.name and "allow_tf32" in both.remedy


def test_a_factor_is_called_by_what_it_is():
    """Sums that nobody divided are not divided by sequences."""
    own = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7)
    tokens = np.random.default_rng(0).integers(0, own.vocabulary, (12, 9))
    ours = rc.collect(
        rc.Model(own, random_parameters(own, 3)), rc.Corpus(tokens), "blocks.0.mlp.*", "empirical"
    )
    for of_A, of_G, fault, name in (
        (96, 96, "B4", "Sums that are not divided. "),
        (96, 1, "B4", "Sums that are not divided. A alone is ours times 96, "),
        (96 / 80, 96 / 80, "B4", "Divided by another count than that of the rows. "),
        (1, 2, "B5", "Curvature counted twice. "),
        (1, 0.5, "B5", "Half of the curvature. "),
    ):
        theirs = {x: (of_A * one.A, of_G * one.G, one.n_A) for x, one in ours.items()}
        verdict = rc.validate(theirs, ours, arithmetic="float64", declared={"fisher": "empirical"})
        (cause,) = verdict.causes
        assert cause.fault == fault and cause.sentence.startswith(name), cause.sentence


def test_a_scale_is_told_as_a_number(model):
    usual = model.config.head_width**-0.5
    one = of(model, "B54", Setting(network=(("score scale", 0.3),)))
    assert one.name == f"another scale of the attention scores: score_scale 0.3, ours {usual:.6g}"
    one = of(model, "B53", Setting(network=(("eps", 0.0),)))
    assert one.name == "another eps in the norms: norm_eps 0, ours 1e-05"


def test_bugs_of_one_fault_are_all_named(model):
    """And what its fault names has that name, with the advice for that program."""
    both = Setting(network=(("rotary base", 5e5), ("rotary pairs interleaved", 0.0)))
    assert of(model, "B51", both).name.endswith(f"ours 10000; {FAULTS['B51'].name}")
    many = Setting(labels="argmax", rows_A="without last", rows_G="without last")
    assert of(model, "B27", many).name == "the last position left out of the rows"
    assert of(model, "B16", many).name == FAULTS["B16"].name
    assert "data" in of(model, "B16", many, fisher=Fisher.EMPIRICAL).name
    labels = of(model, "B15", Setting(labels="empirical"))
    assert labels.remedy == FAULTS["B15"].advice("official")
    assert "--sample_labels" not in of(model, "B15", Setting(labels="sampled")).remedy


def test_what_looks_the_same_is_of_its_part_of_a_setting():
    both = Setting(rows_A="without first", rows_G="without first", tensor_G="activation")
    chosen = Chosen(Idea(both.faults, both), {"x": Left(0.0, 1.0, "", both.alike)})
    bare = replace(chosen, idea=Idea(both.faults))
    rows, tensor = both.faults
    assert both.alike == ("B42", "B20")
    for one, fault, alike in (
        (chosen, rows, ("B20",)), (chosen, tensor, ("B42",)), (bare, rows, both.alike),
    ):  # fmt: skip
        assert telling._like(fault, [(Side("G"), one)]) == alike


def test_where_G_is_of_a_neighbour_nothing_is_said_of_A():
    """Gate and up swapped: both read the same input."""
    own = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7)
    tokens = np.random.default_rng(0).integers(0, own.vocabulary, (12, 9))
    model = rc.Model(own, random_parameters(own, 3))
    ours = rc.collect(model, rc.Corpus(tokens), "blocks.0.mlp.*", "empirical")
    other = {"gate": "up", "up": "gate", "down": "down"}
    theirs = {x: ours[x.rpartition(".")[0] + "." + other[x.rpartition(".")[2]]] for x in ours}
    theirs = {name: (one.A, one.G, one.n_A) for name, one in theirs.items()}
    verdict = rc.validate(theirs, ours, arithmetic="float64", declared={"fisher": "empirical"})
    (cause,) = verdict.causes
    assert cause.fault == "B34" and cause.sentence.startswith("G of another part of a matrix")
    assert "input" not in cause.sentence + cause.remedy and "gate and up" in cause.remedy
