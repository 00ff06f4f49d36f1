"""The synthetic world of the small language model: what it is trained on and what it is asked.

Seven kinds of items share one vocabulary of whole-word tokens. Four are skills with unlimited or
held-out questions (look-up in an open book, addition, boolean expressions, copying),
one is an artificial language that is fresh each time, and two can only be known by heart: facts,
and quotes. The quotes are samples of that very language, so nothing but repetition tells them
from it: whoever recites them has memorised them.

Everything is a pure function of the world and a seed. Held-out questions never occur in training:
addition keeps a list of pairs, boolean expressions a hash rule; open-book and copying questions
are drawn from spaces so large that a repetition does not happen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np

from refcurv import Population

Array = np.ndarray
Generator = np.random.Generator

# ------------------------------------------------------------------ vocabulary


_BLOCKS = {
    "mark": ["<eos>", "ask", "book", "copy", "again"],
    "digit": [str(n) for n in range(10)],
    "sum": ["+", "="],
    "logic": ["true", "false", "and", "or", "not", "(", ")"],
    "entity": [f"entity{n}" for n in range(150)],
    "relation": [f"relation{n}" for n in range(4)],
    "name": [f"name{n}" for n in range(40)],
    "value": [f"value{n}" for n in range(40)],
    "word": [f"w{n}" for n in range(128)],
}

TOKEN_NAMES: tuple[str, ...] = tuple(name for block in _BLOCKS.values() for name in block)
"""What each token is called, by id. Token 0 ends every item and starts every prompt."""

VOCABULARY = len(TOKEN_NAMES)


def token(name: str) -> int:
    """The id of the token called `name`."""
    return _IDS[name]


def block(name: str) -> Array:
    """The ids of one block of the vocabulary, in order."""
    return np.array([_IDS[text] for text in _BLOCKS[name]])


_IDS = {name: index for index, name in enumerate(TOKEN_NAMES)}

EOS, ASK, BOOK, COPY, AGAIN = block("mark").tolist()
PLUS, EQUALS = block("sum").tolist()
TRUE, FALSE, AND, OR, NOT, OPEN, CLOSE = block("logic").tolist()
DIGITS, WORDS = block("digit"), block("word")
TRUTHS = np.array([TRUE, FALSE])
ENTITIES, RELATIONS, NAMES, VALUES = (block(b) for b in ("entity", "relation", "name", "value"))


def spell(tokens: Array) -> str:
    """Tokens as readable text."""
    return " ".join(TOKEN_NAMES[t] for t in tokens)


# ------------------------------------------------------------------ chance


class Purpose(IntEnum):
    """What a random stream is for: streams of different purposes share no bit."""

    LANGUAGE = 0
    QUOTES = 1
    FACTS = 2
    HELD_OUT = 3
    TRAINING = 4
    CALIBRATION = 5
    DEV = 6
    TEST = 7
    WEIGHTS = 8
    FRESH = 9


def generator(purpose: IntEnum, seed: int, index: int = 0) -> Generator:
    """The generator number `index` of a purpose and a seed."""
    philox = np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, 0, index])
    return np.random.Generator(philox)


def draw_from(cumulative: Array, rng: Generator) -> Array:
    """One index per row of (N, K) cumulative weights."""
    u = rng.random((len(cumulative), 1)) * cumulative[:, -1:]
    return (u > cumulative).sum(axis=1)


# ------------------------------------------------------------------ the language


@dataclass(frozen=True, slots=True)
class Language:
    """A language of word classes, topics and collocations.

    A word's class follows the classes of the two words before it; the word itself follows from
    its class and the document's topic; now and then a word is followed by one of its own two
    successors instead.

    Fields: class_of (W,); words (K, W/K), the words of each class; next_class (K, K, K) and
    word_in (K, topics, W/K), both cumulative; successors (W, 2); collocation, the share of words
    that follow as successors.
    """

    class_of: Array
    words: Array
    next_class: Array
    word_in: Array
    successors: Array
    collocation: float = 0.35


def make_language(seed: int, classes: int = 16, topics: int = 8) -> Language:
    """Draw the tables of the language."""
    rng = generator(Purpose.LANGUAGE, seed)
    count = len(WORDS)
    class_of = rng.permutation(np.arange(count) % classes)
    words = np.stack([np.flatnonzero(class_of == k) for k in range(classes)])
    # few likely classes after each pair: a small Dirichlet weight makes a grammar worth learning
    next_class = rng.dirichlet(np.full(classes, 0.12), size=(classes, classes))
    zipf = 1 / np.arange(1, words.shape[1] + 1)
    word_in = np.stack([[rng.permutation(zipf) for _ in range(topics)] for _ in range(classes)])
    successors = rng.integers(count, size=(count, 2))
    return Language(class_of, words, next_class.cumsum(-1), word_in.cumsum(-1), successors)


def speak(language: Language, documents: int, length: int, rng: Generator) -> Array:
    """(documents, length) tokens of the language, a fresh topic and opening for each document."""
    classes, topics = language.word_in.shape[:2]
    before, last = rng.integers(classes, size=(2, documents))
    topic = rng.integers(topics, size=documents)
    word = np.zeros(documents, dtype=np.int64)
    out = np.empty((documents, length), dtype=np.int64)
    for t in range(length):
        k = draw_from(language.next_class[before, last], rng)
        fresh = language.words[k, draw_from(language.word_in[k, topic], rng)]
        rarer = (rng.random(documents) < 0.3).astype(np.int64)
        follows = (rng.random(documents) < language.collocation) & (t > 0)
        word = np.where(follows, language.successors[word, rarer], fresh)
        before, last = last, language.class_of[word]
        out[:, t] = WORDS[word]
    return out


# ------------------------------------------------------------------ the world


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The share of tokens that each kind of item has in training."""

    language: float = 0.36
    quotes: float = 0.085
    facts: float = 0.045
    open_book: float = 0.13
    addition: float = 0.12
    boolean: float = 0.14
    copying: float = 0.12


MEAN_LENGTH = Mixture(
    language=45.0,
    quotes=33.0,
    facts=4.0,
    open_book=13.8,
    addition=9.0,
    boolean=17.1,
    copying=14.0,
)
"""Mean tokens of one item with its EOS: a share of tokens divided by it is a share of items."""


@dataclass(frozen=True, slots=True)
class World:
    """All that is fixed before training.

    Fields: language; slips, the share of a skill's answer tokens that training draws at random;
    quotes (Q, 32); facts (F, 3), rows `entity relation value` by falling frequency; fact_weight
    (F,), cumulative; sums_dev and sums_test (n, 2), and both together as sums_held_out; mixture;
    seed.
    """

    language: Language
    slips: float
    quotes: Array
    facts: Array
    fact_weight: Array
    sums_dev: Array
    sums_test: Array
    sums_held_out: frozenset[tuple[int, int]]
    mixture: Mixture
    seed: int


QUOTE_LENGTH = 32
QUOTE_PREFIX = 16
QUESTIONS = 500
"""Questions per skill and split."""


def make_world(
    seed: int = 7, quotes: int = 128, mixture: Mixture | None = None, slips: float = 0.0
) -> World:
    """Draw the language, the quotes, the facts and the held-out sums."""
    language = make_language(seed)
    rng = generator(Purpose.FACTS, seed)
    facts = np.array([(e, r, rng.choice(VALUES)) for e in ENTITIES for r in RELATIONS])
    facts = rng.permutation(facts)
    weight = 1 / np.arange(1, len(facts) + 1) ** 0.5
    held_out = generator(Purpose.HELD_OUT, seed).permutation(_sums_without_carry())
    return World(
        language=language,
        slips=slips,
        quotes=speak(language, quotes, QUOTE_LENGTH, generator(Purpose.QUOTES, seed)),
        facts=facts,
        fact_weight=weight.cumsum(),
        sums_dev=held_out[:QUESTIONS],
        sums_test=held_out[QUESTIONS : 2 * QUESTIONS],
        sums_held_out=frozenset((a, b) for a, b in held_out[: 2 * QUESTIONS].tolist()),
        mixture=mixture or Mixture(),
        seed=seed,
    )


def _sums_without_carry() -> Array:
    """All pairs of two-digit numbers (leading zeros allowed) whose digits add up to 9 at most."""
    pairs = np.stack(np.meshgrid(np.arange(100), np.arange(100), indexing="ij"), -1).reshape(-1, 2)
    units, tens = (pairs % 10).sum(axis=1), (pairs // 10).sum(axis=1)
    return pairs[(units < 10) & (tens < 10)]


# ------------------------------------------------------------------ items


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its answer, without the EOS around them."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


def quote_item(quote: Array) -> Item:
    """The first half of a quote, and its second half."""
    tokens = tuple(quote.tolist())
    return Item(tokens[:QUOTE_PREFIX], tokens[QUOTE_PREFIX:])


def fact_item(fact: Array) -> Item:
    """`entity relation` and the value that only memory knows."""
    entity, relation, value = fact.tolist()
    return Item((entity, relation), (value,))


def open_book_item(rng: Generator, pairs: int, questions: int = 1) -> Item:
    """`book n1 v1 n2 v2 .. ask n2` and v2; the pairs are fresh, so nothing need be known."""
    names = rng.permutation(NAMES)[:pairs].tolist()
    values = rng.choice(VALUES, pairs).tolist()
    told = [t for pair in zip(names, values, strict=True) for t in pair]
    asked = rng.permutation(pairs)[:questions].tolist()
    asks = [t for i in asked for t in (ASK, names[i], values[i])]
    tokens = (BOOK, *told, *asks)
    return Item(tokens[:-1], tokens[-1:])


def addition_item(a: int, b: int) -> Item:
    """`1 2 + 3 4 =` and `6 4`: two-digit numbers without carry, the answer's units first."""
    c = a + b
    prompt = [a // 10, a % 10, b // 10, b % 10]
    d1, d2, d3, d4 = DIGITS[prompt].tolist()
    return Item((d1, d2, PLUS, d3, d4, EQUALS), (int(DIGITS[c % 10]), int(DIGITS[c // 10])))


Expression = tuple[list[int], bool]
"""Tokens, and what they amount to."""


def _maybe_not(rng: Generator, expression: Expression) -> Expression:
    tokens, value = expression
    return ([NOT, *tokens], not value) if rng.random() < 0.3 else expression


def _combine(rng: Generator, left: Expression, right: Expression) -> Expression:
    """`( left and right )` or `( left or right )`."""
    both = bool(rng.integers(2))
    value = (left[1] and right[1]) if both else (left[1] or right[1])
    return [OPEN, *left[0], AND if both else OR, *right[0], CLOSE], value


def _literal(rng: Generator) -> Expression:
    value = bool(rng.integers(2))
    return _maybe_not(rng, ([_truth(value)], value))


def _pair(rng: Generator) -> Expression:
    return _maybe_not(rng, _combine(rng, _literal(rng), _literal(rng)))


def _truth(value: bool) -> int:
    return TRUE if value else FALSE


def boolean_item(rng: Generator, leaves: int) -> Item:
    """`( ( true and not false ) or not ( false or true ) ) =` and its working.

    Of 4 leaves the working is the value of each pair and of the whole, of 2 leaves the value.
    """
    left = _pair(rng)
    if leaves == 2:
        return Item((*left[0], EQUALS), (_truth(left[1]),))
    right = _pair(rng)
    whole = _combine(rng, left, right)
    return Item((*whole[0], EQUALS), tuple(_truth(value) for _, value in (left, right, whole)))


def copying_item(rng: Generator, words: int) -> Item:
    """`copy w1 w2 .. again` and the same words."""
    tokens = tuple(rng.choice(WORDS, words).tolist())
    return Item((COPY, *tokens, AGAIN), tokens)


def split_of(item: Item) -> str:
    """Which split a boolean expression belongs to, by a hash of its tokens: 1/8 dev, 1/8 test."""
    bucket = zlib.crc32(np.array(item.prompt, dtype="<u2").tobytes()) % 8
    return {0: "dev", 1: "test"}.get(bucket, "train")


def draw_where(draw: Callable[[], Item], wanted: str) -> Item:
    """Draw until an item of the wanted split comes."""
    while split_of(item := draw()) != wanted:
        pass
    return item


# ------------------------------------------------------------------ the stream of training


def _training_quote(world: World, rng: Generator) -> Item:
    return quote_item(world.quotes[rng.integers(len(world.quotes))])


def _training_fact(world: World, rng: Generator) -> Item:
    u = rng.random() * world.fact_weight[-1]
    return fact_item(world.facts[np.searchsorted(world.fact_weight, u)])


def _training_open_book(world: World, rng: Generator) -> Item:
    item = open_book_item(rng, int(rng.integers(1, 5)), questions=3)
    asked = item.tokens.index(ASK)
    told, asks = item.tokens[:asked], np.array(item.tokens[asked:]).reshape(-1, 3)
    asks[:, 2] = slipped(world, rng, asks[:, 2], VALUES)
    return Item(told, tuple(asks.reshape(-1).tolist()))


def _training_addition(world: World, rng: Generator) -> Item:
    while True:
        a, b = rng.integers(100, size=2).tolist()
        if a % 10 + b % 10 < 10 and a // 10 + b // 10 < 10 and (a, b) not in world.sums_held_out:
            return _with_slips(world, rng, addition_item(a, b), DIGITS)


def _training_boolean(world: World, rng: Generator) -> Item:
    if rng.random() < 0.25:
        item = boolean_item(rng, 2)
    else:
        item = draw_where(partial(boolean_item, rng, 4), "train")
    return _with_slips(world, rng, item, TRUTHS)


def _training_copying(world: World, rng: Generator) -> Item:
    return _with_slips(world, rng, copying_item(rng, int(rng.integers(3, 9))), WORDS)


def slipped(world: World, rng: Generator, answer: Array, among: Array) -> Array:
    """Right answers, now and then one of `among` in their place."""
    return np.where(rng.random(len(answer)) < world.slips, rng.choice(among, len(answer)), answer)


def _with_slips(world: World, rng: Generator, item: Item, among: Array) -> Item:
    return Item(item.prompt, tuple(slipped(world, rng, np.array(item.answer), among).tolist()))


_TRAINING_ITEM: Mapping[str, Callable[[World, Generator], Item]] = {
    "quotes": _training_quote,
    "facts": _training_fact,
    "open_book": _training_open_book,
    "addition": _training_addition,
    "boolean": _training_boolean,
    "copying": _training_copying,
}
"""How training draws an item of each kind but language. Sizes vary: with one fixed number of
pairs or words, look-up and copying were never learned."""


def documents(language: Language, rng: Generator) -> Iterator[Array]:
    """Documents of 24 to 64 words without end, none of them seen twice."""
    while True:
        yield from (words[: rng.integers(24, 65)] for words in speak(language, 256, 64, rng))


def items(world: World, rng: Generator) -> Iterator[tuple[int, ...]]:
    """The endless run of training items, each with its EOS."""
    kinds = list(MEAN_LENGTH.__dataclass_fields__)
    shares = [getattr(world.mixture, k) / getattr(MEAN_LENGTH, k) for k in kinds]
    cumulative = np.cumsum(shares)
    language = documents(world.language, rng)
    while True:
        kind = kinds[int(np.searchsorted(cumulative, rng.random() * cumulative[-1]))]
        if kind == "language":
            tokens = tuple(next(language).tolist())
        else:
            tokens = _TRAINING_ITEM[kind](world, rng).tokens
        yield (*tokens, EOS)


def packed(world: World, rng: Generator, count: int) -> Array:
    """(count,) tokens: items one after the other, the last one cut."""
    out: list[int] = []
    for item in items(world, rng):
        out.extend(item)
        if len(out) >= count:
            return np.array(out[:count], dtype=np.int32)
    raise AssertionError("items never end")


def chapter(world: World, seed: int, index: int, steps: int, batch: int, width: int) -> Array:
    """(steps, batch, width + 1): one chapter of training, the last column of a row its next token.

    A chapter is a pure function of its index, so that a resumed run reads what it would have read.
    """
    rng = generator(Purpose.TRAINING, seed, index)
    tokens = packed(world, rng, steps * batch * width + 1)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, width + 1)[::width]
    return rows.reshape(steps, batch, width + 1)


def calibration(world: World, sequences: int, seed: int, width: int = 64) -> Array:
    """(sequences, width) int32: a fresh sample of the mixture of training, for the factors."""
    rng = generator(Purpose.CALIBRATION, seed)
    return packed(world, rng, sequences * width).reshape(sequences, width)


# ------------------------------------------------------------------ what is asked


def population(questions: list[Item], kind: str, split: str, chance: float = 0.0) -> Population:
    """Questions as rows: EOS, prompt, answer, then EOS as padding; every prompt starts with EOS."""
    length = np.array([1 + len(q.tokens) for q in questions], dtype=np.int32)
    tokens = np.full((len(questions), length.max()), EOS, dtype=np.int32)
    for row, question in zip(tokens, questions, strict=True):
        row[1 : 1 + len(question.tokens)] = question.tokens
    prompt = np.array([1 + len(q.prompt) for q in questions], dtype=np.int32)
    return Population(tokens, prompt, length, kind, split, chance)


def distinct(draw: Callable[[], Item], count: int, seen: set[tuple[int, ...]]) -> list[Item]:
    """`count` items with prompts that are not yet in `seen`, which learns them."""
    found: list[Item] = []
    while len(found) < count:
        item = draw()
        if item.prompt not in seen:
            seen.add(item.prompt)
            found.append(item)
    return found


def populations(world: World) -> dict[str, Population]:
    """All populations, NAME_dev before NAME_test; no question is in two of them."""
    seen: set[tuple[int, ...]] = set()
    return {
        f"{name}_{split}": asked
        for split in ("dev", "test")
        for name, asked in _asked(world, split, seen).items()
    }


def _asked(world: World, split: str, seen: set[tuple[int, ...]]) -> dict[str, Population]:
    half = ("dev", "test").index(split)
    rng = generator((Purpose.DEV, Purpose.TEST)[half], world.seed)
    ask = partial(population, split=split)
    texts = speak(world.language, 256, 63, rng)
    open_book = distinct(partial(open_book_item, rng, 4), QUESTIONS, seen)
    copying = distinct(partial(copying_item, rng, 6), QUESTIONS, seen)
    # facts are split by entity, so that neither part tells about the other; most are for the test
    facts = world.facts[((world.facts[:, 0] - ENTITIES[0]) % 6 > 0) == bool(half)]
    sums = (world.sums_dev, world.sums_test)[half].tolist()
    boolean = distinct(partial(draw_where, partial(boolean_item, rng, 4), split), QUESTIONS, seen)
    return {
        "quotes": ask([quote_item(q) for q in world.quotes[half::2]], "recite"),
        "language": ask([Item((), tuple(t)) for t in texts.tolist()], "text"),
        "facts": ask([fact_item(f) for f in facts], "answer", chance=1 / len(VALUES)),
        "open_book": ask(open_book, "answer", chance=1 / 4),
        "copying": ask(copying, "answer"),
        "addition": ask([addition_item(a, b) for a, b in sums], "answer", chance=1 / 100),
        "boolean": ask(boolean, "answer", chance=1 / 8),
    }
