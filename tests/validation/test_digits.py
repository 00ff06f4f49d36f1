"""The noised digits are what they say, a resumed training has the same bits, accuracies by hand."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import refcurv as rc
from refcurv.model.config import Pool
from refcurv.model.patterns import expand
from refcurv.model.weights import resident
from refcurv.passes.forward import layer_inputs
from validation.paper import digits, vit

TINY = digits.Recipe(
    train=40, noised=10, epochs=3, batch=16, width=8, layers=2, heads=2, mlp_width=12, warm_up=2
)


def drawings(count=60, seed=0):
    """Images whose first pixel is their class and whose second and third count them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 17, size=(count, 8, 8)).astype(float)
    true = rng.integers(0, digits.CLASSES, size=count)
    images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = true, *divmod(np.arange(count), 16)
    return images, true


@pytest.fixture
def drawn(monkeypatch):
    """Drawings in the place of scikit-learn's digits."""
    monkeypatch.setattr(digits, "read", drawings)


def test_images_are_split_and_so_many_labels_are_false():
    images, true = drawings(1797 // 7)
    made = digits.make_digits(images, true, 1, 200, 20)
    pixels = np.rint((made.images[:, 0] + 0.3) * 16)
    order = (16 * pixels[:, 0, 1] + pixels[:, 0, 2]).astype(int)
    assert sorted(order) == list(range(len(images)))
    np.testing.assert_array_equal(pixels, images[order])
    np.testing.assert_array_equal(made.true, true[order])
    false = np.flatnonzero(made.label != made.true)
    np.testing.assert_array_equal(false, made.noised)
    assert len(false) == 20 and false.max() < made.train == 200
    assert made.label.min() >= 0 and made.label.max() < digits.CLASSES


def test_the_split_is_a_function_of_its_seed():
    one, again, other = (digits.make_digits(*drawings(), seed, 40, 10) for seed in (1, 1, 2))
    for name in ("images", "true", "label", "noised"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name), strict=True)
        assert (getattr(one, name) != getattr(other, name)).any()


def test_every_false_class_is_as_likely():
    count = 9000
    made = digits.make_digits(np.zeros((count, 8, 8)), np.full(count, 7), 3, count, count)
    found = Counter(made.label.tolist())
    assert set(found) == set(range(digits.CLASSES)) - {7}
    # nine numbers, each binomial: six standard deviations
    assert max(abs(n - 1000) for n in found.values()) < 6 * math.sqrt(count * (1 / 9) * (8 / 9))


def test_halves_part_each_kind_of_image():
    made = digits.make_digits(*drawings(), 1, 40, 10)
    dev, test = digits.halves(made).values()
    sizes = {kind: (len(dev[kind]), len(test[kind])) for kind in dev}
    assert sizes == {"noised": (5, 5), "clean": (8, 7), "validation": (10, 10)}
    whole = np.concatenate([half[kind] for half in (dev, test) for kind in half])
    assert len(set(whole)) == 45  # and no image is in both
    false = made.label != made.true
    assert all(false[h["noised"]].all() and not false[h["clean"]].any() for h in (dev, test))
    assert all(h["validation"].min() >= 40 > h["clean"].max() for h in (dev, test))


def test_the_shipped_images_are_scikit_learns():
    pytest.importorskip("sklearn", reason="the images are scikit-learn's: extra `paper`")
    made = digits.Recipe(seed=5).digits()
    assert made.images.shape == (1797, 1, 8, 8) and made.train == 1297
    assert (made.label != made.true).sum() == len(made.noised) == 130
    assert (made.images.min(), made.images.max()) == (np.float32(-0.3), np.float32(0.7))
    assert min(Counter(made.true.tolist()).values()) == 174


def test_shifted_images_are_moved_by_a_pixel():
    images = np.arange(1, 1 + 400 * 64, dtype=np.float32).reshape(400, 1, 8, 8)
    made = digits.shifted(images, 0.75, np.random.default_rng(0))
    found = Counter()
    for before, after in zip(images[:, 0], made[:, 0], strict=True):
        fits = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                moved = np.full((8, 8), digits.DARK)
                inside = (
                    slice(max(down, 0), 8 + min(down, 0)),
                    slice(max(right, 0), 8 + min(right, 0)),
                )
                source = (
                    slice(max(-down, 0), 8 + min(-down, 0)),
                    slice(max(-right, 0), 8 + min(-right, 0)),
                )
                moved[inside] = before[source]
                fits += [(down, right)] if (moved == after).all() else []
        assert len(fits) == 1
        found[fits[0]] += 1
    assert len(found) == 9
    # 1/4 stay, and 1/9 of the others too; the other moves are equally likely: six deviations
    for move, count in found.items():
        p = 1 / 4 + 1 / 12 if move == (0, 0) else 1 / 12
        assert abs(count - 400 * p) < 6 * math.sqrt(400 * p * (1 - p))
    np.testing.assert_array_equal(digits.shifted(images, 0.0, np.random.default_rng(0)), images)


def test_each_epoch_sees_different_images_in_an_order_of_its_own():
    recipe = replace(TINY, batch=8)
    first, second = (
        np.concatenate([digits.batch(recipe, 5 * epoch + i) for i in range(5)])
        for epoch in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first != second).any()


def test_decay_pulls_matrices_and_nothing_else():
    recipe = replace(TINY, pool=Pool.CLS, decay=2.0)
    state = digits.start(recipe)
    state = replace(state, parameters={n: W + 1 for n, W in state.parameters.items()})
    still = {name: np.zeros_like(W) for name, W in state.parameters.items()}
    rate = 1e-3 / recipe.warm_up
    for name, W in digits.moved(recipe, state, still).parameters.items():
        pulled = name == "position.weight" or (name.endswith("weight") and W.ndim == 2)
        shrunk = state.parameters[name] * np.float32(1 - rate * 2.0) if pulled else None
        np.testing.assert_array_equal(W, state.parameters[name] if shrunk is None else shrunk)


def test_a_steady_gradient_moves_parameters_by_the_learning_rate():
    # first and second moment are then exactly d and d², so that each step is rate · sign(d)
    steady = {name: np.full_like(W, -0.5) for name, W in digits.start(TINY).parameters.items()}
    state = begun = digits.start(TINY)
    for _ in range(4):
        state = digits.moved(TINY, state, steady)
    assert TINY.steps == 6 and TINY.warm_up == 2
    cosine = [0.05 + 0.95 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(4)]
    path = TINY.rate * (cosine[0] / 2 + sum(cosine[1:]))
    for name in ("final_norm.bias", "blocks.1.attn_norm.weight"):
        step = state.parameters[name].astype(float) - begun.parameters[name]
        # eps of AdamW beside |d|, and four sums of numbers up to 1 in float32
        assert np.abs(step - path).max() <= path * 1e-8 / 0.5 + 4 * 2.0**-24 * (1 + 8 * path), name


def test_a_resumed_training_has_the_same_bits(tmp_path):
    made = digits.make_digits(*drawings(), 1, 40, 10)
    straight = digits.train(TINY, made, tmp_path / "straight.npz")
    digits.train(TINY, made, tmp_path / "killed.npz", until=3)
    resumed = digits.train(TINY, made, tmp_path / "killed.npz")
    assert resumed.step == straight.step == TINY.steps == 6
    for name, array in straight.parameters.items():
        np.testing.assert_array_equal(array, resumed.parameters[name], strict=True)
    with pytest.raises(SystemExit, match="another recipe"):
        digits.train(replace(TINY, seed=2), made, tmp_path / "killed.npz")
    (tmp_path / "killed.npz").write_text("half a file")
    with pytest.raises(SystemExit, match="is no training"):
        digits.train(TINY, made, tmp_path / "killed.npz")


# ------------------------------------------------------------------ the experiments


LEARNED = replace(TINY, width=16, epochs=40, rate=0.02, decay=0.25, shifts=0.0)
"""A model that has learned the labels of its images, some of the false ones too."""


@pytest.fixture
def lab(drawn, tmp_path):
    return vit.Lab(LEARNED, tmp_path)


def likeliest(model, image):
    """The class of one image: the first of the largest logits."""
    logit = rc.logits(model, image[None])[0].tolist()
    return logit.index(max(logit))


def by_hand(lab, model, split):
    """Accuracies by asking one image at a time."""
    made, begin = lab.digits, ("dev", "test").index(split)
    noised = [int(n) for n in made.noised][begin::2]
    clean = [n for n in range(made.train) if n not in made.noised][::2][begin::2]
    validation = list(range(made.train, len(made.true)))[begin::2]
    known = [n for n in noised if likeliest(lab.model, made.images[n]) == made.label[n]]
    asked = {
        "memorised": (noised, made.label),
        "true": (noised, made.true),
        "clean": (clean, made.true),
        "validation": (validation, made.true),
        "returned": (known, made.true),
    }
    return {
        name: sum(likeliest(model, made.images[n]) == label[n] for n in rows) / len(rows)
        for name, (rows, label) in asked.items()
        if rows
    }


def test_accuracies_by_asking_one_image_at_a_time(lab):
    for removed in (0.0, 0.6):
        edited, _ = lab.methods["kfac"].cut(removed)
        found = lab.outcome(edited)
        for split in ("dev", "test"):
            assert found[split] == pytest.approx(by_hand(lab, edited, split), rel=0, abs=5.1e-6)
    before = lab.outcome(lab.model)
    for split in ("dev", "test"):
        assert before[split]["returned"] == 0 < before[split]["memorised"]


@pytest.mark.parametrize("pool", [Pool.MEAN, Pool.CLS])
def test_every_method_cuts_its_layers_by_the_share_that_it_is_given(drawn, tmp_path, pool):
    lab = vit.Lab(replace(TINY, pool=pool), tmp_path)
    down = ["blocks.0.mlp.down", "blocks.1.mlp.down"]
    for name, method in lab.methods.items():
        layers = list(lab.bases) if name.endswith("up and down") else down
        assert list(method.grid) == sorted(method.grid), name
        _, weak = method.cut(method.grid[0])
        _, strong = method.cut(method.grid[-1])
        assert [one.layer for one in weak.layers] == layers, name
        assert strong.kept < weak.kept <= 1, name
        assert all(one.rho == 1 - method.grid[-1] for one in strong.layers), name
    assert ("kfac, CLS rows" in lab.methods) == (pool is Pool.CLS)


def test_factors_are_exact_and_of_the_rows_that_they_say(drawn, tmp_path):
    lab = vit.Lab(replace(TINY, pool=Pool.CLS), tmp_path)
    for name, rows in (("kfac", "all"), ("kfac, CLS rows", "cls")):
        factors = rc.collect(lab.model, lab.corpus, vit.CUT, fisher="expected", rows=rows)
        wanted, _ = rc.edit(lab.model, rc.decompose(factors), 0.7)
        edited, _ = lab.methods[name].cut(0.3)
        for layer in factors:
            W, V = (one.parameters[f"{layer}.weight"] for one in (edited, wanted))
            np.testing.assert_array_equal(W, V)


def point(memorised, validation, returned):
    return {"dev": {"memorised": memorised, "validation": validation, "returned": returned}}


def test_strengths_are_chosen_by_the_dev_half():
    before = point(0.9, 0.8, 0.0)
    curve = [point(0.7, 0.79, 0.1), point(0.5, 0.781, 0.4), point(0.5, 0.779, 0.9),
             point(0.3, 0.8, 0.4), point(0.4, 0.6, 1.0)]  # fmt: skip
    assert vit.most_returned(curve, before) is curve[1]
    assert vit.most_returned(curve[4:], before) is None
    assert vit.first_below(curve, 0.5) is curve[1]
    assert vit.first_below(curve, 0.49) is curve[3]
    assert vit.first_below(curve, 0.2) is None


def test_places_are_blocks_and_pairs_of_blocks():
    names = list(replace(TINY, layers=3).config().linear_layers())
    found = {name: expand(pattern, names) for name, pattern in vit.places(3).items()}
    both = [[f"blocks.{n}.mlp.{kind}" for kind in ("up", "down")] for n in range(3)]
    assert found["1"] == both[1] and found["0, 2"] == both[0] + both[2]
    assert list(found) == ["0", "1", "2", "0, 1", "0, 2", "1, 2", "all", "up", "down"]
    assert found["down"] == [pair[1] for pair in both]
    assert found["all"] == [name for pair in both for name in pair]


def test_band_ratios_are_of_noised_over_clean_images(lab):
    layer, made = "blocks.1.mlp.down", lab.digits
    found = vit.activation(lab)
    clean = [n for n in range(made.train) if n not in made.noised][::2]
    x = inputs_of(lab.model, layer, made.images)
    _, _, right = np.linalg.svd(np.asarray(lab.model.parameters[f"{layer}.weight"], float))
    edges = np.array([0, 2, 3, 6, 12])  # 10, 25, 50 and 100 per cent of 12, rounded up
    for kind, U in (("input_rank", lab.bases[layer].U_A), ("svd", right.T)):
        assert found[kind][layer]["sizes"] == np.diff(edges).tolist()
        for b, ratio in enumerate(found[kind][layer]["ratio"]):
            norm = np.linalg.norm(x @ U[:, edges[b] : edges[b + 1]], axis=-1)
            noised_over_clean = norm[made.noised].mean() / norm[clean].mean()
            assert ratio == pytest.approx(noised_over_clean, rel=0, abs=5.1e-6)
    assert len(found["pair_mass"][layer]["ratio"]) == 7
    assert set(found["pair_mass"]) == set(lab.bases)


def inputs_of(model, layer, images):
    """What a layer reads, (N, T, I) float64."""
    patch = digits.patches(model.config, images)
    layout = digits.image_layout(model.config, len(images))
    found = layer_inputs(model.config, resident(model), patch, layout, [layer])
    return found[layer].astype(np.float64)


@pytest.mark.slow
def test_a_run_is_resumed_stage_by_stage_and_fits_in_json(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "DECAYS", (4.0,))
    for name in ("MASS", "COARSE", "ENERGY", "IN_RANDOM_BASIS", "PAIRS"):
        monkeypatch.setattr(vit, name, (0.1, 0.5))
    found = vit.run(LEARNED, tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False))["recipe"]["seed"] == TINY.seed
    for stage in ("compared", "decay"):
        (tmp_path / f"{stage}.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = vit.run(LEARNED, tmp_path)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in found.items() if k != "seconds"
    }
    assert set(found["compared"]) == set(found["curves"])
    check_decays(found, vit.Lab(replace(LEARNED, decay=4.0), tmp_path))


def check_decays(found, other):
    """What the study says of the recipe's own decay and of another one."""
    own, theirs = found["decay"]["0.25"], found["decay"]["4"]
    before = {split: found["baseline"][split] for split in ("dev", "test")}
    assert own["before"] == before != theirs["before"] == other.outcome(other.model)
    cuts = {"kfac": other.kfac(other.bases), "svd": other.svd()}
    for name, cut in cuts.items():
        assert own["curves"][name] == found["curves"][name]
        assert theirs["curves"][name] == other.curve(name, vit.Method(cut, (0.1, 0.5)))
        assert theirs["best"][name] == vit.most_returned(theirs["curves"][name], theirs["before"])
    for quantity in ("pair_mass", "input_rank"):
        assert own[quantity] == found["activation"][quantity] != theirs[quantity]
        assert theirs[quantity] == vit.ratios(other, other.bases, quantity)
