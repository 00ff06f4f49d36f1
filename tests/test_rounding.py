"""Noise is told from curvature: what `collect` says of rounding, and what `edit` refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_images
from hypothesis import given, settings
from strategies import Case, case, cases, opened_for_lies

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import accumulate
from refcurv.curvature import factors as collection
from refcurv.curvature.resumed_bases import decompose_to
from refcurv.law import conventions
from refcurv.law.checks import EmptyError
from refcurv.law.conventions import MOST_ROUNDING, NO_LABEL, Fisher
from refcurv.model import transformer
from refcurv.model.config import Norm, NormPlace, QKNorm
from refcurv.model.gradient import head_backward
from refcurv.model.transformer import Tap
from refcurv.passes import rounding
from refcurv.passes.shards import shards
from refcurv.passes.sweep import Sweep, sweep

FLOATS = [np.float64, np.float32]


def collected(one: Case, dtype: type, fisher: str = "empirical", layers: str = "**") -> rc.Factors:
    name = np.dtype(dtype).name
    corpus = rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)
    return rc.collect(rc.Model(one.config, one.astype(dtype), name), corpus, layers, fisher)


def refused(factor: rc.Factor) -> bool:
    assert factor.rounding_G is not None
    return 0 < factor.sum_G.trace() < factor.rounding_G / MOST_ROUNDING


def gradients(one: Case, dtype: type) -> dict[str, np.ndarray]:
    """g of every layer at the positions that reach a label, by the definitions."""
    parameters = {name: x.astype(dtype) for name, x in one.parameters.items()}
    label, out = one.label, {}

    def take(step: object) -> None:
        if isinstance(step, Tap):
            out[step.name] = step.g

    final, trace = transformer.forward(one.config, parameters, one.token, one.layout)
    head = head_backward(one.config, parameters, final, label, label >= 0)
    loss = transformer.drain(head, take)
    for step in transformer.blocks_backward(one.config, parameters, loss.d_final_BTD, trace):
        take(step)
    return out


# ------------------------------------------------------------------ models of noise


def same_tokens(seed: int, **changes: object) -> Case:
    """One token again and again, no learned positions: all values are the same vector."""
    one = case(seed, **changes)
    return replace(one, token=np.full_like(one.token, 3))


def narrow_norm(seed: int, **changes: object) -> Case:
    """A norm whose output is a sign: RMSNorm of one number, LayerNorm of two."""
    return case(seed, norm_eps=1e-30, **changes)


NOISE = {
    "same tokens": lambda seed: same_tokens(seed, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE),
    "same tokens, deep": lambda seed: same_tokens(seed, layers=5, length=20, width=16),
    "RMSNorm of 1": lambda seed: narrow_norm(seed, width=1),
    "LayerNorm of 2": lambda seed: narrow_norm(seed, width=2, norm=Norm.LAYER),
    "heads of 2": lambda seed: narrow_norm(seed, norm=Norm.LAYER, qk_norm=QKNorm.HEAD),
}


def verdicts(one: Case, dtype: type) -> set[str]:
    """What was refused: noise, which longdouble does not find again, and nothing that it does."""
    one = replace(one, parameters=one.astype(dtype))
    exact, found = gradients(one, np.longdouble), set()
    for name, factor in collected(one, dtype).items():
        trace = factor.sum_G.trace()  # of 0 nothing can be cut anyway
        off = abs(trace - np.square(exact[name]).sum())
        if off < 0.01 * trace:
            assert not refused(factor), name
            found.add("sound")
        elif off > 0.5 * trace > 0:
            assert refused(factor), name
            found.add("noise")
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", NOISE)
def test_the_estimate_is_the_error(which: str, dtype: type) -> None:
    found = set.union(*(verdicts(NOISE[which](seed), dtype) for seed in range(3)))
    assert found == {"sound", "noise"}


def test_the_estimate_is_a_few_times_the_error() -> None:
    """In float32, of many sound layers: about twice; the input errs too (observed 2.3)."""
    ratios = []
    for seed in range(12):
        one = case(seed, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
        one = replace(one, parameters=one.astype(np.float32))
        exact, short = gradients(one, np.longdouble), gradients(one, np.float32)
        for name, factor in collected(one, np.float32).items():
            error = float(np.square(short[name] - exact[name]).sum())
            if error:
                ratios.append(factor.rounding_G / error)
    assert len(ratios) > 100
    assert 1 < np.exp(np.log(ratios).mean()) < 4


def test_what_was_seen_of_some_rows_stands_for_all() -> None:
    """Σ |e|² = 7 over 5 rows: of all n_G it is 7/5 n_G, and of the trace of G = S/n_G 7/5."""
    name, seen = "blocks.1.mlp.up", lambda *_: {"blocks.1.mlp.up": (7.0, 5)}
    with mock.patch("refcurv.curvature.factors.rounding", seen):
        found = collected(case(0), np.float64, layers=name)
    assert found[name].rounding_G == 7 * found[name].n_G / 5
    assert rc.decompose(found)[name].rounding == pytest.approx(7 / 5, rel=1e-15)


@given(one=cases())
def test_sound_layers_are_not_refused_and_noise_is(one: Case) -> None:
    """Random models hold noise too: of a text of one token, for example."""
    if (one.label >= 0).any():
        verdicts(one, np.float64)


@pytest.mark.slow(seconds=30)
@settings(max_examples=1000)
@given(one=cases(layers=3))
def test_a_thousand_models(one: Case) -> None:
    if (one.label >= 0).any():
        verdicts(one, np.float64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saturated_heads_are_no_noise(dtype: type) -> None:
    """Their curvature is far below the square of eps, and right: it is not refused."""
    least = 1.0
    for seed in range(5):
        one = case(seed, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
        for name in ("blocks.0.attn.q.weight", "blocks.1.attn.k.weight"):
            one.parameters[name][:] *= 1000 if dtype == np.float64 else 300
        factors = collected(one, dtype)
        assert not any(map(refused, factors.values()))
        traces = [factor.sum_G.trace() for factor in factors.values()]
        least = min(least, *(x / max(traces) for x in traces if x))
    assert least < np.finfo(dtype).eps ** 2 / 100


def test_squares_that_underflow_are_rounding() -> None:
    """In float32 what is below 1e-22 has no square, and below 1e-19 one of few digits."""
    one = case(0, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
    seen = set()
    for small in (1e-12, 1e-20, 1e-21, 1e-22, 1e-30):
        one.parameters["blocks.1.mlp.down.weight"][:] = (
            small * case(0).parameters["blocks.1.mlp.down.weight"]
        )
        few, many = (collected(one, x, layers="blocks.1.mlp.up") for x in (np.float32, np.float64))
        trace, exact = (x["blocks.1.mlp.up"].sum_G.trace() for x in (few, many))
        if refused(few["blocks.1.mlp.up"]):
            seen.add("refused")
        elif trace:
            seen.add("sound")
            assert abs(trace - exact) < 0.1 * exact
        assert not refused(many["blocks.1.mlp.up"])
    assert seen == {"refused", "sound"}


@pytest.mark.parametrize("fisher", ["sampled", "signed", "expected"])
def test_every_fisher_and_images_too(fisher: str) -> None:
    sound, noise = case(0, length=4), same_tokens(0, length=8, layers=3, width=16)
    assert not any(map(refused, collected(sound, np.float64, fisher).values()))
    noisy = collected(noise, np.float64, fisher)  # equal bits can make exact zeros too
    found = {name for name, x in noisy.items() if refused(x) or not x.sum_G.any()}
    assert found == {f"blocks.{i}.attn.{part}" for i in range(3) for part in "qk"}
    assert any(map(refused, noisy.values()))
    one, images = test_images.vit(0)
    factors = rc.collect(
        test_images.model_of(one), test_images.corpus_of(one, images), "**", fisher
    )
    shares = [factor.rounding_G / factor.sum_G.trace() for factor in factors.values()]
    assert 1e-36 < min(shares) < max(shares) < 1e-20
    short = {name: x.astype(np.float32) for name, x in test_images.model_of(one).parameters.items()}
    model = rc.Model(one.config, short, "float32")
    factors = rc.collect(model, test_images.corpus_of(one, images), "**", fisher)
    shares = [factor.rounding_G / factor.sum_G.trace() for factor in factors.values()]
    assert 1e-18 < min(shares) < max(shares) < 1e-6


def test_labelled_sequences_are_looked_at(monkeypatch) -> None:
    """As many as fit, one at least; the first of a corpus may have no label."""
    one = case(0, batch=4, length=5)
    label = one.label.copy()
    label[:2] = NO_LABEL
    estimates = []
    for positions in (4, 7, 8):  # of width 4: the last column reaches no label
        monkeypatch.setattr(rounding, "POSITIONS", positions)
        factors = collected(replace(one, label=label), np.float64, layers="blocks.1.mlp.up")
        estimates.append(factors["blocks.1.mlp.up"].rounding_G)
    assert 1e-40 < estimates[0] == estimates[1] != estimates[2] > 1e-40


def test_a_long_sequence_is_looked_at_as_far_as_its_first_labels(monkeypatch) -> None:
    """What comes after is as if it were not there, if attention is causal; else all is seen."""
    monkeypatch.setattr(rounding, "POSITIONS", 3)
    one = case(0, batch=2, length=9)
    label = np.where(np.isin(np.arange(9), (2, 4, 5, 7)), one.token, NO_LABEL)
    seen, right = [], collection.rounding

    def watched(config, parameters, unit, job):
        seen.append(right(config, parameters, unit, job))
        few = rounding.some_of(config, unit)
        assert few.source.shape == ((1, 6) if config.causal else (2, 9))
        return seen[-1]

    monkeypatch.setattr(collection, "rounding", watched)
    collected(replace(one, label=label), np.float64)
    only = case(0, batch=1, length=6)
    only = replace(only, config=one.config, parameters=one.parameters, token=one.token[:1, :6])
    collected(replace(only, label=label[:1, :6]), np.float64)
    assert seen[0] == seen[1]
    assert min(count for _, count in seen[0].values()) >= 3
    monkeypatch.setattr(rounding, "POSITIONS", 18)
    whole = case(0, batch=2, length=9, causal=False)
    collected(replace(whole, label=label), np.float64)


def looks(one: Case, fisher: str = "empirical") -> tuple[dict[str, np.ndarray], list[dict]]:
    """g of every layer of some sequences, and of each run over them beside the nudged ones."""
    corpus = rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)
    unit = shards(corpus, one.config)[0]
    names = frozenset(one.config.linear_layers() | one.config.tables())
    job = Sweep(names, Fisher(fisher))

    def rows(*run: object) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        sweep(*run, lambda _, tap: parts.setdefault(tap.name, []).append(tap.g.copy()))
        return {name: np.concatenate(some) for name, some in parts.items()}

    dtype = one.parameters["embed.weight"].dtype
    runs = rounding.other_runs(one.config, unit, job, dtype)
    few = rounding.some_of(one.config, unit)
    alone = rows(one.config, one.parameters, few, job)
    return alone, [rows(c, view(one.parameters), some, j) for c, view, some, j in runs]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "signed"])
@pytest.mark.parametrize("positions", [64, 2])
def test_copies_of_sequences_lie_behind_one_another(
    monkeypatch, fisher: str, tied: bool, positions: int
) -> None:
    """Their gradients are all but those of a pass of their own, and not the same bits.

    Where they cannot be cut and are long, each run has two copies. A head that is tied stays.
    """
    monkeypatch.setattr(rounding, "POSITIONS", positions)
    one = case(3, batch=1 if positions == 2 else 3, length=9, causal=positions == 64, tied=tied)
    alone, runs = looks(one, fisher)
    assert len(runs) == (1 if positions == 64 else 3)
    for run in runs:
        for name, g_NO in alone.items():
            copies = run[name].reshape(-1, *g_NO.shape)
            assert len(copies) == (3 if positions == 64 else 2), name
            size = np.abs(g_NO).max()
            np.testing.assert_allclose(copies, copies[:1] + 0 * copies, atol=1e-11 * size)
            np.testing.assert_allclose(copies[0], g_NO, atol=1e-13 * size, rtol=0)
            assert size == 0 or any((copy != copies[0]).any() for copy in copies[1:]), name


@pytest.mark.parametrize("width", [3, 5])
def test_errors_are_of_the_side_that_they_are_told_of(width: int) -> None:
    """Σ |e|², Σ w and Σ w² of g, and the last two of a; the least of copies alike."""
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(3, 7, 4)), 10 * rng.normal(size=(3, 7, width))

    def noise(a: np.ndarray, g: np.ndarray, name: str = "blocks.0.mlp.up") -> rounding.Noise:
        a, g = a.reshape(-1, 4), g.reshape(-1, width)
        parts = [Tap(name, a[at], g[at]) for at in (slice(9), slice(9, None))]
        return rounding._noise(rounding._rows(parts, 3))[0]

    want = []
    for x in (g, a):
        error = x.var(axis=0, ddof=1).sum(axis=-1)
        w = error * (x[0] ** 2).sum(axis=-1)
        want.append((error.sum(), w.sum(), (w**2).sum()))
    found = noise(a, g)
    assert found == pytest.approx([*want[0], *want[1][1:]], rel=1e-12)
    assert noise(a, g, "embed")[3:] == (0, 0)
    for dtype in FLOATS:
        alike = noise(np.repeat(a[:1], 3, 0), np.repeat(g[:1], 3, 0).astype(dtype))
        assert alike == (7 * width * float(np.finfo(dtype).smallest_subnormal), 0, 0, 0, 0)


def test_each_copy_of_the_input_is_rounded_by_itself() -> None:
    """Larger by so many eps, and each number up or down by u, not alike in two copies."""
    for dtype in FLOATS:
        x, eps = np.linspace(1, 1.9, 200).astype(dtype), np.finfo(dtype).eps
        moved = [(rounding._nudged(x, n) - x).astype(float) / eps / x for n in rounding.NUDGES]
        for by, nudge in zip(moved, rounding.NUDGES, strict=True):
            assert abs(by.mean() - nudge) < 0.3 and abs(by - nudge).max() <= 1.5
        assert np.array_equal(rounding._nudged(x, 0), x)
        up = [by > np.median(by) for by in moved]
        assert 0.2 < (up[0] == up[1]).mean() < 0.8


def test_the_error_of_a_row_is_the_sample_variance_of_its_copies() -> None:
    """Two directions tell it by four random numbers, EACH or more; of copies alike it is 0."""
    copies = np.random.default_rng(0).normal(size=(3, 4000, 2))
    copies[:, 7] = 5.0
    error_N, square_N = rounding._errors(copies.reshape(-1, 2), 3)
    np.testing.assert_allclose(error_N, copies.var(axis=0, ddof=1).sum(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(square_N, (copies[0] ** 2).sum(axis=-1), rtol=1e-14)
    assert error_N[7] == 0
    assert [len(x) for x in rounding._errors(np.empty((0, 2)), 3)] == [0, 0]
    # of χ² with f degrees of freedom, over f: the variance is 2/f; of two numbers a row f = 4
    assert error_N.mean() / 2 == pytest.approx(1, abs=0.05)
    assert (error_N / 2).var() == pytest.approx(2 / 4, rel=0.1) and rounding.EACH <= 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_run_finds_what_three_find(monkeypatch, dtype: type) -> None:
    """All copies beside one another, or two at a time: the same estimate."""
    one = case(1, batch=2, length=12, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
    together = collected(one, dtype)
    monkeypatch.setattr(rounding, "copies_of", lambda *_: list(combinations((0, 4, -5), 2)))
    each = collected(one, dtype)
    for name, factor in together.items():
        for what in ("rounding_G", "noise_A", "noise_G", "free_A", "free_G"):
            first, other = getattr(factor, what), getattr(each[name], what)
            assert (first is None) == (other is None), (name, what)
            assert first is None or 0.5 < first / other < 2, (name, what)


def test_which_shards_are_looked_at(monkeypatch) -> None:
    """The first that has a label, of blocks 0, 1, 3, 7, ...: fewer and fewer of a long corpus."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 4)
    for module in (rounding, accumulate):
        monkeypatch.setattr(module, "BLOCK_SHARDS", 2)
    one, seen, right = case(0, batch=18, length=4), [], collection.rounding

    def watched(*args):
        seen.append(args[2].number)
        return right(*args)

    monkeypatch.setattr(collection, "rounding", watched)
    label = one.label.copy()
    label[[2, 6, 7]] = NO_LABEL
    collected(replace(one, label=label), np.float64, layers="blocks.1.mlp.up")
    assert sorted(seen) == [0, 3, 14]


# ------------------------------------------------------------------ what comes of it


def test_edit_refuses_what_is_rounding(tmp_path: Path) -> None:
    """By name, through both files; files that do not say, and sides without G, are edited."""
    one = same_tokens(0, length=8, layers=3, width=16)
    model = rc.Model(one.config, one.parameters, "float64")
    rc.save_factors(collected(one, np.float64, layers="blocks.*.*.{q,up}"), tmp_path / "f.h5")
    factors = rc.load_factors(tmp_path / "f.h5")
    noise = [name for name in factors if refused(factors[name])][-1]
    rc.save_bases(rc.decompose(factors), tmp_path / "b.h5")
    decompose_to(factors, tmp_path / "b2.h5")
    for name in ("b", "b2"):
        basis = rc.load_bases(tmp_path / f"{name}.h5")
        with pytest.raises(EmptyError, match=rf"'{noise}': G has trace .* are noise"):
            rc.edit(model, basis, {noise: 0.5})
        rc.edit(model, basis, {"blocks.*.mlp.*": 0.5})
    rc.edit(model, rc.one_sided(basis, "inputs"), {noise: 0.5})
    with pytest.raises(EmptyError, match="noise"):
        rc.edit(model, rc.one_sided(basis, "outputs"), {noise: 0.5})
    at = noise.replace(".", "/")
    with opened_for_lies(tmp_path / "b.h5") as file:
        del file[f"{at}/lam"].attrs["rounding"]
    rc.edit(model, rc.load_bases(tmp_path / "b.h5"), {noise: 0.5})
    with opened_for_lies(tmp_path / "f.h5") as file:
        del file[f"{at}/sum_G"].attrs["rounding_G"]
    assert rc.load_factors(tmp_path / "f.h5")[noise].rounding_G is None


def test_the_command_line_names_a_layer_without_curvature(tmp_path: Path, capsys) -> None:
    """Two positions: the one that has a label sees one key. q's gradient is exactly zero."""
    one = case(0, length=2)
    w, c, f, b = (str(tmp_path / f"{name}.h5") for name in "wcfb")
    rc.save(rc.Model(one.config, one.parameters, "float64"), w)
    rc.save_corpus(rc.Corpus(one.token), c)
    assert main(["collect", w, c, "-o", f, "--layers", "blocks.*.attn.*"]) == 0
    assert main(["decompose", f, "-o", b]) == 0
    assert main(["edit", w, b, "-o", str(tmp_path / "e.h5"), "--rho", "0.6"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'blocks.0.attn.q'" in said
    assert "curvature mass is 0" in said
    assert not (tmp_path / "e.h5").exists()
