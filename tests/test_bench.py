"""validation/bench on tiny models: all candidates agree, and faults between them are seen."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="extra `peers`")
pytest.importorskip("transformers", reason="extra `peers`")

from validation.bench import page, streamed, timing
from validation.bench.candidates import CANDIDATES, OFFICIAL, OURS, Candidate, Subject, Sums
from validation.bench.proxies import TINY, make

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parents[1]
SIZE = replace(TINY, layers=2, width=16, heads=2, mlp_width=24, vocabulary=40, positions=9, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    make(made, SIZE)
    return made


def test_every_candidate_finds_the_same_and_the_table_shows_all(folder: Path) -> None:
    """Two batches, so that m is a batch's and not the corpus's."""
    run = timing.take_turns(folder, SIZE, [0, 1], 1, 1, list(CANDIDATES))
    for name, one in run["checks"].items():
        assert one["agree"], (name, one)
        assert max(distance for _, distance in one["worst"].values()) < 2e-5  # observed 1.3e-6
        assert one["rows"] == SIZE.rows
    absent = [name for name, entry in CANDIDATES.items() if not entry.there]
    assert run["missing"] == absent
    section = {"others": 0.01, "runs": {"all 1": run}}
    lines = {line.split("|")[1].strip(): line for line in page.times(section).splitlines()[2:-2]}
    assert set(lines) == set(CANDIDATES)
    for name, line in lines.items():
        shown = "not installed" if name in absent else r"\d\.\d\d s(, \d+\.\d\d)? \|$"
        assert re.search(shown, line), line


def test_what_disagrees_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CANDIDATES[OFFICIAL]

    def of_mean_loss(subject: Subject) -> Candidate:
        right = entry.make(subject)

        def sums(found: object) -> Sums:
            return {name: (A, G / 4, n) for name, (A, G, n) in right.sums(found).items()}

        return replace(right, sums=sums)

    monkeypatch.setitem(CANDIDATES, OFFICIAL, replace(entry, make=of_mean_loss))
    found = timing.take_turns(folder, SIZE, [1], 1, 1, [OURS, OFFICIAL])
    assert not found["checks"][OFFICIAL]["agree"]
    assert "times" not in found


@pytest.mark.slow
def test_a_streamed_run_is_measured_and_leaves_no_file(tmp_path: Path) -> None:
    found = streamed.streamed(tmp_path, streamed.SMALL)
    run = found["TINY"]
    assert list(run["times"]) == ["collect", "decompose", "edit"]
    assert 50 < run["peak"] == max(one["peak"] for (one,) in run["times"].values()) < 2000
    shown = page.streamed({"runs": found})
    assert all(word in shown for word in (*run["times"], "TINY, blocks.2", "1GB", "128 tokens"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_runs_and_keeps_nothing() -> None:
    before = page.README.read_text(encoding="utf-8"), page.RESULTS.exists()
    sections = "products,drawing,selection,decompose,profile"
    command = [sys.executable, "-m", "validation.bench", "--small", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--threads", "1", "--only", sections],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in sections.split(","):
        assert f"## {page.SECTIONS[name][0]}" in done.stdout
    assert done.stdout.count("Both found the same results.") == 3
    assert (page.README.read_text(encoding="utf-8"), page.RESULTS.exists()) == before
