"""A trace: every tensor of a pass; beside theirs, the first one that differs, and where."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.judge.divergence import compare_traces, first_divergence
from refcurv.judge.trace import load_tensors, save_trace, trace
from refcurv.model.config import TABLES, Image, Pool


@pytest.fixture(scope="module")
def setting():
    made = config(heads=4, kv_heads=2, biases=("q", "k", "v"))
    model = rc.Model(made, random_parameters(made, 3))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, made.vocabulary, (3, 7))
    mask = np.ones_like(tokens)
    mask[1, 5:] = 0
    return model, rc.Corpus(tokens, mask=mask)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_a_trace_makes_the_sums_of_collect(setting, fisher):
    """Σ a aᵀ and Σ g gᵀ over the reached rows are those of `collect`, labels included."""
    model, corpus = setting
    found = trace(model, corpus, [0, 1, 2], fisher, 5)
    factors = rc.collect(model, corpus, "**", fisher, 5)
    keep = np.zeros((3, 7), bool)
    keep[:, :-1] = True
    keep[1, 4:] = False
    for name, one in factors.items():
        for side, total in (("a", one.sum_A), ("g", one.sum_G)):
            x = found.tensors[f"{name}.{side}"][keep]
            size = max(np.trace(total), 1e-6)
            assert np.abs(x.T @ x - total).max() <= 1e-12 * size, (name, side)
    assert not set(TABLES) & {name.rpartition(".")[0] for name in found.tensors}


@pytest.mark.parametrize("pool", [Pool.CLS, Pool.MEAN])
def test_a_trace_of_images_makes_the_sums_of_collect(pool):
    """The patches' layer is among them, with a row for each; the head has one for each image."""
    image = Image(channels=2, height=4, width=4, patch=2)
    own = config(vocabulary=5, image=image, pool=pool, causal=False, norm="layer", rope_theta=None,
                 learned_positions=image.positions, biases=("patch", "up"))  # fmt: skip
    model = rc.Model(own, random_parameters(own, 3))
    images = np.random.default_rng(1).normal(size=(4, 2, 4, 4)).astype(np.float32)
    corpus = rc.Corpus(images=images, labels=np.array([0, 4, 2, 0]))
    found = trace(model, corpus, [0, 1, 2, 3], "empirical")
    assert found.tensors["patch.a"].shape[:2] == (4, 4) and found.tensors["head.g"].shape[1] == 1
    for name, one in rc.collect(model, corpus, "**", "empirical").items():
        for side, total in (("a", one.sum_A), ("g", one.sum_G)):
            x = found.tensors[f"{name}.{side}"].reshape(-1, len(total)).astype(np.float64)
            assert np.abs(x.T @ x - total).max() <= 1e-12 * max(np.trace(total), 1e-6), (name, side)


def test_labels_are_those_that_collect_draws(setting):
    """Drawn labels go out; as a corpus's own they give the same factors without drawing."""
    model, corpus = setting
    found = trace(model, corpus, [0, 1, 2], "sampled", 9)
    alone = trace(model, corpus, [2], "sampled", 9).tensors["labels"]
    assert np.array_equal(alone, found.tensors["labels"][2:]), "by its number in the corpus"
    own = rc.Corpus(corpus.tokens, labels=found.tensors["labels"], mask=corpus.mask)
    drawn = rc.collect(model, corpus, "blocks.*.mlp.*", "sampled", 9)
    given = rc.collect(model, own, "blocks.*.mlp.*", "empirical")
    for name, one in drawn.items():
        assert np.array_equal(one.sum_G, given[name].sum_G)


def test_names_stand_in_order_of_computation(setting):
    model, corpus = setting
    names = list(trace(model, corpus).tensors)
    middle = names.index("logits")
    up, down = names[:middle], names[middle + 3 :]
    assert names[middle : middle + 3] == ["logits", "labels", "nats"]
    assert up[0].startswith("blocks.0.attn.") and up[-1] == "head.a" and down[0] == "head.g"
    blocks = [int(n.split(".")[1]) for n in up if n.startswith("blocks")]
    assert blocks == sorted(blocks)
    assert [n[:-1] for n in up] == [n[:-1] for n in reversed(down)]
    assert up.index("blocks.0.attn.o.a") < up.index("blocks.0.mlp.up.a")
    assert up.index("blocks.0.mlp.up.a") < up.index("blocks.0.mlp.down.a")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_honest_program_agrees(setting, dtype):
    """refcurv's own pass with other roundings, and in float32."""
    model, corpus = setting
    ours = trace(model, corpus, [0, 1], "empirical", estimate=True)
    other = rc.Model(model.config, {k: v.astype(dtype) for k, v in model.parameters.items()}, dtype)
    theirs = trace(other, corpus, [0, 1], "empirical").tensors
    found = compare_traces(theirs, ours, dtype)
    assert len(found) == len(ours.tensors)
    assert all(one.agrees for one in found), found


FAULTS = ["blocks.1.mlp.up.a", "logits", "blocks.0.attn.q.g", "labels", "nats"]


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_tensor_that_differs_is_named(setting, name):
    """From that position on, everything later in the order is off too."""
    model, corpus = setting
    ours = trace(model, corpus, [2, 0], "empirical", estimate=True)
    theirs = {k.replace(".", "/"): v.copy() for k, v in ours.tensors.items()}
    names = list(ours.tensors)
    for later in names[names.index(name) :]:
        theirs[later.replace(".", "/")][1, 3:] += 1
    found = compare_traces(theirs, ours)
    bad = [one for one in found if not one.agrees]
    assert bad[0].name == name and bad[0].first == (0, 3)
    assert len(bad) == len(names) - names.index(name)


def test_what_cannot_be_compared_is_said(setting):
    model, corpus = setting
    ours = trace(model, corpus, estimate=True)
    found = compare_traces({"logits": np.zeros((2, 2))}, ours)
    assert found[0].trouble and not found[0].agrees
    nan = ours.tensors["logits"].copy()
    nan[0, 2] = np.nan
    one = compare_traces({"logits": nan}, ours)[0]
    assert one.first == (0, 2) and not one.agrees
    with pytest.raises(rc.RefcurvError, match="begin with"):
        compare_traces({"other": nan}, ours)
    for wrong in (dict(sequences=[3]), dict(sequences=[]), dict(fisher="expected")):
        with pytest.raises(rc.RefcurvError):
            trace(model, corpus, **wrong)


def test_their_labels_are_taken(setting):
    """A program that drew its own labels agrees once they are known, and not before."""
    model, corpus = setting
    theirs = dict(trace(model, corpus, [2], "sampled", 77).tensors)
    assert all(one.agrees for one in first_divergence(theirs, model, corpus, [2]))
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in theirs.items()}
    assert all(one.agrees for one in first_divergence(flat, model, corpus, [2]))
    del theirs["labels"]
    found = first_divergence(theirs, model, corpus, [2])
    assert next(one.name for one in found if not one.agrees) == "nats"
    for wrong in (np.zeros((1, 6), int), np.full((1, 7), 99), np.zeros((1, 7)), None):
        with pytest.raises(rc.RefcurvError):
            first_divergence({"labels": wrong}, model, corpus, [2])


def test_a_trace_file_holds_the_trace(setting, tmp_path):
    model, corpus = setting
    made = trace(model, corpus, [1])
    save_trace(made, tmp_path / "t.h5")
    found = load_tensors(tmp_path / "t.h5")
    assert set(found) == set(made.tensors)
    assert all(np.array_equal(found[name], x) for name, x in made.tensors.items())


def test_a_trace_of_theirs_is_judged_on_the_command_line(setting, tmp_path, capsys):
    model, corpus = setting
    rc.save(model, tmp_path / "w.h5")
    rc.save_corpus(corpus, tmp_path / "c.h5")
    files = ["--model", str(tmp_path / "w.h5"), "--corpus", str(tmp_path / "c.h5")]
    made = str(tmp_path / "t.h5")
    assert main(["trace", *files[1::2], "--sequences", "2", "-o", made]) == 0
    judge = ["validate", "--trace", made, *files, "--sequences", "2"]
    assert main(judge) == 0
    assert "all tensors agree" in capsys.readouterr().out
    wrong = {name.replace(".", "/"): x for name, x in load_tensors(made).items()}
    wrong["blocks/1/mlp/up/a"] = wrong["blocks/1/mlp/up/a"] * 1.01
    np.savez(tmp_path / "t.npz", **wrong)
    judge[2] = str(tmp_path / "t.npz")
    assert main(judge) == 1
    said = capsys.readouterr().out
    assert said.startswith("the two part at blocks.1.mlp.up.a: sequence 2, position 0")
    assert main(["validate", made, "--reference", made]) == 2
    assert main(["validate"]) == 2


def test_their_labels_make_the_reference(setting, tmp_path):
    """A collection with drawn labels is judged without drawing once its labels are known."""
    model, corpus = setting
    theirs = rc.collect(model, corpus, "blocks.*.mlp.*", "sampled", 7)
    labels = trace(model, corpus, [0, 1, 2], "sampled", 7).tensors["labels"]
    np.savez(tmp_path / "labels.npz", labels=labels)
    in_memory = {name: (one.A, one.G, one.n_A) for name, one in theirs.items()}
    for given in (labels, tmp_path / "labels.npz"):
        verdict = rc.validate(
            in_memory, model=model, corpus=corpus, labels=given, layers="blocks.*.mlp.*"
        )
        assert verdict.passed
        assert max(f.error for f in verdict.findings if f.quantity == "G") < 1e-13
    for wrong in (dict(labels=labels[:1]), dict(labels=labels, reference=theirs)):
        with pytest.raises(rc.RefcurvError):
            rc.validate(in_memory, model=model, corpus=corpus, **wrong)
