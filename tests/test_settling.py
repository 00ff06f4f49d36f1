"""The share of the pairs that rho keeps, and with how many rows it settles."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.algebra.staircase import cut
from refcurv.cli import main
from refcurv.curvature import settling as module
from refcurv.curvature.bases_file import kept_by
from refcurv.curvature.halves import half_spectrum
from refcurv.curvature.moments import RunningSum
from refcurv.curvature.settling import (
    SETTLED,
    SHARES,
    Sample,
    rows_to_settle,
    settling,
    warning_of,
)
from refcurv.law.checks import EmptyError, RangeError

LAYERS = "blocks.1.mlp.*,head"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> rc.Model:
    """A model, while a shard is one sequence of 8 tokens."""
    monkeypatch.setattr("refcurv.law.conventions.SHARD_TOKENS", 8)
    made = config(biases=("up",))
    return rc.Model(made, random_parameters(made, 1))


def corpus(sequences: int) -> rc.Corpus:
    return rc.Corpus(np.random.default_rng(0).integers(0, 7, (sequences, 8)))


# ------------------------------------------------------------------ the halves


@pytest.mark.parametrize("fisher", ["empirical", "expected"])  # of one pass, and of several
def test_halves_are_two_collections(fisher: str, small: rc.Model) -> None:
    """Of every other shard: their eigenvalues, weighed by rows, by NumPy."""
    whole = corpus(5)
    found = rc.collect(small, whole, LAYERS, fisher, halves=True)
    parts = [rc.Corpus(whole.tokens[first::2]) for first in (0, 1)]
    halves = [rc.collect(small, part, LAYERS, fisher) for part in parts]
    for name, one in found.items():
        first, other = (half[name] for half in halves)
        for values, side in ((one.half_mu, "A"), (one.half_lam, "G")):
            n = [getattr(half, f"n_{side}") for half in (first, other)]
            assert n[0] > n[1] > 0
            spectra = [np.linalg.eigvalsh(getattr(half, side))[::-1] for half in (first, other)]
            want = (n[0] * spectra[0] + n[1] * spectra[1]) / sum(n)
            assert np.abs(values - want).max() <= 1e-13 * want[0]
            # Ky Fan: what comes first sums up to more than in the whole
            all_rows = np.linalg.eigvalsh(getattr(one, side))[::-1]
            assert (np.cumsum(values) >= np.cumsum(all_rows) - 1e-13 * want.sum()).all()
    plain = rc.collect(small, whole, LAYERS, fisher)
    for name, one in found.items():
        assert np.array_equal(plain[name].sum_G, one.sum_G)
        assert plain[name].half_mu is None and plain[name].half_lam is None


def test_one_shard_has_no_halves(small: rc.Model) -> None:
    with pytest.raises(EmptyError, match="a single shard, of at most 512 positions"):
        rc.collect(small, corpus(1), LAYERS, halves=True)


def two_sums(rows: np.ndarray, power: int = 0) -> tuple[RunningSum, RunningSum]:
    """Of all rows and of the first three, each product times 2^power."""
    total, half = (RunningSum(rows.shape[1], rows.shape[1]) for _ in range(2))
    for x, sums in ((rows[:3], (total, half)), (rows[3:], (total,))):
        for one in sums:
            one.add(np.ldexp(x.T @ x, power), len(x))
    for one in (total, half):
        one.close()
    return total, half


def test_few_rows_of_any_size() -> None:
    """Of three and of two rows: as many eigenvalues, those of Gram matrices, and else no less."""
    rows = np.random.default_rng(0).normal(size=(5, 8))
    want = [np.linalg.svd(part, compute_uv=False) ** 2 for part in (rows[:3], rows[3:])]
    want = np.pad(want[0] + np.append(want[1], 0), (0, 5)) / 5
    for power in (0, 900, -900):
        values = half_spectrum("x", *two_sums(rows, power))
        assert (values >= 0).all() and not values.flags.writeable
        assert np.abs(np.ldexp(values, -power) - want).max() <= 1e-14 * want[0]


def test_an_empty_half_is_refused() -> None:
    """All rows in one half, or none: their spectra would be those of the whole."""
    total, half = two_sums(np.ones((5, 2)))
    for other in (total, RunningSum(2, 2)):
        with pytest.raises(EmptyError, match="x has no row in one half of the corpus"):
            half_spectrum("x", total, other)
    assert len(half_spectrum("x", total, half)) == 2


def test_a_basis_keeps_what_it_was_estimated_from(small: rc.Model, tmp_path: Path) -> None:
    """Through both files; a joint basis has no halves where there is a bias."""
    factors = rc.collect(small, corpus(6), LAYERS, halves=True)
    rc.save_factors(factors, tmp_path / "f.h5")
    for bias in ("separate", "joint"):
        made = rc.decompose(factors, bias)
        rc.save_bases(rc.decompose(rc.load_factors(tmp_path / "f.h5"), bias), tmp_path / "b.h5")
        for basis in (made, rc.load_bases(tmp_path / "b.h5")):
            assert kept_by(basis) == kept_by(made)
            for name, sample in basis.samples.items():
                assert sample.rows == factors[name].n_A == 42
                if bias == "joint" and name.endswith(".up"):
                    assert sample.halves is None
                    continue
                assert np.array_equal(sample.halves[0], factors[name].half_lam)
                assert np.array_equal(sample.halves[1], factors[name].half_mu)


@pytest.mark.parametrize("part", ["half_mu", "half_lam"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: -x[::-1], "are negative in part"),
        (lambda x: x[::-1], "do not descend"),
        (lambda x: 0 * x, "have another sum"),
        (lambda x: 2 * x, "have another sum"),
    ],
)
def test_halves_of_something_else_are_refused(
    part: str, change: Any, said: str, small: rc.Model, tmp_path: Path, capsys: Any
) -> None:
    """In files of factors and of bases, before anything is written."""
    f, b = tmp_path / "f.h5", tmp_path / "b.h5"
    factors = rc.collect(small, corpus(6), "head", halves=True)
    one = replace(factors["head"], **{part: change(getattr(factors["head"], part))})
    bad = replace(factors, layers={"head": one})
    rc.save_factors(bad, f)
    assert main(["decompose", str(f), "-o", str(b)]) == 2 and not b.exists()
    assert f"{part} of 'head' {said}" in capsys.readouterr().err
    rc.save_bases(rc.decompose(bad), b)
    assert main(["inspect", str(b)]) == 2
    assert f"{part} of 'head' {said}" in capsys.readouterr().err


def test_a_number_of_rows_that_no_corpus_has_is_refused(small: rc.Model, tmp_path: Path) -> None:
    made = rc.decompose(rc.collect(small, corpus(6), "head"))
    for rows in (0, -1):
        rc.save_bases(replace(made, samples={"head": Sample(rows)}), tmp_path / "b.h5")
        with pytest.raises(RangeError, match=f"mu of 'head': rows must lie in .*; got {rows}"):
            rc.load_bases(tmp_path / "b.h5")


# ------------------------------------------------------------------ the kept share


def test_the_kept_pairs_are_those_of_an_edit(small: rc.Model) -> None:
    basis = rc.decompose(rc.collect(small, corpus(6), LAYERS))
    for place, rho in enumerate(SHARES):
        _, record = rc.edit(small, basis, rho)
        edited = {one.layer: one for one in record.layers}
        for found in kept_by(basis):
            assert found.kept[place] == edited[found.layer].kept
            assert found.pairs == edited[found.layer].pairs


def test_a_layer_without_curvature_keeps_nothing_to_speak_of() -> None:
    found = settling("x", np.zeros(3), np.ones(2), Sample(5))
    assert found.kept == () and found.settles is None and found.to_json()["kept"] == {}
    assert settling("x", np.full(3, 1e300), np.full(2, 1e300)).kept == ()  # no float64 for it


# ------------------------------------------------------------------ where it settles


@pytest.mark.parametrize(("limit", "c"), [(0.5, 100.0), (0.04, 700.0), (0.9, 3.0)])
def test_the_form_is_solved_exactly(limit: float, c: float) -> None:
    """Two points of 1/√k = 1/√k(∞) + c/m give the m where k is 0.95 of k(∞)."""

    def kept(m: float) -> float:
        return (limit**-0.5 + c / m) ** -2

    rows = 2000
    settles = rows_to_settle(kept(rows), kept(rows / 2), rows)
    assert kept(settles) == pytest.approx((1 - SETTLED) * limit, rel=1e-9)
    assert rows_to_settle(limit, limit, rows) == 0
    assert rows_to_settle(limit, limit * 1.01, rows) == 0  # by a tie
    assert rows_to_settle(limit, limit * 0.49, rows) == math.inf
    assert rows_to_settle(limit, limit / 2, rows) < math.inf


def test_no_limit_is_above_all_pairs() -> None:
    """At 0.98 and 0.9 the form would end at 1.07: it is taken as 1, which asks for more rows."""
    c = 2000 * (0.9**-0.5 - 0.98**-0.5)
    settles = rows_to_settle(0.98, 0.9, 2000)
    assert 1 + c / settles == pytest.approx((1 - SETTLED) ** -0.5, rel=1e-12)


def falling(power: float, count: int) -> np.ndarray:
    return np.arange(1, count + 1) ** -power


def drawn(lam: np.ndarray, mu: np.ndarray, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The spectra (lam, mu) of normal rows with these variances."""
    out = []
    for values in (lam, mu):
        x = rng.standard_normal((rows, len(values))) * np.sqrt(values)
        out.append(np.maximum(np.linalg.eigvalsh(x.T @ x / rows)[::-1], 0))
    return out


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("rows", [400, 1200])
def test_it_settles_where_it_is_said_to(power: float, rows: int) -> None:
    """The true spectrum is known: that many rows, drawn anew, keep nearly what it keeps.

    Fewer by far do not: at a quarter of them more than the allowed twentieth is missing.
    """
    rng = np.random.default_rng(0)
    lam, mu = falling(power, 96), falling(power, 64)
    halves = [drawn(lam, mu, rows // 2, rng) for _ in range(2)]
    half = tuple((a + b) / 2 for a, b in zip(*halves, strict=True))
    found = settling("x", *drawn(lam, mu, rows, rng), Sample(rows, half))
    assert found.settles is not None and found.settles < math.inf
    truth = settling("x", lam, mu).kept
    many = settling("x", *drawn(lam, mu, round(found.settles), rng)).kept
    few = settling("x", *drawn(lam, mu, round(found.settles / 4), rng)).kept
    counted = [n >= module.COUNTED for n in found.kept]
    ratio = [
        min(a / t for a, t, c in zip(x, truth, counted, strict=True) if c) for x in (many, few)
    ]
    assert ratio[0] > 1 - 2 * SETTLED
    assert ratio[1] < 1 - SETTLED


def test_too_few_rows_are_said_to_be_far_too_few() -> None:
    """Fewer than directions: halves keep about a quarter, and nothing can be told."""
    rng = np.random.default_rng(0)
    lam, mu = falling(0.5, 96), falling(0.5, 64)
    halves = [drawn(lam, mu, 24, rng) for _ in range(2)]
    half = tuple((a + b) / 2 for a, b in zip(*halves, strict=True))
    found = settling("up", *drawn(lam, mu, 48, rng), Sample(48, half))
    assert found.settles == math.inf and found.few
    assert found.to_json()["settles"] == "far more"
    says = warning_of([found, settling("x", lam, mu, Sample(959))])
    assert says.startswith("48 rows are few for 'up' and of 1 layer more: below about 10 rows")
    assert not warning_of([settling("x", lam, mu, Sample(960))])
    assert not warning_of([settling("x", lam, mu)])


# ------------------------------------------------------------------ in words


def test_what_decompose_and_inspect_say(
    small: rc.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(module, "COUNTED", 1)
    monkeypatch.chdir(tmp_path)
    rc.save(small, "w.h5")
    rc.save_corpus(corpus(6), "c.h5")
    said = {}
    for option in ([], ["--halves"]):
        what = ["--layers", "blocks.1.mlp.*", *option]
        assert main(["collect", "w.h5", "c.h5", "-o", "f.h5", *what]) == 0
        capsys.readouterr()
        assert main(["decompose", "f.h5", "-o", "b.h5"]) == 0
        said[bool(option)], warned = capsys.readouterr()
        assert "warning: 42 rows are few for 'blocks.1.mlp.gate' and of 2 layers more" in warned
    assert all("few rows: of 3 layers the share may be an artefact" in x for x in said.values())
    assert "settles at" in said[True] and "settles at" not in said[False]
    assert main(["inspect", "b.h5", "--json", "facts.json"]) == 0
    table = said[True].partition("\n\n")[2].strip()
    assert table in capsys.readouterr().out
    facts = json.loads(Path("facts.json").read_text())["kept"]
    basis = rc.load_bases("b.h5")["blocks.1.mlp.gate"]
    want = cut(basis.lam, basis.mu, 0.9).kept / (len(basis.lam) * len(basis.mu))
    assert facts[0]["kept"]["0.9"] == want and f"{100 * want:.1f} %" in table.splitlines()[2]
    assert max(map(len, table.splitlines())) <= 80
