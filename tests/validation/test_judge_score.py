"""validation/judge: honest programs agree with refcurv, each fault shows, and what is counted."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter

import numpy as np
import pytest

import refcurv as rc
from refcurv.judge.verdict import Comparison, Verdict
from validation.judge import models, planted_editor, planted_numpy, score, table
from validation.judge.cases import (
    ARITHMETIC,
    EDITED,
    EXPECTED,
    Case,
    dump_of,
    edited,
    effect,
    faults_of,
    judged,
    judged_edit,
    pairs,
    reference,
    setting_of,
    singles,
)
from validation.judge.models import GROUPS, HELD_OUT, SETTINGS, TUNED_ON
from validation.judge.programs.editor import Editor
from validation.judge.score import distance
from validation.judge.setting import bfloat16

WITHIN = {"float64": 1e-13, "float32": 2e-5, "bfloat16": 0.1}
"""Chosen: observed at most 7e-15, 3e-6 and 0.05; the mildest fault of float64 is at 9e-8."""


def truth_of(case):
    s, truth = setting_of(case.setting), reference(case.setting, case.labels)
    return {k: (f.A_joint if s.joint else f.A, f.G, f.n_A) for k, f in truth.items()}


@pytest.mark.parametrize("labels", ["gold", "given"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_honest_numpy_program_is_collect(setting, labels):
    case = Case("numpy", setting, labels, "float64")
    assert distance(dump_of(case), truth_of(case)) < WITHIN["float64"]


@pytest.mark.parametrize("dtype", ARITHMETIC)
def test_honest_programs_pass_in_each_arithmetic(dtype):
    for setting, labels in (("gpt2-joint", "given"), ("olmo2-padded", "gold")):
        case = Case("numpy", setting, labels, dtype)
        dump = dump_of(case)
        assert distance(dump, truth_of(case)) < WITHIN[dtype]
        assert judged(case, dump).passed


@pytest.fixture
def torch():
    """PyTorch on one thread, or a skip."""
    module = pytest.importorskip("torch", reason="extra `peers`")
    before = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(before)


@pytest.mark.peers
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_honest_torch_program_is_collect(torch, setting):
    for labels, dtype in (("gold", "float64"), ("given", "float32")):
        case = Case("torch", setting, labels, dtype)
        assert distance(dump_of(case), truth_of(case)) < WITHIN[dtype]


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("setting", [*[*SETTINGS][:-5:3], *[*SETTINGS][-5:]])
def test_the_honest_torch_program_passes(torch, setting):
    """The score judges those of all settings. In bfloat16 few rows may err by half of G."""
    for labels, dtype in (("gold", "float64"), ("given", "float32"), ("own", "bfloat16")):
        case = Case("torch", setting, labels, dtype)
        failed = judged(case, dump_of(case)).failed
        assert all(f.verdict == "undecided" and f.budget >= 0.5 for f in failed), failed
        assert not failed or dtype == "bfloat16"


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("setting", EXPECTED)
def test_the_honest_torch_program_sends_back_every_label(torch, setting):
    case = Case("torch", setting, "expected", "float64")
    assert distance(dump_of(case), truth_of(case)) < WITHIN["float64"]


def shows(program, name):
    """How far the fault moves the dump, in the first setting where it does."""
    fault = faults_of(program)[name]
    for setting in fault.settings or SETTINGS:
        labels = "given" if "given" in fault.kinds else fault.kinds[0]
        case = Case(program, setting, labels, fault.dtypes[0], (name,))
        moved = distance(dump_of(case), dump_of(case.honest))
        if moved:
            return moved
    return 0.0


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("setting", [*SETTINGS][-5:])
def test_in_the_newest_settings_each_fault_writes_a_dump_and_no_two_variants_one(torch, setting):
    for program in ("torch", "numpy"):
        before = {}
        for name, fault in faults_of(program).items():
            if setting not in (fault.settings or SETTINGS) or fault.kinds == ("expected",):
                continue
            case = Case(program, setting, fault.kinds[0], fault.dtypes[0], (name,))
            dump = dump_of(case)
            assert dump
            if case.honest not in before:
                before[case.honest] = [dump_of(case.honest)]
            key = case.honest, name.split("_")[0]
            for other in before.setdefault(key, []):
                assert distance(dump, other), name
            if distance(dump, before[case.honest][0]):
                before[key].append(dump)


@pytest.mark.peers
@pytest.mark.parametrize("setting", [name for name in SETTINGS if setting_of(name).left])
def test_a_program_that_pads_on_the_left_does(torch, setting):
    s = setting_of(setting)
    for program in ("torch", "numpy"):
        made = Case(program, setting, "gold", "float64").program_class()(s, "gold")
        b = made.batch(slice(0, 16))
        assert b.real[:, -1].all() and not b.real[:, 0].all()
        assert (b.inputs[b.real] == made.data.inputs[:16][made.data.real[:16]]).all()


@pytest.mark.parametrize("name", planted_numpy.FAULTS)
def test_each_fault_of_the_numpy_program_shows(name):
    assert shows("numpy", name) > 1e-4


@pytest.mark.peers
@pytest.mark.slow
def test_each_fault_of_the_torch_program_shows(torch):
    mild = {name: shows("torch", name) for name in faults_of("torch")}
    assert min(mild.values()) > 5e-8, mild
    assert len(mild) > 92


@pytest.mark.parametrize(
    "setting", ["olmo2-padded", "llama-left", "mistral-ragged", "smollm3-chats", "phi4-half"]
)
def test_the_honest_editor_is_decompose_and_edit(setting):
    s = edited(setting, few=False)
    basis = rc.decompose(rc.collect(s.model, s.corpus, s.layers, "empirical"))
    after, record = rc.edit(s.model, basis, rho=Editor.rho)
    kept, program = {one.layer: one.kept for one in record.layers}, Editor(s)
    for name, found in program.edit().items():
        W = after.parameters[f"{name}.weight"]
        assert np.linalg.norm(found["W"] - W) < 1e-12 * np.linalg.norm(W)
        assert found["mask"].sum() == kept[name]
        assert np.allclose(found["mu"], basis[name].mu, rtol=0, atol=1e-13 * found["mu"][0])
        rows = program.collector.kept[name]
        trace = sum((a**2).sum(1) @ (g**2).sum(1) for a, g in rows) / found["n_A"]  # O21
        assert found["Lambda"].sum() == pytest.approx(trace, rel=1e-12)


@pytest.mark.parametrize("name", planted_editor.FAULTS)
def test_each_fault_of_the_editor_shows(name):
    fault = planted_editor.FAULTS[name]
    s = edited("olmo2-padded", fault.few)
    honest = type("Honest", (Editor,), {"rho": fault.rho})(s).edit()
    moved = [
        np.linalg.norm(1.0 * one[field] - honest[layer][field])
        / np.linalg.norm(1.0 * honest[layer][field])
        for layer, one in fault(s).edit().items()
        for field in ("U_A", "mu", "Lambda", "mask", "W")
    ]
    assert max(moved) > 1e-8


def test_an_editors_dump_is_read_and_its_factors_judged():
    verdict, honest = judged_edit("olmo2-square", "")
    assert verdict.passed and {f.layer for f in honest.findings} == {EDITED["olmo2-square"]}


def test_bfloat16_is_rounded_to_even():
    x = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-7, 3.0e38])
    assert (bfloat16(x)[:4] == [1, 1, 1 + 2.0**-6, -1 - 2.0**-7]).all()
    assert np.isfinite(bfloat16(x)).all()


@pytest.mark.slow
def test_a_fault_counts_beyond_ten_budgets():
    case = Case("numpy", "olmo2-padded", "gold", "float64")
    dump = dump_of(case)
    honest = judged(case, dump)
    layer = next(iter(dump))
    budget = next(f.budget for f in honest.findings if (f.layer, f.quantity) == (layer, "G"))

    def moved(share):
        A, G, n = dump[layer]
        return effect(judged(case, dump | {layer: (A, G * (1 + share), n)}), honest)

    assert effect(honest, honest) < 1
    assert moved(5 * budget) < 10 < moved(25 * budget)
    without = {k: v for k, v in dump.items() if k != layer}
    A, G, n = dump[layer]
    for broken in (without, dump | {layer: (A, G * np.nan, n)}, dump | {layer: (A, G[1:, 1:], n)}):
        assert effect(judged(case, broken), honest) == math.inf


def test_of_two_yardsticks_the_longer_counts():
    def verdict(error, budget):
        return Verdict((Comparison("x", "G", error, budget, "pass"),))

    short, wide = verdict(0.01, 0.02), verdict(0.03, 0.1)
    assert effect(verdict(0.5, 0.02), short) == 25
    assert effect(verdict(0.5, 0.02), short, wide) == effect(verdict(0.5, 0.02), wide) == 5
    drawn = Case("numpy", "vit", "own", "bfloat16", ("B55",))
    assert [one.dtype for one in drawn.yardsticks] == ["bfloat16", "float64"]
    assert not any(one.faults for one in drawn.yardsticks)


@pytest.mark.slow
def test_given_labels_leave_nothing_to_drawing():
    case = Case("numpy", "olmo2-padded", "given", "float64")
    layer = "blocks.0.mlp.up"
    A, G, n = dump_of(case)[layer]
    bent = G.copy()
    bent[0, 0] *= 1 + 1e-6
    found = judged(case, {layer: (A, bent, n)}).findings
    assert {f.verdict for f in found if f.layer == layer and f.quantity == "G/tr G"} == {"fail"}


def record(planted, named=(), alike=(), passed=False, effect=99.0):
    return {"faults": list(planted), "named": list(named), "alike": list(alike), "passed": passed,
            "effect": effect}  # fmt: skip


def test_what_is_exact():
    assert table.exact(record(["B28_pads"], ["B28"]))
    assert not table.exact(record(["B28_pads"], []))
    assert not table.exact(record(["B28_pads"], ["B27"]))
    assert not table.exact(record(["B28_pads"], ["B28", "B1"]))
    assert not table.exact(record(["B28_pads"], ["B28"], passed=True))
    assert table.exact(record(["B46_mean"], ["B43"], ["B46"])), "a listed pair, and the judge says"
    assert not table.exact(record(["B46_mean"], ["B43"])), "the judge does not say so"
    assert table.exact(record(["B20_first"], ["B49"], ["B20"])), "the same rows"
    assert not table.exact(record(["B3"], ["B2"], ["B3"])), "a pair that the page does not list"
    assert table.exact(record(["B1", "B28"], ["B28", "B1"]))
    assert not table.exact(record(["B1", "B28"], ["B28"]))
    assert score.counts(record([], effect="infinite")) and not score.counts(record([], effect=9.9))


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "RESULTS", tmp_path / "results.jsonl")
    case = Case("numpy", "gpt2-joint", "gold", "float64", ("B51_offset",))
    first = score.Run("code").case(case)
    assert not first["passed"] and score.counts(first)
    assert score.Run("code").case(case.honest)["passed"]
    with score.RESULTS.open("a") as file:
        file.write('{"id": "cut sho')
    assert [one.dtype for one in case.yardsticks] == ["float64"]
    monkeypatch.setattr("validation.judge.cases.judged", None)
    assert score.Run("code").case(case) == first
    assert json.loads(score.RESULTS.read_text().splitlines()[0]) == first
    assert score.Run("other code").case(case)["raised"], "of other code nothing is known"


def test_a_judge_that_raises_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "RESULTS", tmp_path / "results.jsonl")

    def broken(case, dump):
        raise KeyError("here")

    monkeypatch.setattr("validation.judge.cases.judged", broken)
    found = score.Run("code").case(Case("numpy", "gpt2-joint", "gold", "float64"))
    assert not found["passed"] and found["raised"] == "KeyError: 'here'"
    monkeypatch.setattr("validation.judge.cases.dump_of", lambda case: broken(case, None))
    with pytest.raises(KeyError):
        score.Run("code").case(Case("numpy", "gpt2-prompts", "gold", "float64"))


def planned(settings=9, ids=7):
    faults = ["", *(f"B{n}" for n in range(ids)), "B0_twice", "B1_twice"]
    return [
        Case("torch", f"s{s}", kind, dtype, (fault,) if fault else ())
        for s in range(settings)
        for kind in ("gold", "given", "own")
        for dtype in ARITHMETIC
        for fault in faults
    ]


@pytest.mark.parametrize("count", [60, 200, 500])
def test_a_sample_is_even(count):
    every = planned()
    some = score.sampled(every, count)
    strata = [score.stratum(case) for case in some]
    assert len(set(some)) == len(set(strata)) == count, "no second of a stratum before all are in"
    for field, levels in enumerate((9, 3, 3, 8)):
        drawn = Counter(one[field] for one in strata)
        assert len(drawn) == levels
        assert max(drawn.values()) - min(drawn.values()) <= 2
    both = Counter((one[0], one[1]) for one in strata)
    assert max(both.values()) - min(both.values()) <= 3
    assert score.sampled(every[::-1], count) == some
    assert score.sampled(every, count + 30)[:count] == some


def test_a_sample_of_more_than_there_are_strata_holds_variants():
    every = planned()
    some = score.sampled(every, 700)
    assert Counter(map(score.stratum, some)).most_common(1)[0][1] == 2
    assert len({score.stratum(case) for case in some}) == 9 * 3 * 3 * 8
    assert set(score.sampled(every, 10**6)) == set(every)


def test_wilsons_interval():
    assert table.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert table.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert table.wilson(0, 10) == pytest.approx((0, 1 - 0.7225), abs=1e-4)
    shown = table.sure([record(["B1"], ["B1"])] * 8 + [record(["B1"])] * 2, table.exact)
    assert shown == "80.0% (49.0–94.3)"


def test_the_page_counts_held_out_settings_apart(monkeypatch):
    monkeypatch.setattr(table, "GROUPS", {"tuned-on": {"vit"}, "held-out": {"gptj-few"}})
    one = record(["B1"], ["B1"]) | {"dtype": "float64", "labels": "gold"}
    some = [one | {"setting": "vit"}] * 3 + [one | {"setting": "gptj-few", "named": []}] * 2
    rows = table.summary(some).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["tuned on"] * 3 + ["held out"] * 3
    shown = "100.0% (43.8–100.0)"
    assert rows[0] == f"| tuned on | float64 | gold | 3 | {shown} | {shown} |"
    assert rows[-1].startswith("| held out | **all** | **all** | 2 | 100.0%")
    assert rows[-1].endswith("| 0.0% (0.0–65.8) |")


def test_records_of_other_code_are_left_out_and_said_to_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    monkeypatch.setattr(table, "tables", lambda every, left_out: f"{len(every)} {left_out}")
    monkeypatch.setattr("sys.argv", ["score", "--render"])
    table.README.write_text(f"before{table.BEGIN}{table.END}after")
    one = record([], passed=True) | {"setting": "vit"}
    of = [("a", "x"), ("a", "y"), ("b", "x"), ("c", "x"), ("a", "x"), ("b", "z")]
    score.RESULTS.write_text("\n".join(json.dumps(one | {"code": c, "id": i}) for c, i in of))
    assert score.main() == 0
    assert "2 {'a': 2, 'c': 1}" in table.README.read_text()
    said = capsys.readouterr().out
    assert "The newest records are of code b" in said
    assert "2 of `a`, 1 of `c`" in said


def test_each_setting_is_of_one_group():
    assert list(SETTINGS) == [*TUNED_ON, *HELD_OUT] == [n for some in GROUPS.values() for n in some]
    assert set(EDITED) | set(EXPECTED) <= set(SETTINGS)


def test_lists_of_settings_are_what_their_models_are():
    made = {name: setting_of(name) for name in SETTINGS}
    config = {name: s.model.config for name, s in made.items()}
    listed = {
        planted_numpy.TIED: lambda s, c: c.tied,
        planted_numpy.LEFT: lambda s, c: s.left,
        planted_numpy.LAYERNORM: lambda s, c: c.norm == "layer",
        planted_numpy.WINDOWS: lambda s, c: any(c.windows),
        planted_numpy.ROTARY: lambda s, c: c.rope_theta is not None,
        planted_numpy.LEARNED: lambda s, c: c.learned_positions and c.image is None,
        planted_numpy.GROUPED: lambda s, c: 1 < c.kv_heads < c.heads,
        models.IMAGES: lambda s, c: c.image is not None,
        models.BIDIRECTIONAL: lambda s, c: c.image is None and not c.causal,
    }
    for names, is_one in listed.items():
        assert set(names) == {name for name, s in made.items() if is_one(s, config[name])}


@pytest.mark.peers
def test_lists_of_the_torch_programs_settings_are_what_their_corpora_are(torch):
    planted = importlib.import_module("validation.judge.planted_torch")

    def unlabelled(corpus):
        if corpus.images is not None:
            return False
        follows = corpus.real[:, 1:] & (corpus.segment[:, 1:] == corpus.segment[:, :-1])
        return (follows & (corpus.label[:, :-1] < 0)).any()

    listed = {name: set(getattr(planted, name)) for name in ("JOINT", "LEFT", "PROMPTS", "TAILED")}
    for name in SETTINGS:
        s = setting_of(name)
        batches = math.ceil(len(s.corpus.label) / s.batch)
        is_one = {"JOINT": s.joint, "LEFT": s.left, "PROMPTS": unlabelled(s.corpus),
                  "TAILED": batches > 4 and batches % 4 != 0}  # fmt: skip
        assert {key for key, names in listed.items() if name in names} == {
            key for key, value in is_one.items() if value
        }


@pytest.mark.peers
def test_cases_are_what_the_page_says(torch):
    every = list(singles())
    assert len({case.id for case in every}) == len(every)
    planted = {f for case in every for f in case.faults}
    assert planted == set(faults_of("torch")) | set(faults_of("numpy"))
    places = [fault.settings for p in ("torch", "numpy") for fault in faults_of(p).values()]
    assert all(set(some) <= set(SETTINGS) for some in places)
    ids = {name.split("_")[0] for name in planted | set(faults_of("editor"))}
    regular = {f"B{i}" for i in range(1, 79)} - set(table.WITHOUT_TRACE)
    assert ids == regular
    assert all(fault.what for p in ("torch", "numpy", "editor") for fault in faults_of(p).values())
    assert {fault for _, _, fault, _ in table.REPORTS} <= planted
    assert {case.setting for case in every} == set(SETTINGS)
    for group in (name for name, settings in GROUPS.items() if settings):
        first = next(pairs(group))
        assert len({fault.split("_")[0] for fault in first.faults}) == 2
        assert first.setting in GROUPS[group]
