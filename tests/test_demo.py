"""The demo end to end: the paper's effect, and its numbers by another route."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from strategies import case, config, random_parameters

import refcurv as rc
from refcurv import pipeline
from refcurv.cli import main
from refcurv.demo import CORPUS, LAYERS, MODEL, RHO
from refcurv.evaluation import suite
from refcurv.judge import controls
from refcurv.law.checks import StorageError
from refcurv.model import transformer
from refcurv.model.layers import causal_layout
from refcurv.model.loss import cross_entropy
from refcurv.model.patterns import expand
from refcurv.pipeline import Job, _light, _require_space, run
from refcurv.report import folder
from refcurv.report.folder import CONTROLS, outputs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from validation import first_page  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())


def rows(results: dict) -> dict[str, dict]:
    return {row["name"].removesuffix("_test"): row for row in results["evaluation"]["rows"]}


@pytest.mark.slow
def test_memory_goes_and_reasoning_stays(demo: tuple[Path, dict]) -> None:
    found = rows(demo[1])
    quotes, clean = found["quotes"], found["language"]
    assert quotes["before"]["strict"] >= 0.6
    assert quotes["after"]["strict"] <= quotes["before"]["strict"] / 10
    assert clean["after"]["perplexity"] <= 1.15 * clean["before"]["perplexity"]
    for name in ("facts", "open_book", "copying", "addition"):
        assert found[name]["before"]["accuracy"] >= 0.8
        assert found[name]["items"] >= 500
    assert found["boolean"]["before"]["accuracy"] >= 0.75  # chance is 0.5
    for name in ("open_book", "boolean"):
        assert found[name]["retention"] >= 0.95
        assert found[name]["retention_above_chance"] >= 0.95


@pytest.mark.slow
def test_memorised_text_drives_the_flat_bands(demo: tuple[Path, dict]) -> None:
    """P9: memorised tokens avoid the sharpest band of the edited layers, and fill the flattest."""
    for layer in ("blocks.3.mlp.gate", "blocks.3.mlp.up"):
        ratio = demo[1]["bands"][layer]["ratio"]
        assert ratio[0] < 0.5
        assert ratio[-1] > 1.2


@pytest.mark.slow
def test_everything_is_written(demo: tuple[Path, dict]) -> None:
    out, results = demo
    names = {"bands.png", "basis.h5", "edited.h5", "factors.h5", "front.png", "mask.png",
             "report.html", "results.json", "retention.png", "spectrum.png"}  # fmt: skip
    assert {p.name for p in out.iterdir()} == names
    known = {path.name for path in outputs(out).values()}
    kept = ("factors.h5", "results.json", "controls.jsonl", "choice.jsonl")
    begun = {f"{name}.unfinished" for name in kept}
    assert known == names | begun
    assert {row["layer"] for row in results["edit"]} == {"blocks.3.mlp.gate", "blocks.3.mlp.up"}
    assert results["settings"]["layers"] == LAYERS
    assert all(row["rho"] == RHO <= row["mass"] for row in results["edit"])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["before", "after"])
def test_recitation_and_perplexity_by_another_route(demo: tuple[Path, dict], which: str) -> None:
    """Definitions instead of kernels, the truth fed in instead of a cache: the same numbers."""
    out, results = demo
    model = rc.load(MODEL if which == "before" else out / "edited.h5")
    parameters = dict(model.parameters)
    populations = rc.load_corpus(CORPUS).populations

    def logits(token: np.ndarray) -> np.ndarray:
        layout = causal_layout(np.ones(token.shape, bool), np.zeros_like(token))
        final, _ = transformer.forward(model.config, parameters, token, layout)
        return transformer.head_logits(model.config, parameters, final)

    quotes = populations["quotes_test"]
    P, L = int(quotes.prompt_length[0]), int(quotes.length[0])
    assert (quotes.prompt_length == P).all()
    assert (quotes.length == L).all()
    token = quotes.tokens[:, :L].astype(np.int64)
    said = logits(token).argmax(axis=-1)[:, P - 1 : L - 1]
    strict = (said == token[:, P:]).all(axis=1).mean()
    assert rows(results)["quotes"][which]["strict"] == pytest.approx(strict, abs=1e-15)

    clean = populations["language_test"]
    nats = []
    for row, n in zip(clean.tokens.astype(np.int64), clean.length, strict=True):
        nats.append(cross_entropy(logits(row[None, :n])[0, :-1], row[1:n])[0])
    perplexity = np.exp(np.concatenate(nats).mean())
    assert rows(results)["language"][which]["perplexity"] == pytest.approx(perplexity, rel=1e-12)


@pytest.mark.slow
def test_controls_are_matched_on_dev(demo: tuple[Path, dict]) -> None:
    """Each cut made again from the files: its dev perplexity, and what it leaves on test."""
    out, results = demo
    found = results["controls"]
    by_name = {one["method"]: one for one in found["compared"]}
    model, basis = rc.load(MODEL, "float32"), rc.load_bases(out / "basis.h5")
    some = replace(basis, layers={layer: basis[layer] for layer in expand(LAYERS, list(basis))})
    cut = {
        "svd": lambda x: rc.truncate(model, {LAYERS: 1 - x}),
        "random pairs": lambda x: rc.random_pairs(model, some, 1 - x, 0),
        "random basis": lambda x: rc.edit(model, rc.random_basis(some, 0), 1 - x),
    }
    corpus = rc.load_corpus(CORPUS)
    asked = {name: corpus.populations[name] for name in ("language_dev", "quotes_test")}
    corpus = replace(corpus, populations=asked)

    def dev(edited: rc.Model) -> float:
        return rc.evaluate(edited, corpus, split="dev")["language_dev"].after["perplexity"]

    target = dev(rc.load(out / "edited.h5", "float32"))
    assert found["target"] == pytest.approx(target, rel=1e-12)
    assert set(by_name) == {"kfac", *cut}
    for method, again in cut.items():
        one = by_name[method]
        edited, record = again(one["removed"])
        assert [row.method for row in record.layers] == [method] * 2
        assert one["matched"] == (abs(dev(edited) / target - 1) <= found["tolerance"])
        assert one["kept"] == sum(x.kept for x in record.layers) / sum(
            x.pairs for x in record.layers
        )
        recited = rc.evaluate(edited, corpus)["quotes_test"].after["strict"]
        assert recited == pytest.approx(one["recitation"], abs=1 / 96)  # float32 here, 64 there


@pytest.mark.slow
def test_the_curvature_not_the_cutting(demo: tuple[Path, dict]) -> None:
    """At the same perplexity K-FAC leaves less of the quotes than any other cut."""
    results = demo[1]
    kfac, *others = results["controls"]["compared"]
    before = {row["name"]: row["before"] for row in results["evaluation"]["rows"]}
    after = {row["name"]: row["after"] for row in results["evaluation"]["rows"]}
    assert (kfac["method"], kfac["removed"]) == ("kfac", 1 - RHO)
    assert kfac["recitation"] == after["quotes_test"]["strict"]
    assert results["controls"]["unedited"]["perplexity"] == before["language_test"]["perplexity"]
    for one in others:
        assert one["matched"]
        assert one["recitation"] > 2 * kfac["recitation"]


@pytest.mark.slow
def test_curves_pass_the_edit(demo: tuple[Path, dict]) -> None:
    """Every curve holds its compared edit; where more is removed it forgets more and costs more."""
    found = demo[1]["controls"]
    for one in found["compared"]:
        curve = found["curves"][one["method"]]
        keys = ("removed", "recitation", "perplexity")
        assert {key: one[key] for key in keys} in curve
        removed, recitation, perplexity = ([point[key] for point in curve] for key in keys)
        assert removed == sorted(removed) and len(set(removed)) == len(curve) >= 3
        assert recitation == sorted(recitation, reverse=True)
        assert perplexity[0] < perplexity[-1]
        if one["method"] == "kfac":
            assert recitation[-1] < recitation[0]
            assert perplexity == sorted(perplexity)


def test_the_shipped_files_are_small_and_loadable_elsewhere(tmp_path: Path) -> None:
    assert MODEL.stat().st_size + CORPUS.stat().st_size < 6e6
    rc.export(MODEL, tmp_path / "hf")
    rc.convert(tmp_path / "hf", tmp_path / "back.h5")
    model, back = rc.load(MODEL), rc.load(tmp_path / "back.h5")
    assert back.config == model.config
    for name in model.parameters:
        assert np.array_equal(model.parameters[name], back.parameters[name])


@pytest.mark.slow
def test_the_readmes_numbers_are_the_demos(demo: tuple[Path, dict]) -> None:
    """Every row of the README's table, as `refcurv demo` prints it."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = rows(demo[1])
    values = {
        "quotes recited without an error": ("quotes", "strict"),
        "closed-book facts": ("facts", "accuracy"),
        "addition": ("addition", "accuracy"),
        "open-book questions": ("open_book", "accuracy"),
        "boolean logic (chance 12.5 %)": ("boolean", "accuracy"),
        "copying six words": ("copying", "accuracy"),
        "perplexity of clean language": ("language", "perplexity"),
    }
    for label, (name, value) in values.items():
        line = next(x for x in text.splitlines() if x.startswith(f"| {label} |"))
        stated = [float(cell.strip(" %")) for cell in line.split("|")[2:4]]
        row, scale = found[name], 1 if value == "perplexity" else 100
        got = [scale * row[when][value] for when in ("before", "after")]
        digits = 2 if value == "perplexity" else 1
        assert stated == [round(x, digits) for x in got], label
    left = [100 * one["recitation"] for one in demo[1]["controls"]["compared"][1:]]
    assert f"leave {min(left):.0f} to {max(left):.0f} % of the quotes" in text
    assert f"keeping {100 * RHO:.0f} % of the curvature mass" in text


@pytest.mark.slow
def test_the_readmes_picture_and_example_are_the_demos(demo: tuple[Path, dict]) -> None:
    """The bands, and the lines that the example prints, which runs in test_readme.py."""
    text = first_page.PAGE.read_text(encoding="utf-8")
    assert first_page.between(text, "bands") == first_page.picture(demo[1])
    printed = [
        " ".join(
            [row["name"]]
            + [f"{key} {row['before'][key]:.2f} -> {x:.2f}" for key, x in row["after"].items()]
        )
        for row in demo[1]["evaluation"]["rows"][:2]
    ]
    example = first_page.between(text, "example")
    assert "\n".join(["", *printed, ""]) in example
    assert f'"{LAYERS}"' in example and f"rho={RHO}" in example


def own_files(folder: Path, populations: bool) -> list[str]:
    one = case(batch=6, length=9, biases=("q", "up"))
    rc.save(rc.Model(one.config, one.parameters), folder / "w.h5")
    prompt, length = np.full(6, 4), np.full(6, 9)
    judged = {
        "poems": rc.Population(one.token, prompt, length, "recite", "dev"),
        "plain": rc.Population(one.token, prompt, length, "text", "dev"),
    }
    corpus = rc.Corpus(one.token, populations=judged if populations else {})
    rc.save_corpus(corpus, folder / "c.h5")
    return [str(folder / "w.h5"), str(folder / "c.h5"), "--out", str(folder / "out")]


@pytest.mark.parametrize("populations", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("bias", ["separate", pytest.param("joint", marks=pytest.mark.slow)])
def test_the_report_of_a_users_own_files(
    bias: str, populations: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as the four commands one by one; what a corpus has nothing for is left out."""
    files = own_files(tmp_path, populations)
    flags = ["--split", "dev", "--seed", "5", "--bias", bias, "--layers", "blocks.1.mlp.*"]
    assert main(["report", *files, *flags, "--rho", "blocks.1.mlp.up=0.6"]) == 0
    assert "blocks.1.mlp.up" in capsys.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["evaluation"]["rows"]] == [
        "poems",
        "plain",
    ] * populations
    assert bool(results["bands"]) == populations == (out / "bands.png").exists()
    others = results["controls"]
    for one in others.get("compared", ()):
        near = abs(one["dev_perplexity"] / others["target"] - 1) <= others["tolerance"]
        assert one["matched"] == near == (one["verdict"] == "matched")
    assert ("left_out" in others) != populations == (out / "front.png").exists()
    assert (out / "spectrum.png").exists() and "ρ" in (out / "report.html").read_text()
    assert not (out / "factors.h5.unfinished").exists()

    model, corpus = rc.load(files[0]), rc.load_corpus(files[1])
    factors = rc.collect(model, corpus, "blocks.1.mlp.*", seed=5)
    edited, record = rc.edit(model, rc.decompose(factors, bias), {"blocks.1.mlp.up": 0.6})
    assert results["edit"] == record.to_json()
    again = rc.load(out / "edited.h5")
    for name in model.parameters:
        assert np.array_equal(again.parameters[name], edited.parameters[name])


@pytest.mark.slow
def test_a_report_of_few_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what it collects, and with a basis that is given, which does not name its Fisher."""
    files = own_files(tmp_path, False)
    more: list[str] = []
    for _ in range(2):
        assert main(["report", *files, *more, "--layers", "blocks.1.mlp.up", "--rho", "0.6"]) == 0
        told = capsys.readouterr()
        assert "warning: 48 rows are few for 'blocks.1.mlp.up'" in " ".join(told.err.split())
        assert ("Fisher" in told.out) == (not more) and "seed -" not in told.out
        (written,) = json.loads((tmp_path / "out" / "results.json").read_text())["warnings"]
        assert written.startswith("48 rows are few") and written in " ".join(told.out.split())
        assert "48 rows are few" in (tmp_path / "out" / "report.html").read_text()
        (tmp_path / "out" / "basis.h5").rename(tmp_path / "b.h5") if not more else None
        more = ["--basis", str(tmp_path / "b.h5")]


def test_a_report_says_that_nothing_was_recited_before() -> None:
    """Then nothing can be seen of what the edit takes; half of it is enough."""

    def told(kind: str, before: dict[str, float] | None) -> list[str]:
        row = SimpleNamespace(kind=kind, name="poems", before=before)
        return pipeline._unrecited(SimpleNamespace(rows=(row,)))  # type: ignore[arg-type]

    assert "the model recites 49% of 'poems'" in told("recite", {"strict": 0.49})[0]
    assert told("recite", {"strict": 0.5}) == told("answer", {"accuracy": 0.0}) == []
    assert told("recite", None) == []


@pytest.mark.parametrize(
    ("kinds", "rho", "says"),
    [
        ({"poems": ("recite", "test"), "plain": ("text", "test")}, "0.5", "'text' in split 'dev'"),
        ({"a": ("text", "test"), "b": ("text", "dev")}, "0.5", "kind 'recite' in split 'test'"),
        ({"a": ("recite", "test"), "b": ("text", "dev")}, "0.5", "kind 'text' in split 'test'"),
        (
            {"a": ("recite", "test"), "b": ("text", "test"), "c": ("text", "dev")},
            "1",
            "nothing was cut",
        ),
    ],
)
def test_the_report_says_why_it_has_no_controls(
    kinds: dict[str, tuple[str, str]], rho: str, says: str, tmp_path: Path
) -> None:
    one = case(batch=4, length=9)
    rc.save(rc.Model(one.config, one.parameters), tmp_path / "w.h5")
    asked = {
        name: rc.Population(one.token, np.full(4, 4), np.full(4, 9), kind, split)
        for name, (kind, split) in kinds.items()
    }
    rc.save_corpus(rc.Corpus(one.token, populations=asked), tmp_path / "c.h5")
    job = Job(
        weights=tmp_path / "w.h5",
        corpus=tmp_path / "c.h5",
        layers="blocks.1.mlp.up",
        rho=float(rho),
    )
    results = run(job, tmp_path / "out")
    assert says in results["controls"]["left_out"]
    assert results["evaluation"]["rows"] and "controls" in results["seconds"]


@pytest.mark.slow
def test_interrupted_controls_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are announced, keep what they found, and measure none of it twice."""
    files = own_files(tmp_path, True)
    command = ["report", *files, "--split", "dev", "--rho", "0.6", "--layers", "blocks.1.mlp.up"]
    kept, right, calls = tmp_path / "out" / CONTROLS, controls.text_perplexity, []

    def stopped(model: rc.Model, text: rc.Population) -> float:
        calls.append(1)
        if len(calls) == 4:  # K-FAC, two strengths of SVD, then Ctrl-C
            raise KeyboardInterrupt
        return right(model, text)

    monkeypatch.setattr(controls, "text_perplexity", stopped)
    assert main(command) == 130
    err = capsys.readouterr().err
    assert "3 other ways to cut are tried, about 8 strengths each" in err and "kept" in err
    assert "on plain" in err and "report goes on from whatever it has kept" in err
    known = [line for line in kept.read_text().splitlines() if '"trial"' in line]
    assert main(command) == 0
    assert "are known already" in capsys.readouterr().err and not kept.exists()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["controls"]
    every = sum(len(one["tried"]) for one in found["compared"])
    assert len(known) >= 2 and len(calls) - 4 == 1 + every - len(known)  # K-FAC again, and the rest
    kept.write_text('{"format": "refcurv-sweep", "version": 2, "from": "something else"}\n')
    assert main(command) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["controls"]
    assert again == found and not kept.exists()


def test_a_disk_that_fails_under_controls_ends_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found stays, for the same command once there is room; nothing is called left out."""
    command = ["report", *own_files(tmp_path, True), "--split", "dev", "--rho", "0.6", "--layers",
               "blocks.1.mlp.up"]  # fmt: skip
    full = StorageError("write: 'x': No space left on device.")
    with patch("refcurv.evaluation.lines.write_json_lines", side_effect=full):
        assert main(command) == 3
    out = tmp_path / "out"
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "results.json").exists() and (out / "results.json.unfinished").exists()


def test_the_room_of_a_report_is_that_of_what_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors, basis and edited weights; of a report that lies there as much is given back."""
    made = config(layers=1)
    model, asked = rc.Model(made, random_parameters(made, 0)), []
    rc.save(model, tmp_path / "w.h5")
    monkeypatch.setattr(pipeline, "require_space", lambda who, path, nbytes: asked.append(nbytes))
    job = Job(weights=tmp_path / "w.h5", corpus="", layers="blocks.0.mlp.*", rho=0.5)
    basis = rc.decompose(rc.collect(model, rc.Corpus([[1, 2, 3, 4]]), "blocks.0.mlp.up"))
    for given in ((None, None), (None, basis)):
        _require_space(job, tmp_path, model, given)
    weights = (tmp_path / "w.h5").stat().st_size
    each = sum(
        8 * (o * o + i * i) for name, (o, i) in made.linear_layers().items() if "mlp" in name
    )
    assert asked == [2 * each + weights, weights]
    (tmp_path / "edited.h5").write_bytes(b"x" * 300)
    (tmp_path / "factors.h5").write_bytes(b"x" * 20)
    for given in ((None, None), (None, basis)):
        _require_space(job, tmp_path, model, given)
    assert asked[2:] == [2 * each + weights - 320, weights - 300]


def test_a_search_is_in_float32_only_where_that_holds_the_weights(tmp_path: Path) -> None:
    one = case(batch=2, length=5)
    job = Job(weights=tmp_path / "w.h5", corpus="", layers="", rho=0.5)
    for stored, light in (("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        names = dict.fromkeys(one.parameters, stored)
        rc.save(rc.Model(one.config, one.parameters, stored=names), job.weights)
        assert _light(rc.load(job.weights), job).dtype == light
        assert _light(rc.load(job.weights, "float32"), job).dtype == "float32"


def test_controls_are_foretold_from_one_models_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the seconds in which two were measured."""
    files, seen = own_files(tmp_path, True), []
    ticks = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(pipeline, "time", ticks)
    monkeypatch.setattr(pipeline, "controls", lambda s, *_: seen.append(s) or {"left_out": ""})
    job = Job(weights=files[0], corpus=files[1], layers="blocks.1.mlp.up", rho=0.5, split="dev")
    assert run(job, files[3])["seconds"]["evaluate"] == 1
    assert [one.seconds for one in seen] == [0.5]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rho", "0.5", "--layers", "blocks.9.*"], "matches none of"),
        (["--rho", "blocks.0.mlp.up=0.5", "--layers", "blocks.1.mlp.*"], "matches none of"),
        (["--rho", "0.5", "--split", "train"], "split"),
        (["--rho", "0.5", "--bias", "both"], "bias"),
        (["--rho", "half"], "SHARE"),
        (["--rho", "1.5"], "[0, 1]"),
        (["--rho", "**.up=0.5", "--rho", "blocks.1.**=0.5"], "matched by two patterns"),
        (["--rho", "0.5", "--dtype", "float32"], "stored in float64"),
        (["--rho", "0.5", "--fisher", "gold"], "sampled"),
        (["--rho", "0.5", "--rows", "some"], "reached"),
        (["--rho", "0.5", "--seed", "-1"], "seed"),
        (["--fisher", "gold"], "sampled"),  # before it is told what will be chosen between
        (["--rows", "cls"], "cls"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_a_report_refuses_before_the_work(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *own_files(tmp_path, True), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_report_refuses_what_it_could_not_judge_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head, a population of another tokenizer or too long, plots that cannot be drawn."""
    one = case(batch=4, length=9, tied=True)
    rc.save(rc.Model(one.config, one.parameters), tmp_path / "w.h5")
    full, bad = np.full(4, 9), one.token.copy()
    bad[2, 5] = one.config.vocabulary

    def refused(says: str, *flags: str, tokens: np.ndarray = one.token, prompt: int = 4) -> None:
        asked = {"poems": rc.Population(tokens, np.full(4, prompt), full, "text", "test")}
        rc.save_corpus(rc.Corpus(one.token, populations=asked), tmp_path / "c.h5")
        files = [str(tmp_path / name) for name in ("w.h5", "c.h5")]
        assert main(["report", *files, "--out", str(tmp_path / "out"), "--rho", "0.5", *flags]) == 2
        assert says in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*.h5*"))

    refused("tied", "--layers", "head")
    refused("outside the model's vocabulary", tokens=bad)
    refused("no token behind any prompt", prompt=9)
    with monkeypatch.context() as patch:
        patch.setattr("refcurv.curvature.room.available", lambda: 1000)
        assert main(["report", str(tmp_path / "w.h5"), str(tmp_path / "c.h5"), "--rho", "0.5",
                     "--out", str(tmp_path / "out")]) == 3  # fmt: skip
        assert "report: needs" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refused("plots need matplotlib")
    with monkeypatch.context() as patch:
        patch.setattr("refcurv.files.paths.free_bytes", lambda _: 1000)
        assert main(["report", str(tmp_path / "w.h5"), str(tmp_path / "c.h5"), "--rho", "0.5",
                     "--out", str(tmp_path / "out")]) == 3  # fmt: skip
    assert "edited.h5' will take" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for out, says in (("", "names no folder"), (str(tmp_path / "w.h5"), "is no folder"),
                      (str(tmp_path / "w.h5" / "x"), "Not a directory. Give another"),
                      ("a\0b", "is no path")):  # fmt: skip
        refused(says, "--out", out)
        assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    refused("is a folder. Give the name of a file")
    (tmp_path / "out" / "report.html").rmdir()
    (tmp_path / "out" / "edited.h5").hardlink_to(tmp_path / "w.h5")
    assert main(["report", str(tmp_path / "out/edited.h5"), str(tmp_path / "c.h5"), "--rho", "0.5",
                 "--out", str(tmp_path / "out")]) == 2  # fmt: skip
    assert "edited.h5 of --out" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_evaluated_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure later on leaves the table of every population that was done."""
    files = own_files(tmp_path, True)
    command = ["report", *files, "--split", "dev", "--rho", "0.6", "--layers", "blocks.1.mlp.up"]
    right, calls = suite._measured, iter(range(99))

    def failing(*arguments: object) -> object:
        if next(calls) == 3:  # the last population of the edited model
            raise MemoryError("no room")
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(suite, "_measured", failing)
        assert main(command) == 3
    known = json.loads((tmp_path / "out" / "results.json.unfinished").read_text())
    assert [row["name"] for row in known["evaluation"]["rows"]] == ["poems"]
    assert known["evaluation"]["rows"][0]["before"] and known["edit"]
    assert not (tmp_path / "out" / "results.json").exists()
    (tmp_path / "out" / "report.html").write_text("of earlier results")
    (tmp_path / "out" / "front.png").write_text("of earlier results")

    def drawing(results: object, out: Path) -> list[str]:
        """What is there when the results are: it could be the end."""
        left.extend(path.name for path in Path(out).iterdir())
        return folder_draw(results, out)  # type: ignore[arg-type]

    left, folder_draw = list[str](), folder.draw
    with monkeypatch.context() as patch:
        patch.setattr(folder, "draw", drawing)
        assert main(command) == 0
    assert sorted(left) == ["basis.h5", "edited.h5", "factors.h5", "results.json"]
    assert not (tmp_path / "out" / "results.json.unfinished").exists()
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert whole["evaluation"]["rows"][0] == known["evaluation"]["rows"][0]

    table = tmp_path / "t.json"
    calls = iter([0, 3])
    with monkeypatch.context() as patch:
        patch.setattr(suite, "_measured", failing)
        assert main(["evaluate", *files[:2], "--split", "dev", "--json", str(table)]) == 3
    assert "poems" in capsys.readouterr().out
    known = json.loads(Path(f"{table}.unfinished").read_text())
    assert [row["name"] for row in known["rows"]] == ["poems"] and not table.exists()
