"""What a person sees of a verdict: the text of the terminal, the figure, the page in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.pictures import CELLS, blocks, spectrum
from refcurv.report.plots.verdict import differences
from refcurv.report.verdict import findings_table, format_verdict, headline, marks
from refcurv.report.verdict_page import verdict_page, write_verdict_page


@pytest.fixture(scope="module")
def setting():
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    return model, rc.Corpus(tokens), rc.collect(model, rc.Corpus(tokens), "**", "empirical")


def theirs_of(factors, scale=1.0):
    return {name: (one.A, scale * one.G, one.n_A) for name, one in factors.items()}


def test_the_text_says_what_is_wrong_first(setting):
    _, _, factors = setting
    good = rc.validate(factors, factors).to_json()
    text = format_verdict(good)
    assert text.startswith(f"passed: {len(factors)} layers of refcurv")
    theirs = theirs_of(factors)
    A, G, n = theirs["blocks.0.mlp.up"]
    noise = np.random.default_rng(1).normal(size=G.shape)
    theirs["blocks.0.mlp.up"] = (A, G + np.abs(G).max() * (noise @ noise.T), n)
    bad = rc.validate(theirs, factors).to_json()
    text = format_verdict(bad)
    assert text.startswith(f"FAILED: 1 of {len(factors)} layers of memory")
    row = next(line for line in text.splitlines() if line.startswith("blocks.0.mlp.up"))
    assert row.endswith("fail") and "G/tr G" in text
    unknown = text.partition("No known fault explains all of it. The nearest of ")[2]
    assert 1 <= unknown.count("\n- ") <= 6 and "leaves" in unknown
    assert all(len(line) <= 80 for line in text.splitlines())


def test_layers_that_are_not_there_are_told_from_those_that_fail(setting):
    """They fail the verdict; what is there passes, and what to do is said."""
    _, _, factors = setting
    names = list(factors)
    theirs = {name: x for name, x in theirs_of(factors).items() if name in names[:2]}
    absent = len(names) - 2
    verdict = rc.validate(theirs, factors).to_json()
    text = " ".join(format_verdict(verdict).split())
    assert text.startswith(f"FAILED: {absent} of {len(names)} layers of memory: ")
    assert "; it does not hold these, and what it holds passes" in text.partition("Layers: ")[0]
    assert "If that is meant, judge what is there with --layers 'PATTERN'" in text
    table = text.partition("Layers: ")[2].partition("What did not pass")[0]
    assert "names" not in table and " infinite" not in text  # nothing is to be measured
    assert rc.validate(theirs, factors, layers=",".join(names[:2])).passed
    A, G, n = theirs[names[0]]
    for broken in ((A, 2 * G, n), (A, None, n)):
        line = headline(rc.validate({**theirs, names[0]: broken}, factors).to_json())
        assert line.startswith(f"FAILED: {absent + 1} of") and "passes" not in line


def test_a_cause_without_an_id_is_pointed_at(setting):
    """It has a place in the list of causes, and its sentence there says what it is."""
    _, _, factors = setting
    found = rc.validate(theirs_of(factors, 0.25), factors).to_json()
    found["causes"].append({**found["causes"][0], "fault": None})
    named = headline(found).rpartition(": ")[2]
    assert named == f"{found['causes'][0]['fault']}, see cause 2"


def test_what_cannot_be_told_apart_is_said_in_words(setting):
    """In text and page; an id that this registry lacks stays an id."""
    _, _, factors = setting
    found = rc.validate(theirs_of(factors, 0.25), factors).to_json()
    found["causes"][0]["alike"] = ["B38", "B999"]
    words = f"B38 ({FAULTS['B38'].name}), B999"
    assert f"Cannot be told from {words} in this dump" in " ".join(format_verdict(found).split())
    assert words in verdict_page(found)


def test_hostile_names_stay_text(setting):
    """A layer's name comes from a file of a stranger."""
    _, _, factors = setting
    name = "blocks.0.mlp.up"
    theirs = {"<script>\x1b[2J": theirs_of(factors)[name], **theirs_of(factors)}
    verdict = rc.validate(theirs, factors).to_json()
    assert "\x1b" not in format_verdict(verdict)
    assert "<script>" not in verdict_page(verdict)


def test_a_map_is_the_block_means():
    rng = np.random.default_rng(0)
    for n in (1, 5, CELLS, CELLS + 1, 3 * CELLS + 7):
        M = rng.normal(size=(n, n))
        made = blocks(M)
        assert made.shape == (min(n, CELLS),) * 2
        edges = np.unique(np.linspace(0, n, min(n, CELLS) + 1).astype(int))
        a, b = edges[-2], edges[-1]
        assert made[-1, 0] == pytest.approx(np.sqrt((M[a:b, : edges[1]] ** 2).mean()))
    X = rng.normal(size=(4, 9))
    found = spectrum(X @ X.T)
    assert sum(found) == pytest.approx(1) and found == sorted(found, reverse=True)


def test_the_figure_shows_every_picture(setting):
    _, _, factors = setting
    verdict = rc.validate(theirs_of(factors, 2), factors, pictures=2)
    assert len(verdict.pictures) == 4
    drawn = differences([one.to_json() for one in verdict.pictures])
    titles = [ax.get_title(loc="left") for ax in drawn.axes]
    for one in verdict.pictures:
        assert f"{one.layer}: {one.side}" in titles


class Reader(HTMLParser):
    """Every address that the page names, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(setting, tmp_path):
    _, _, factors = setting
    verdict = rc.validate(theirs_of(factors, 2), factors, pictures=1).to_json()
    reader = Reader()
    reader.feed(verdict_page(verdict))
    assert reader.addresses and all(a.startswith("data:") for a in reader.addresses)
    assert "FAILED" in reader.text and "blocks.0.mlp.up" in reader.text
    json.dumps(verdict, allow_nan=False)
    write_verdict_page(verdict, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == verdict_page(verdict)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium (Debian: apt-get install chromium)")
def test_the_page_opens_in_a_browser(setting, tmp_path):
    _, _, factors = setting
    rc.save_factors(factors, tmp_path / "f.h5")
    theirs = {
        f"{layer}/{part}": x
        for layer, parts in theirs_of(factors, 2).items()
        for part, x in zip("AGn", parts, strict=True)
    }
    np.savez(tmp_path / "theirs.npz", **theirs)
    page = tmp_path / "page.html"
    arguments = ["validate", str(tmp_path / "theirs.npz"), "--reference", str(tmp_path / "f.h5")]
    assert main([*arguments, "--html", str(page)]) == 1
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    seen = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "FAILED" in seen and "<figure>" in seen and "What did not pass" in seen


def test_what_is_undecided_is_not_called_failed(setting):
    """Other draws of the labels, and nothing that says how much they change: who could know?"""
    model, corpus, factors = setting
    drawn = rc.collect(model, corpus, ",".join(factors), seed=9)
    verdict = rc.validate(drawn, rc.collect(model, corpus, ",".join(factors)))
    assert not verdict.passed and {one.verdict for one in verdict.failed} == {"undecided"}
    assert headline(verdict.to_json()).startswith(f"UNDECIDED: {len(factors)} of {len(factors)}")
    theirs = {name: (one.A, one.G, one.n_A) for name, one in list(drawn.items())[1:]}
    text = format_verdict(rc.validate(theirs, drawn).to_json())
    assert text.startswith(
        "FAILED: 1 of"
    ) and "judge what is there with --layers 'PATTERN'" in " ".join(text.split())


@pytest.fixture(scope="module")
def verdicts(setting):
    """Verdicts whose rows have causes, notes, or both, and one whose cause has no id."""
    model, corpus, factors = setting
    more = {
        x: (A, G + 0.01 * np.eye(len(G)), n + 12) for x, (A, G, n) in theirs_of(factors).items()
    }
    wild = theirs_of(factors) | {"blocks.0.mlp.up": (*theirs_of(factors)["blocks.0.mlp.up"][:2], 7)}
    A, G, n = wild["blocks.1.mlp.up"]
    wild["blocks.1.mlp.up"] = (A, np.full_like(G, np.nan), n)
    some = "blocks.*.mlp.up"
    one, two = (rc.collect(model, corpus, some, seed=seed) for seed in (1, 9))
    given = {"model": model, "corpus": corpus}
    found = [
        rc.validate(more, factors, layers=some),
        rc.validate(wild, factors, layers=some),
        rc.validate(theirs_of(factors), one, **given, layers=some),
        rc.validate(two, one),
    ]
    return [one.to_json() for one in found]


def test_a_cause_is_said_once(verdicts):
    """Rows name their cause by its mark, and what else was seen by the number of its note."""
    marked = noted = 0
    for verdict in verdicts:
        text, page = format_verdict(verdict), Reader()
        page.feed(verdict_page(verdict))
        table, notes = findings_table(verdict)
        for said in [*(one["sentence"] for one in verdict["causes"]), *notes]:
            plain = " ".join(said.replace("`", "").split())
            assert " ".join(text.replace("`", "").split()).count(plain) == 1
            assert " ".join(page.text.split()).count(plain) == 1
        for row in table.rows:
            one = dict(zip(table.headers, row, strict=True))
            assert one.get("cause") or one["note"]
            assert one.get("cause", "") in ["", *marks(verdict)]
            assert one.get("note", "") in ["", *(str(k + 1) for k in range(len(notes)))]
            marked, noted = marked + bool(one.get("cause")), noted + bool(one.get("note"))
        assert "`" not in page.text
        assert all(len(line) <= 80 for line in text.splitlines())
    assert marked and noted and any("cause 1" in marks(verdict) for verdict in verdicts)


def test_a_row_that_failed_has_a_budget_below_its_error(verdicts):
    """Not that of a dtype, or of drawing, by which it would have passed without its cause."""
    for one in (f for verdict in verdicts for f in verdict["findings"] if f["verdict"] == "fail"):
        assert one["error"] is None or not one["error"] <= one["budget"], one


def test_collecting_a_reference_says_how_far_it_is(setting):
    model, corpus, factors = setting
    said = []

    class Watch:
        def __call__(self, done, total):
            pass

        def doing(self, what):
            said.append(what)

    rc.validate(
        factors, model=model, corpus=corpus, declared={"fisher": "empirical"}, progress=Watch()
    )
    assert said[0].startswith("collect the reference: ") and "collect the reference: 100%" in said
