"""Layers and rho that dev chooses, where a report is given none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from strategies import case

import refcurv as rc
from refcurv.cli import main
from refcurv.law.checks import RangeError
from refcurv.model.patterns import expand
from refcurv.report.folder import CHOICE
from refcurv.sweeps import choice, sweep
from refcurv.sweeps.choice import MOST, SHARES, chosen, least_recited, runs
from refcurv.sweeps.outcomes import Outcome, Sweep

UP = ("blocks.1.mlp.up", "blocks.0.mlp.up")


def own(folder: Path, kinds: tuple[str, ...] = ("recite", "text")) -> list[str]:
    """A model of three blocks, some of whose own continuations it is asked for, and texts."""
    one = case(batch=8, length=10, layers=3)
    model = rc.Model(one.config, one.parameters)
    rc.save(model, folder / "w.h5")
    prompt, length = np.full(8, 4), np.full(8, 10)
    said = np.concatenate([one.token[:, :4], rc.greedy(model, one.token[:, :4], 6)], axis=1)
    said[6:] = one.token[6:]
    every = {
        "recite": rc.Population(said, prompt, length, "recite", "dev"),
        "text": rc.Population(one.token, prompt, length, "text", "dev"),
    }
    some = {kind: one if kind in kinds else replace(one, split="test")
            for kind, one in every.items()}  # fmt: skip
    rc.save_corpus(rc.Corpus(one.token, populations=some), folder / "c.h5")
    return ["report", *(str(folder / name) for name in ("w.h5", "c.h5")), "--split", "dev",
            "--out", str(folder / "out")]  # fmt: skip


def test_the_runs_that_are_tried() -> None:
    """A tenth of the blocks each, side by side, none in the first third."""
    config = case().config
    names = list(config.linear_layers())
    parts = "{gate,up}" if "blocks.0.mlp.gate" in names else "up"
    assert runs(config, names) == (f"blocks.1.mlp.{parts}", f"blocks.0.mlp.{parts}")
    deep = replace(config, layers=30)
    every = list(deep.linear_layers())
    found = runs(deep, every)
    assert found[0] == f"blocks.{{27-29}}.mlp.{parts}" and len(found) == 6
    blocks = [name.split(".")[1] for one in found for name in expand(one, every)]
    assert sorted(set(map(int, blocks))) == list(range(12, 30))
    assert runs(deep, [name for name in every if ".27." not in name]) == found[1:]
    for layers, size in ((14, 1), (24, 2)):  # a tenth to the nearest, not at least
        made = replace(config, layers=layers)
        some = runs(made, list(made.linear_layers()))
        blocks = len(expand(some[0], list(made.linear_layers()))) // (2 if "," in parts else 1)
        assert blocks == size
    assert runs(deep, ["head"]) == ("head",)
    assert expand(runs(deep, every[:3])[0], every) == every[:3]


def test_the_rule() -> None:
    """The least recited of the cheap ones; the cheaper of two; else the cheapest."""
    assert least_recited([("a", 1.0, 0.5), ("b", 1.05, 0.1), ("c", 1.2, 0.0)], 1.1)[0] == "b"
    assert least_recited([("a", 1.1, 0.1), ("b", 1.0, 0.1)], 1.1)[0] == "b"
    assert least_recited([("a", 3.0, 0.0), ("b", 2.0, 0.9), ("c", np.inf, 0.0)], 1.1)[0] == "b"


@pytest.mark.parametrize(("kinds", "lacks"), [(("text",), "recite"), (("recite",), "text")])
def test_a_corpus_by_which_nothing_can_be_chosen_is_refused(
    kinds: tuple[str, ...], lacks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the work, in one line."""
    assert main(own(tmp_path, kinds)) == 2
    error = capsys.readouterr().err
    assert "without --rho it is chosen on split dev" in error and f"kind {lacks!r}" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("out/*"))


@pytest.mark.slow
def test_a_report_without_rho_takes_what_dev_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What evaluating each edit by itself chooses; interrupted, it goes on; it says what it did."""
    command, right, calls = own(tmp_path), sweep.measure, []

    def stopped(*args: object, **how: object) -> object:
        calls.append(1)
        if len(calls) == 6:  # the baseline's two, and two edits'
            raise KeyboardInterrupt
        return right(*args, **how)

    monkeypatch.setattr(sweep, "measure", stopped)
    (tmp_path / "out").mkdir()
    other = '{"format": "refcurv-sweep", "version": 2, "of": "something else"}\n'
    (tmp_path / "out" / CHOICE).write_text(other)
    assert main(command) == 130
    told = capsys.readouterr().err
    assert told.startswith("refcurv: report: no rho is given, so dev chooses")  # before the work
    assert (tmp_path / "out" / CHOICE).exists()
    assert main(command) == 0
    both, out = capsys.readouterr(), tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    model, corpus = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    patterns = runs(model.config, list(model.config.linear_layers()))
    assert len(calls) == 6 + 2 * (1 + len(patterns) * len(SHARES)) - 5

    basis, seen = rc.load_bases(out / "basis.h5"), {}
    base = rc.evaluate(model, corpus, split="dev").rows
    for pattern in patterns:
        for rho in SHARES:
            edited, _ = rc.edit(model, basis, {pattern: rho})
            recite, text = (row.after for row in rc.evaluate(edited, corpus, split="dev").rows)
            seen[pattern, rho] = (
                text["perplexity"] / base[1].after["perplexity"], recite["strict"],
            )  # fmt: skip
    cheap = {key: cost for key, cost in seen.items() if cost[0] <= MOST}
    want = (min(cheap, key=lambda key: (cheap[key][1], cheap[key][0])) if cheap
            else min(seen, key=lambda key: seen[key]))  # fmt: skip
    settings = results["settings"]
    assert (settings["layers"], settings["rho"]) == want
    assert [row["layer"] for row in results["edit"]] == expand(want[0], list(basis))
    cut = [row["layer"] for row in results["edit"]]
    assert list(results["spectrum"]) == [row["layer"] for row in results["kept"]] == cut
    assert f"few for '{cut[0]}' and of {len(cut) - 1} layer more" in " ".join(both.err.split())
    assert settings["chosen"].endswith("; dev is reported as well, which flatters it")
    assert settings["chosen"] in " ".join(both.err.split()) and not (out / CHOICE).exists()
    assert settings["chosen"] in (out / "report.html").read_text()


@pytest.mark.slow
def test_layers_that_are_given_are_what_rho_is_chosen_for(tmp_path: Path) -> None:
    """Also of a basis that is there."""
    command = own(tmp_path)
    with patch.object(choice, "SHARES", (0.5,)):
        assert main([*command, "--layers", "blocks.{0-1}.mlp.up"]) == 0
        first = json.loads((tmp_path / "out" / "results.json").read_text())
        assert first["settings"]["layers"] == "blocks.{0-1}.mlp.up"
        assert first["settings"]["rho"] == 0.5
        kept = tmp_path / "b.h5"
        (tmp_path / "out" / "basis.h5").rename(kept)
        assert main([*command, "--basis", str(kept)]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["layer"] for row in again["edit"]} == set(UP)
    assert again["edit"] == first["edit"]


def test_no_edit_that_spoils_all_is_chosen() -> None:
    """Nor one beside a model whose own perplexity is no number."""

    def found(base: float | None, *left: float | None) -> Sweep:
        def dev(perplexity: float | None) -> dict[str, Any]:
            return {"dev": {
                "t": {"kind": "text", "values": {"perplexity": perplexity}},
                "q": {"kind": "recite", "values": {"strict": 0.5}},
            }}  # fmt: skip

        edits = [Outcome(UP[0], 0.9, "kfac", 0.1, "given", 0.5, dev(one)) for one in left]
        return Sweep("dev", "rho", None, dev(base), tuple(edits))

    nothing = replace(found(2.0, 3.0).edits[0], populations={
        "dev": {"q": {"kind": "recite", "values": {"strict": None}}}
    })  # fmt: skip
    bad = found(2.0, None)
    for one in (bad, replace(bad, edits=(nothing, nothing))):
        with pytest.raises(RangeError, match=r"^report: .* of every edit that was tried is inf"):
            chosen(one)
    assert chosen(replace(bad, edits=(nothing, *found(2.0, 3.0).edits))).sentence.endswith("least")
    with pytest.raises(RangeError, match=r"^report: .* of the unedited model is inf"):
        chosen(found(None, 2.0))


def test_what_is_refused_is_refused_by_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by a sweep or an edit, which nobody asked for."""
    command = own(tmp_path)
    model = rc.load(tmp_path / "w.h5")
    flat = {name: 0 * np.array(x) for name, x in model.parameters.items()}
    rc.save(rc.Model(model.config, flat), tmp_path / "w.h5")
    for more, says in (([], "the curvature mass is 0"), (["--layers", ""], "names no layer"),
                       (["--rho", "half"], "SHARE")):  # fmt: skip
        assert main([*command, *more]) == 2
        *told, error = capsys.readouterr().err.splitlines()
        assert ["so dev chooses" in line for line in told] == [True] * (not more)
        assert error.startswith("refcurv: report: ") and says in error


def test_the_sentence_says_what_it_costs(tmp_path: Path) -> None:
    """And that none was cheap enough, where none was."""
    own(tmp_path)
    model, corpus = rc.load(tmp_path / "w.h5"), rc.load_corpus(tmp_path / "c.h5")
    found = rc.sweep(model, corpus, [UP[0]], [0.2, 0.9], ["kfac"], match="rho", split="dev")
    with patch.object(choice, "MOST", 0.0):
        assert "none costs at most" in chosen(found).sentence
    with patch.object(choice, "MOST", np.inf):
        one = chosen(found)
    left = {edit.rho: edit.populations["dev"]["recite"]["values"]["strict"] for edit in found.edits}
    assert left[one.rho] == min(left.values())
    assert f"recites {left[one.rho]:.1%} where" in one.sentence and "none" not in one.sentence
    base = found.baseline["dev"]["recite"]["values"]["strict"]
    assert f"the unedited model does {base:.1%}" in one.sentence
