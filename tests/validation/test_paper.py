"""The experiments say what their result files say, and measure what their docstrings say."""

import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import refcurv as rc
from validation.paper import claims, lm, page, results, stages
from validation.paper.methods import methods
from validation.paper.statistics import interval, paired
from validation.paper.temperature import mean_nats, refit, scored
from validation.paper.train import Recipe
from validation.paper.world import QUOTE_PREFIX

# ------------------------------------------------------------------ statistics


def test_t_interval_by_scipy_and_by_hand():
    x = [3.0, 5.0, 4.0, 8.0, 5.0]
    found = interval(x)
    low, high = stats.t.interval(0.95, 4, np.mean(x), stats.sem(x))
    assert found.mean == 5.0 and found.n == 5
    assert [found.mean - found.half, found.mean + found.half] == pytest.approx([low, high])
    # s² = (4 + 0 + 1 + 9 + 0)/4, and Student's table for 4 degrees of freedom
    assert found.half == pytest.approx(2.776445 * math.sqrt(3.5 / 5), rel=1e-6)
    assert found.text(1, 10) == "50.0 ± 23.2"
    assert not found.below_zero
    assert interval([-x for x in x]).below_zero
    assert interval([2.0]).text() == "2.0"
    both = paired(x, [1.0, 4.0, 2.0, 5.0, 3.0])
    assert both == interval([2.0, 1.0, 2.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("bound", "above", "verdict"),
    [
        (2.0, True, "**yes**"),  # 5 ± 2.3: the interval is above 2
        (4.0, True, "in the mean"),
        (5.1, True, "no"),
        (8.0, False, "**yes**"),
        (6.0, False, "in the mean"),
        (4.9, False, "no"),
    ],
)
def test_a_claim_holds_if_its_interval_does(bound, above, verdict):
    claim = claims.Claim("text", lambda run: run["x"], bound, above=above, scale=1)
    found = claim.row([{"x": x} for x in (3.0, 5.0, 4.0, 8.0, 5.0)])
    limit = f"{'≥' if above else '≤'} {bound:g}"
    assert found == ["text", limit, "5.00 ± 2.32", "5", verdict]


# ------------------------------------------------------------------ the result files


@pytest.mark.parametrize(("kind", "names"), [("lm", lm.STAGES), ("vit", None)])
def test_at_least_five_seeds_of_one_recipe(kind, names):
    runs = results.load(kind)
    seeds = [run["recipe"]["seed"] for run in runs]
    assert len(seeds) == len(set(seeds)) >= 5
    assert lm.DEVELOPED_ON not in seeds or kind == "vit"
    recipes = [run["recipe"] | {"seed": 0} for run in runs]
    assert all(recipe == recipes[0] for recipe in recipes)
    for run in runs:
        assert run["provenance"]["refcurv"] and run["seconds"]["train"] > 0
        if names:
            assert {stage.__name__ for stage in names} <= set(run)
    if kind == "lm":  # the recipe of the code is the recipe of the results
        assert recipes[0] == json.loads(json.dumps(lm.asdict(Recipe(seed=0))))


@pytest.mark.parametrize("variant", ["without-quotes", results.OTHER])
def test_variants_are_the_recipe_but_for_one_thing(variant):
    runs = results.load("lm", variant)
    assert len(runs) >= 5
    for run in runs:
        recipe = Recipe(seed=run["recipe"]["seed"])
        if variant == results.OTHER:
            recipe = lm.replace(recipe, arch=variant)
        else:
            recipe = lm.replace(recipe, mixture=lm.unquoted(recipe.mixture))
        assert run["recipe"] == json.loads(json.dumps(lm.asdict(recipe)))
    if variant == "without-quotes":  # the reported seeds, one by one
        seeds = [[run["recipe"]["seed"] for run in some] for some in (runs, results.load("lm"))]
        assert seeds[0] == seeds[1]


def test_matched_means_within_half_a_per_cent():
    for run in [*results.load("lm"), *results.load("lm", results.OTHER)]:
        target = run["sweep"]["chosen"]["dev"]["language"]
        for one in [*run["compared"].values(), run["left_out"]]:
            if one.get("verdict") == "matched":
                assert abs(one["dev_perplexity"] / target - 1) <= 0.005


def test_the_page_says_what_the_results_say():
    text = (results.HERE / "README.md").read_text()
    assert page.filled(text, page.blocks()) == text


def test_a_cell_of_the_page_by_hand():
    """Strict recitation after the K-FAC edit, of quotes that were not told to BSN."""
    values = []
    for path in results.RESULTS.iterdir():
        if re.fullmatch(r"lm-\d+.json", path.name):
            table = json.loads(path.read_text())["compared"]["kfac"]["test"]
            values += [row["after"]["strict"] for row in table if row["name"] == "quotes_test"]
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    text = (results.HERE / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| K-FAC |"))
    assert row.split(" | ")[2] == f"{100 * mean:.1f} ± {100 * half:.1f}"


def test_a_page_without_a_place_for_a_table_is_refused():
    text = "<!-- a -->\nold\n<!-- /a -->\n"
    assert page.filled(text, {"a": "new"}) == "<!-- a -->\nnew\n<!-- /a -->\n"
    with pytest.raises(SystemExit, match="0 places for 'b'"):
        page.filled(text, {"b": "new"})


def test_equal_forgetting_lies_between_two_points():
    """Of 80 % recited: 60, 16, 0 %: a tenth of what was lies halfway between the last two."""

    def point(kept, quotes, copying, language, refit):
        test = dict.fromkeys(results.ORDER, 1.0)
        test |= {"quotes": quotes, "copying": copying, "language": language, "refit": refit}
        return {"kept": kept, "test": test}

    before = {name: {"accuracy": 0.5} for name in results.ORDER}
    before |= {"quotes": {"strict": 0.8}, "language": {"perplexity": 20.0}}
    baseline = [{"name": f"{name}_test", "after": after} for name, after in before.items()]
    points = [point(0.8, 0.6, 0.5, 20.2, 18.2), point(0.5, 0.16, 0.4, 21.0, 18.9),
              point(0.3, 0.0, 0.1, 25.0, 19.8), point(0.1, 0.0, 0.0, 99.0, 99.0)]  # fmt: skip
    curves = {"a": points, "b": points[:2], "c": points[2:]}
    run = {"curves": curves, "baseline": {"test": baseline, "refit": 18.0}}
    found = results.at_forgetting(run, "a")
    wanted = {"quotes": 0.1, "kept": 0.4, "copying": 0.5, "perplexity": 0.15, "refit": 0.075}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["facts"] == 2.0
    assert results.at_forgetting(run, "b") is None
    # the first cut forgets all: nine tenths of the way from no cut
    assert results.at_forgetting(run, "c")["kept"] == pytest.approx(0.1 + 0.9 * 0.3)


# ------------------------------------------------------------------ the laboratory


TINY = Recipe(seed=3, steps=2, width=16, mlp_width=24, quotes=32, batch=4)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A model that has learned nothing, with little of everything to ask it."""
    few = pytest.MonkeyPatch()
    few.setattr(lm, "SEQUENCES", 300)
    made = lm.Lab(TINY, tmp_path_factory.mktemp("lab"))
    corpus = made.corpus
    asked = {name: lm.first(p, 20) for name, p in corpus.populations.items()}
    made.__dict__["corpus"] = lm.replace(corpus, populations=asked)
    _ = made.bases, made.without_quotes
    few.undo()
    return made


def contains(tokens, part):
    """Does any row hold these tokens in a row?"""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part), axis=1)
    return bool((windows == part).all(axis=-1).any())


def test_a_corpus_without_quotes_has_none(lab):
    suffixes = lab.world.quotes[:, QUOTE_PREFIX:]
    assert any(contains(lab.corpus.tokens, one) for one in suffixes)
    assert not any(contains(lab.without_quotes.tokens, one) for one in suffixes)
    before, after = lab.world.mixture, lm.unquoted(lab.world.mixture)
    assert after.quotes == 0 < before.quotes
    assert after.language == before.language + before.quotes


def test_every_method_removes_the_share_that_it_is_given(lab):
    layers = "blocks.3.mlp.{gate,up}"
    scores = rc.train_scores(
        lab.model, layers, lab["quotes_dev"], lab.without_quotes, ratio=0.1, steps=1, seed=0
    )
    found = methods(lab.model, lab.bases, lab.corpus, layers, scores, 3)
    assert set(found) == {*results.METHODS, *results.VARIANTS}
    for name, method in found.items():
        assert list(method.grid) == sorted(method.grid), name
        assert 0 < method.weakest <= method.grid[0] < method.strongest < 1, name
        same, _ = method.cut(0.0)
        edited, record = method.cut(0.3)
        assert [x.layer for x in record.layers] == ["blocks.3.mlp.gate", "blocks.3.mlp.up"], name
        for x in record.layers:
            key = f"{x.layer}.weight"
            assert x.rho == pytest.approx(0.7), name
            assert (edited.parameters[key] != lab.model.parameters[key]).any(), name
            np.testing.assert_array_equal(same.parameters[key], lab.model.parameters[key])


def test_the_choice_is_the_least_perplexity_that_forgets():
    def row(quotes, language):
        return {"dev": {"quotes": quotes, "language": language}}

    rows = [row(0.5, 20.0), row(0.09, 26.0), row(0.1, 25.0), row(0.0, 30.0)]
    assert lm.choose({"quotes": 1.0}, rows) is rows[2]
    assert lm.choose({"quotes": 0.95}, rows) is rows[1]


def test_bsn_has_the_setting_that_the_grid_found():
    run = results.read(results.DEVELOPMENT)
    found = lm.gentlest(run["sweep"]["before"], run["grid"])
    assert {key: found[key] for key in lm.BSN} == lm.BSN

    def row(quotes, copying, language):
        dev = dict.fromkeys(results.ORDER, 1.0)
        return {"dev": dev | {"quotes": quotes, "copying": copying, "language": language}}

    rows = [row(0.5, 1.0, 20.0), row(0.0, 0.9, 21.0), row(0.1, 1.0, 26.0), row(0.0, 1.0, 25.0)]
    assert lm.gentlest({"quotes": 1.0}, rows) is rows[3]
    assert lm.gentlest({"quotes": 1.0}, rows[:3]) is rows[2]


@pytest.mark.slow
def test_bands_taken_away_together_are_the_edit(lab, monkeypatch):
    """All bands from 60 % of the mass on gone is the edit at rho = 0.6, and so forth."""
    layers = "blocks.{2-3}.mlp.gate"
    monkeypatch.setattr(lm.Lab, "chosen", {"layers": layers})
    found = lm.removal(lab)
    assert [len(part) for part in found.values()] == [7, 6, 6]
    for k, rho in ((0, 0.2), (2, 0.6), (4, 0.9)):
        edited, _ = rc.edit(lab.model, lab.bases, {layers: rho})
        wanted = lm.plain(lab.table(edited))
        assert found["with_flatter"][k] == pytest.approx(wanted, rel=1e-4)
    assert found["alone"][6] == found["with_flatter"][5]
    assert found["alone"][0] == found["with_sharper"][0]
    assert len({one["language"] for one in found["alone"]}) == 7


class Bench(SimpleNamespace):
    """A laboratory of whatever a stage needs."""

    def __getitem__(self, name):
        return self.asked[name]


def test_facts_are_ordered_by_their_frequency(monkeypatch):
    """A model that knows exactly the facts of even rank, asked tenth by tenth."""
    world = Recipe(seed=3, quotes=32).world()
    asked = lm.populations(world)
    ranks = {tuple(fact): rank for rank, fact in enumerate(world.facts[:, :2].tolist())}

    def hits(knows, population):
        rank = np.array([ranks[tuple(row[1:3])] for row in population.tokens.tolist()])
        return knows(rank)

    cut = SimpleNamespace(cut=lambda removed: (lambda rank: rank < 60, None))
    chosen, before = {"rho": 0.5}, lambda rank: rank % 2 == 0
    bench = Bench(world=world, methods={"kfac": cut}, chosen=chosen, model=before, asked=asked)
    monkeypatch.setattr(lm.items, "hits", hits)
    found = lm.facts(bench)
    assert found["before"] == [0.5] * 10
    assert found["after"] == [1.0] + [0.0] * 9


def test_a_temperature_is_found_again(lab):
    """Logits times s want the temperature s times as high and give the same perplexity."""
    dev, test = lab["language_dev"], lab["language_test"]
    head = lab.model.parameters["head.weight"]
    T, perplexity = refit(lab.model, dev, test)
    for s in (0.5, 1.5):
        other = lab.model.with_parameters({"head.weight": (s * head).astype(np.float32)})
        found = refit(other, dev, test)
        assert found == pytest.approx((s * T, perplexity), rel=1e-4)
    cooled = lab.model.with_parameters({"head.weight": (head / T).astype(np.float32)})
    for text, name in ((dev, "language_dev"), (test, "language_test")):
        table = rc.evaluate(cooled, lab.only(name), split=text.split)
        there = math.exp(mean_nats(*scored(lab.model, text), 1 / T))
        assert table[name].after["perplexity"] == pytest.approx(there, rel=1e-5)
    best = mean_nats(*scored(lab.model, dev), 1 / T)
    assert all(mean_nats(*scored(lab.model, dev), b / T) >= best for b in (0.9, 0.99, 1.01, 1.1))
    assert perplexity == pytest.approx(math.exp(mean_nats(*scored(lab.model, test), 1 / T)))


def test_stages_are_kept_and_resumed(tmp_path):
    asked = Counter()

    bench = Bench(seconds=1.25)

    def first(_):
        asked["first"] += 1
        return {"x": 1}

    def second(_):
        asked["second"] += 1
        if asked["second"] == 1:
            raise KeyboardInterrupt
        return stages.done(tmp_path, "first")["x"] + 1

    with pytest.raises(KeyboardInterrupt):
        stages.run(bench, tmp_path, (first, second))
    found = stages.run(bench, tmp_path, (first, second))
    assert (found["first"], found["second"]) == ({"x": 1}, 2)
    assert asked == {"first": 1, "second": 2}
    assert found["seconds"]["train"] == 1.2
    assert set(found["seconds"]) == {"train", "first", "second"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "-1", "--out", "OUT/x.json"], "seed"),
        (["--seed", "1", "--out", "OUT"], "is a folder"),
        (["--seed", "1", "--out", "OUT/file/x.json"], "paper:"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments, says, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    args = stages.parser("x").parse_args([a.replace("OUT", str(tmp_path)) for a in arguments])
    with pytest.raises(SystemExit, match=says) as caught:
        stages.main(args, lambda: pytest.fail("worked"))
    assert "\n" not in str(caught.value)
