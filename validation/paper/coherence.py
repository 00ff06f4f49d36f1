"""Coherence (Table 7): would a speaker of the language say what the model says?

The paper's page does not define its measure; this one is ours. The synthetic language has an exact
likelihood, so that what a model says can be judged by the truth instead of by another model: the
nats per word that the true speaker would need, beside what the language's own continuations need
(its entropy rate) and the same words in a shuffled order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.evaluation.decode import continued, greedy
from refcurv.law.conventions import shard_sequences
from refcurv.model.sampling import draw_labels
from refcurv.model.transformer import head_logits
from refcurv.model.weights import resident
from refcurv.passes import parallel
from validation.paper.world import EOS, VOCABULARY, WORDS, Language, generator, speak

Array = np.ndarray

# ------------------------------------------------------------------ the truth


@dataclass(frozen=True, slots=True)
class Belief:
    """What a listener who knows the language knows of B documents after some of their words.

    A word's class follows the two classes before it; of those one at most is unknown and matters.
    Before the first word it is the last class of the opening, h, the one before it being summed
    over; after the first word it is the class before last, h again; later none.

    Fields: weight (B, topics, K), p(topic, h | words so far); word (B,), the last word, −1 before
    the first.
    """

    weight: Array
    word: Array


def silence(language: Language, documents: int) -> Belief:
    """Before the first word: every topic and every opening is as likely as any other."""
    classes, topics = language.word_in.shape[:2]
    weight = np.full((documents, topics, classes), 1 / (topics * classes))
    return Belief(weight, np.full(documents, -1))


def likelihood(language: Language, belief: Belief, word_B: Array, slip: float = 0.0) -> Array:
    """(B, topics, K): p(the next word is word_B | topic, h, words so far).

    Definition, of `speak`
        (1 − c) p(class of w | h, last class) p(w | its class, topic) + c p(w succeeds the last)
        c = collocation, 0 for a document's first word; 0.7 and 0.3 for the two successors

    A speaker who slips says, with probability `slip`, any word of the language instead.
    """
    k, first = language.class_of[word_B], belief.word < 0
    next_class = _probability(language.next_class)
    of_class = next_class[:, language.class_of[belief.word], k].T
    of_class = np.where(first[:, None], next_class.mean(axis=0)[:, k].T, of_class)[:, None]
    place = (language.words[k] == word_B[:, None]).argmax(axis=1)
    of_word = _probability(language.word_in)[k, :, place][:, :, None]
    c = np.where(first, 0.0, language.collocation)[:, None, None]
    succeeds = (language.successors[belief.word] == word_B[:, None]) @ np.array([0.7, 0.3])
    said = (1 - c) * of_class * of_word + c * succeeds[:, None, None]
    return (1 - slip) * said + slip / len(language.class_of)


def _probability(cumulative: Array) -> Array:
    """What `draw_from` draws with."""
    return np.diff(cumulative, axis=-1, prepend=0) / cumulative[..., -1:]


def heard(
    language: Language, belief: Belief, word_B: Array, slip: float = 0.0
) -> tuple[Array, Belief]:
    """p(word | words so far), (B,), and the belief after the word, by Bayes.

    A word of probability 0 tells nothing about the topic; the classes follow it all the same.
    """
    joint = belief.weight * likelihood(language, belief, word_B, slip)
    p_B = joint.sum(axis=(1, 2))
    joint = np.where((p_B > 0)[:, None, None], joint, belief.weight)
    joint /= joint.sum(axis=(1, 2), keepdims=True)
    # h is now the class before last: the opening's last one, or that of the word before this
    at_last = language.class_of[belief.word][:, None, None] == np.arange(joint.shape[2])
    known = np.where(at_last, joint.sum(axis=2, keepdims=True), 0.0)
    weight = np.where((belief.word < 0)[:, None, None], joint, known)
    return p_B, Belief(weight, word_B)


def next_words(language: Language, belief: Belief, slip: float = 0.0) -> Array:
    """(B, W): the probability of every next word."""
    each = (np.full(len(belief.word), w) for w in range(len(language.class_of)))
    return np.stack([heard(language, belief, word_B, slip)[0] for word_B in each], axis=1)


def true_nats(language: Language, tokens: Array, prompt_length: int, slip: float = 0.0) -> Array:
    """−log p(word | what precedes it), under the true language, of each word behind the prompt.

    Definition
        The topic (8) and the two classes before the first word are unknown and summed over; all
        else is known. A token that is no word costs infinitely many nats, and what follows is
        judged as if it had not been said.

    Args:
        language: the truth.
        tokens: (N, T) ids of TOKEN_NAMES, documents from their first word on, without an EOS.
        prompt_length: words that are given, 0 <= prompt_length <= T.
        slip: the share of words that the speaker draws from all words alike; 0 is the language.

    Returns:
        (N, T − prompt_length) float64 [nats].

    Cost: N T topics K numbers.
    Source: `world.speak`.
    Proof: tests/validation/test_coherence.py::test_likelihood_by_enumeration;
        ::test_next_words_sum_to_one;
        ::test_frequencies_are_those_of_speak
    """
    word_NT = _word_of(tokens, len(language.class_of))
    belief, p_NT = silence(language, len(tokens)), np.zeros(tokens.shape)
    for t in range(tokens.shape[1]):
        known = np.flatnonzero(word_NT[:, t] >= 0)
        part = Belief(belief.weight[known], belief.word[known])
        p_NT[known, t], part = heard(language, part, word_NT[known, t], slip)
        belief.weight[known], belief.word[known] = part.weight, part.word
    with np.errstate(divide="ignore"):
        return -np.log(p_NT[:, prompt_length:])


def _word_of(tokens: Array, count: int) -> Array:
    """The number of each token among the words, −1 where it is none of the first `count`."""
    number = np.full(VOCABULARY, -1)
    number[WORDS[:count]] = np.arange(count)
    return number[tokens]


# ------------------------------------------------------------------ what the model says


class Stream(IntEnum):
    """What a random stream of this module is for; apart from every `world.Purpose`."""

    PROMPTS = 100
    SAMPLES = 101
    SHUFFLES = 102


def likeliest(model: rc.Model, prompt: Array, steps: int) -> Array:
    """(N, steps): each prompt continued greedily."""
    whole = replace(model, parameters=resident(model))
    return _in_batches(prompt, steps, lambda rows: greedy(whole, prompt[rows], steps))


def sampled(model: rc.Model, prompt: Array, steps: int, seed: int) -> Array:
    """(N, steps): each prompt continued by tokens drawn from the model, at temperature 1.

    Item n has a stream of its own, so that what it draws depends on no other item. A token is
    drawn by the law's rule, SAMPLING, from that stream's next uniform.

    Proof: tests/validation/test_coherence.py
        ::test_samples_are_drawn_from_the_recomputed_distribution
    """
    parameters = resident(model)
    streams = (generator(Stream.SAMPLES, seed, n) for n in range(len(prompt)))
    uniform = np.array([stream.random(steps) for stream in streams])

    def draw(rows: slice) -> Array:
        def choose(n: int, final_BD: Array) -> Array:
            logit_BV = head_logits(model.config, parameters, final_BD)
            return draw_labels(logit_BV, uniform[rows, n])

        return continued("sampled", model.config, parameters, prompt[rows], steps, choose)

    return _in_batches(prompt, steps, draw)


def _in_batches(prompt: Array, steps: int, work: Callable[[slice], Array]) -> Array:
    size = shard_sequences(prompt.shape[1] + steps)
    parts = [slice(begin, begin + size) for begin in range(0, len(prompt), size)]
    return np.concatenate(parallel.run(parts, lambda _, rows: work(rows)))


# ------------------------------------------------------------------ the table

SLIP = 0.01
"""Models say words now and then that the language never would. A listener who allows for one slip
in a hundred words bounds what each of them costs (9.5 nats), so that a mean means something."""

PROMPT, STEPS = 16, 32
"""Words given, and words to go on with."""


@dataclass(frozen=True, slots=True)
class Voice:
    """How one speaker goes on from the prompts, each continuation up to its first EOS.

    Fields: nats, the mean per word under the language with SLIP; outside, the share of tokens that
    are no words; repeated, the share of 4-grams that stand earlier in the same continuation;
    length, mean tokens. What no token was said for is NaN.
    """

    nats: float
    outside: float
    repeated: float
    length: float


@dataclass(frozen=True, slots=True)
class Coherence:
    """The model beside the truth.

    Fields: sampled and greedy, the model; own, the language's own continuation of each prompt;
    shuffled, the words of `own` in a random order; entropy, the mean nats per word of `own` under
    the language itself, without slips; items.
    """

    sampled: Voice
    greedy: Voice
    own: Voice
    shuffled: Voice
    entropy: float
    items: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; NaN becomes null."""
        return {
            name: {key: None if math.isnan(x) else x for key, x in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in asdict(self).items()
        }


def coherence(model: rc.Model, language: Language, seed: int, items: int = 512) -> Coherence:
    """Let a model and the truth go on from the same beginnings, which nobody has seen before.

    Proof: tests/validation/test_coherence.py::test_the_language_itself_is_coherent
    """
    told = speak(language, items, PROMPT + STEPS, generator(Stream.PROMPTS, seed))
    given, own = told[:, :PROMPT], told[:, PROMPT:]
    prompt = np.insert(given, 0, EOS, axis=1)
    order = generator(Stream.SHUFFLES, seed).permuted(np.tile(np.arange(STEPS), (items, 1)), axis=1)
    return Coherence(
        sampled=voice(language, given, sampled(model, prompt, STEPS, seed)),
        greedy=voice(language, given, likeliest(model, prompt, STEPS)),
        own=voice(language, given, own),
        shuffled=voice(language, given, np.take_along_axis(own, order, axis=1)),
        entropy=float(true_nats(language, told, PROMPT).mean()),
        items=items,
    )


def voice(language: Language, given: Array, said: Array) -> Voice:
    """Judge continuations (N, L) of `given` (N, P), each up to its first EOS.

    Proof: tests/validation/test_coherence.py::test_a_voice_by_hand
    """
    before_end = np.logical_and.accumulate(said != EOS, axis=1)
    nats = true_nats(language, np.concatenate([given, said], axis=1), given.shape[1], SLIP)
    words = before_end & np.isfinite(nats)
    rows = [row[:n].tolist() for row, n in zip(said, before_end.sum(axis=1), strict=True)]
    grams = [[tuple(row[i : i + 4]) for i in range(len(row) - 3)] for row in rows]
    total, fresh = sum(map(len, grams)), sum(len(set(one)) for one in grams)
    return Voice(
        nats=_share(nats[words].sum(), words.sum()),
        outside=_share((before_end & ~words).sum(), before_end.sum()),
        repeated=_share(total - fresh, total),
        length=_share(before_end.sum(), len(said)),
    )


def _share(part: float, whole: int) -> float:
    return float(part / whole) if whole else math.nan
