"""The synthetic world asks what training has not answered; a resumed training has the same bits."""

import ast
import itertools
from dataclasses import replace

import numpy as np
import pytest

from validation.paper import train, world
from validation.paper.muon import orthogonalise
from validation.paper.trainings import load, trained

WORLD = world.make_world()
ASKED = world.populations(WORLD)


def prompts(population):
    return {
        tuple(row[:n].tolist())
        for row, n in zip(population.tokens, population.prompt_length, strict=True)
    }


def test_the_world_is_a_function_of_its_seed():
    again = world.populations(world.make_world())
    for name, population in ASKED.items():
        np.testing.assert_array_equal(population.tokens, again[name].tokens, strict=True)
    rows = [world.chapter(WORLD, 1, 3, 2, 4, 64) for _ in range(2)]
    np.testing.assert_array_equal(*rows, strict=True)
    assert (rows[0] != world.chapter(WORLD, 2, 3, 2, 4, 64)).any()
    assert (rows[0] != world.chapter(WORLD, 1, 4, 2, 4, 64)).any()


def test_each_row_is_labelled_with_its_next_tokens():
    rows = world.chapter(WORLD, 1, 0, 2, 4, 64)
    np.testing.assert_array_equal(rows[0, 1:, 0], rows[0, :-1, -1])
    np.testing.assert_array_equal(rows[1, 0, 0], rows[0, -1, -1])


@pytest.mark.parametrize("skill", ["open_book", "addition", "boolean", "copying"])
def test_no_question_is_in_two_splits_or_in_training(skill):
    dev, test = (prompts(ASKED[f"{skill}_{split}"]) for split in ("dev", "test"))
    assert min(len(dev), len(test)) >= world.QUESTIONS
    assert not dev & test
    stream = world.items(WORLD, world.generator(world.Purpose.TRAINING, 1))
    trained = [(world.EOS, *next(stream)) for _ in range(20_000)]
    asked = dev | test
    lengths = {len(prompt) for prompt in asked}
    assert not [t for t in trained if any(t[:n] in asked for n in lengths)]


def spelled(population):
    """The words of each prompt and those of its answer."""
    for row, begin, end in zip(
        population.tokens, population.prompt_length, population.length, strict=True
    ):
        words = [world.TOKEN_NAMES[t] for t in row[:end]]
        yield words[1:begin], words[begin:]


def worth(node, known):
    """The value of an expression as Python parses and evaluates it."""
    return eval(compile(ast.Expression(node), "question", "eval"), {}, known)


def brackets(node):
    """The bracketed parts with the `not` before them, innermost first."""
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    if not isinstance(inner, ast.BoolOp):
        return []
    return [*itertools.chain(*map(brackets, inner.values)), node]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_answers_are_right(split):
    for (a1, a2, _plus, b1, b2, _equals), (units, tens) in spelled(ASKED[f"addition_{split}"]):
        assert int(a1 + a2) + int(b1 + b2) == int(tens + units)
    for prompt, answer in spelled(ASKED[f"boolean_{split}"]):
        tree = ast.parse(" ".join(prompt[:-1]), mode="eval").body
        known = {"true": True, "false": False}
        assert [worth(step, known) for step in brackets(tree)] == [known[word] for word in answer]
    for prompt, (answer,) in spelled(ASKED[f"open_book_{split}"]):
        assert answer == prompt[prompt.index(prompt[-1]) + 1]
    for prompt, answer in spelled(ASKED[f"copying_{split}"]):
        assert answer == prompt[1:-1]


def test_muon_makes_singular_values_nearly_one():
    G = np.random.default_rng(0).standard_normal((48, 16))
    values = np.linalg.svd(orthogonalise(G), compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_resumed_training_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "populations", lambda _world: {})
    monkeypatch.setattr(train, "CHAPTER_STEPS", 2)
    tiny = replace(
        train.Recipe(), steps=5, batch=2, sequence=16, width=8, layers=1, heads=2, mlp_width=12
    )
    straight = train.train(tiny, tmp_path / "straight.npz", every=5)
    train.train(tiny, tmp_path / "killed.npz", every=5, until=3)
    resumed = train.train(tiny, tmp_path / "killed.npz", every=5)
    assert resumed.step == straight.step == 5
    for name, array in straight.parameters.items():
        np.testing.assert_array_equal(array, resumed.parameters[name], strict=True)
    model = trained(tiny.config(), load(tmp_path / "killed.npz")[1])
    assert list(model.parameters) == list(tiny.config().parameter_shapes())
