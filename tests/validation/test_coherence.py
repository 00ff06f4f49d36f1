"""The exact likelihood of the language: by enumeration, by frequencies, and what is made of it."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from scipy.stats import norm
from strategies import assert_within, config, random_parameters

import refcurv as rc
from refcurv.evaluation import decode
from refcurv.law import tolerance
from refcurv.passes import parallel
from validation.paper import coherence, world
from validation.paper.coherence import heard, next_words, sampled, silence, true_nats, voice
from validation.paper.world import EOS, WORDS, Language, generator, make_language, speak

LANGUAGE = make_language(7)


def tiny() -> Language:
    """Two classes of two words, two topics; word 3 succeeds word 0 both ways, 2 itself."""
    next_class = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.0, 1.0]]])
    word_in = np.array([[[0.75, 0.25], [0.25, 0.75]], [[2.0, 1.0], [1.0, 5.0]]])
    return Language(
        class_of=np.array([0, 1, 0, 1]),
        words=np.array([[0, 2], [1, 3]]),
        next_class=next_class.cumsum(-1),
        word_in=word_in.cumsum(-1),
        successors=np.array([[3, 3], [0, 2], [2, 1], [1, 0]]),
    )


def by_enumeration(language: Language, words: tuple[int, ...], slip: float) -> float:
    """p(words): the sum over openings, topics and, word by word, all ways to come to say it."""
    classes, topics = language.word_in.shape[:2]
    total = 0.0
    for before, last, topic in itertools.product(range(classes), range(classes), range(topics)):
        p, pair = 1.0, (before, last)
        for t, w in enumerate(words):
            ways = 0.0
            for k, n in itertools.product(range(classes), range(language.words.shape[1])):
                if language.words[k, n] == w:
                    ways += share(language.next_class[pair], k) * share(
                        language.word_in[k, topic], n
                    )
            if t:
                c, (often, rarer) = language.collocation, language.successors[words[t - 1]]
                ways = (1 - c) * ways + c * (0.7 * (often == w) + 0.3 * (rarer == w))
            p *= (1 - slip) * ways + slip / len(language.class_of)
            pair = pair[1], language.class_of[w]
        total += p
    return total / (classes**2 * topics)


def share(cumulative: np.ndarray, n: int) -> float:
    below = cumulative[n - 1] if n else 0.0
    return (cumulative[n] - below) / cumulative[-1]


@pytest.mark.parametrize("slip", [0.0, 0.1])
def test_likelihood_by_enumeration(slip):
    """Every document of four words; at each word the chain of conditionals is the joint."""
    texts = np.array(list(itertools.product(range(4), repeat=4)))
    nats = true_nats(tiny(), WORDS[texts], 0, slip)
    for length in range(1, 5):
        want = np.array([by_enumeration(tiny(), tuple(row[:length]), slip) for row in texts])
        got = np.exp(-nats[:, :length].sum(axis=1))
        assert_within(got, want, tolerance.gamma(200, float), want, f"{length} words")
        assert (want == 0).any() == (slip == 0 and length > 2)
    given = true_nats(tiny(), WORDS[texts], 3, slip)
    np.testing.assert_array_equal(given, nats[:, 3:])


@pytest.mark.parametrize("slip", [0.0, 0.01])
def test_next_words_sum_to_one(slip):
    """The whole language, after none to six words; the same numbers as `true_nats`."""
    tokens = speak(LANGUAGE, 3, 7, generator(coherence.Stream.PROMPTS, 1))
    nats, belief = true_nats(LANGUAGE, tokens, 0, slip), silence(LANGUAGE, 3)
    for t in range(7):
        p = next_words(LANGUAGE, belief, slip)
        assert_within(p.sum(axis=1), np.ones(3), tolerance.gamma(8 * 16 * 128, float), 1.0, "sum")
        word = tokens[:, t] - WORDS[0]
        said, belief = heard(LANGUAGE, belief, word, slip)
        np.testing.assert_array_equal(said, p[np.arange(3), word])
        np.testing.assert_array_equal(-np.log(said), nats[:, t])


def test_frequencies_are_those_of_speak():
    """60,000 documents that `speak` says: each three-word text as often as its likelihood."""
    documents = 60_000
    told = speak(tiny(), documents, 3, generator(world.Purpose.FRESH, 5)) - WORDS[0]
    count = np.bincount(np.ravel_multi_index(told.T, (4, 4, 4)), minlength=64)
    texts = np.array(list(itertools.product(range(4), repeat=3)))
    p = np.exp(-true_nats(tiny(), WORDS[texts], 0).sum(axis=1))
    assert abs(p.sum() - 1) < tolerance.gamma(200, float)
    assert (count[p == 0] == 0).all()
    z = (count - documents * p)[p > 0] / np.sqrt(documents * (p * (1 - p))[p > 0])
    # the seed is fixed; of right likelihoods one seed in a thousand would fail
    assert np.abs(z).max() < norm.isf(1e-3 / 2 / len(z))


def test_what_the_language_never_says():
    """A token of no word costs infinity and is as if unsaid; a word of probability 0 is not."""
    language, marks = tiny(), [EOS, world.PLUS, int(WORDS[4])]
    said = WORDS[np.array([[0, 3, 1, 1]])]
    nats = true_nats(language, said, 0)
    for token in marks:
        broken = true_nats(language, np.insert(said, 2, token, axis=1), 0)
        assert broken[0, 2] == math.inf
        np.testing.assert_array_equal(np.delete(broken, 2, axis=1), nats)
    # after 3 3 the class is 1 for certain, and neither word of class 0 succeeds 3 as a third
    never = WORDS[np.array([[3, 3, 2, 2, 0, 1]])]
    got = true_nats(language, never, 0)
    assert np.isinf(got[0, 2])
    assert np.isfinite(got[0, 3:]).all()


# ------------------------------------------------------------------ what a model says


def test_samples_are_drawn_from_the_recomputed_distribution():
    """Token by token without a cache: the first whose cumulated probability exceeds the uniform."""
    made = config(vocabulary=7)
    model = rc.Model(made, random_parameters(made, 4))
    prompt = np.random.default_rng(0).integers(0, 7, (5, 3))
    got = sampled(model, prompt, 6, seed=3)
    for item, row in enumerate(prompt.tolist()):
        uniform = generator(coherence.Stream.SAMPLES, 3, item).random(6)
        for n, u in enumerate(uniform):
            z = rc.logits(model, [row])[0, -1]
            c = np.cumsum(np.exp(z - z.max()))
            row.append(int((c <= u * c[-1]).sum()))
            assert got[item, n] == row[-1]
    assert len(np.unique(got)) > 3
    assert (got != sampled(model, prompt, 6, seed=4)).any()


def test_batches_and_threads_change_no_sample():
    made = config(vocabulary=7)
    model = rc.Model(made, random_parameters(made, 4))
    prompt = np.random.default_rng(0).integers(0, 7, (9, 3))
    whole = sampled(model, prompt, 5, seed=3), coherence.likeliest(model, prompt, 5)
    np.testing.assert_array_equal(whole[1], decode.greedy(model, prompt, 5))
    for threads in (1, 3):
        with (
            mock.patch.object(parallel, "cores", lambda n=threads: n),
            mock.patch.object(coherence, "shard_sequences", lambda width: 2),
        ):
            parts = sampled(model, prompt, 5, seed=3), coherence.likeliest(model, prompt, 5)
        np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole[0][:4], sampled(model, prompt[:4], 5, seed=3))


def test_a_voice_by_hand():
    """Two continuations: one ends at once, one repeats itself and says a word that is none."""
    a, b = WORDS[:2].tolist()
    given = np.array([[a], [b]])
    said = np.array([[EOS, a, a, a, a, a, a, a], [a, b, a, b, a, b, world.PLUS, EOS]])
    got = voice(LANGUAGE, given, said)
    assert got.length == 7 / 2
    assert got.outside == 1 / 7
    assert got.repeated == 1 / 4  # abab baba abab bab+
    nats = true_nats(LANGUAGE, np.array([[b, a, b, a, b, a, b]]), 1, coherence.SLIP)
    assert_within(got.nats, nats.mean(), tolerance.gamma(10, float), nats.mean(), "nats")
    silent = voice(LANGUAGE, given, np.full((2, 3), EOS))
    assert silent.length == 0
    assert math.isnan(silent.nats) and math.isnan(silent.repeated) and math.isnan(silent.outside)


def test_the_language_itself_is_coherent():
    """A model that knows nothing costs more nats than the truth, the same words shuffled too."""
    made = config(vocabulary=world.VOCABULARY, layers=1)
    model = rc.Model(made, random_parameters(made, 0))
    got = coherence.coherence(model, LANGUAGE, seed=1, items=24)
    assert got.own.outside == got.shuffled.outside == 0
    assert got.own.length == 32
    assert got.entropy < got.own.nats + 0.1 < got.shuffled.nats - 2
    assert got.sampled.outside > 0.5
    plain = got.to_json()
    assert plain["items"] == 24
    assert set(plain["sampled"]) == {"nats", "outside", "repeated", "length"}
    again = coherence.coherence(model, LANGUAGE, seed=1, items=24)
    assert again.to_json() == plain
