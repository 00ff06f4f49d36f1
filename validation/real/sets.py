"""Tasks for real models, made from facts that anyone knows, and from a seed.

    python -m validation.real.sets FOLDER

Writes NAME.jsonl for every set, its first line a preamble with shots, and `populations`, the words
that tell `refcurv corpus` of all of them. Each item is of split dev (a third) or test. Items about
one country are all of one split. No item is a shot. Made twice, the files are the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random

Item = dict[str, str]
Set = tuple[Item | dict[str, object], list[Item]]
"""What the first line holds, and the items."""

COUNT = 300
"""Items of a set that could have any number. Chosen: 200 to report, 100 to tune on."""

COUNTRIES = Path(__file__).parent / "countries.txt"
NAMES = ("Anna", "Ben", "Carl", "Diana", "Emma", "Frank", "Grace", "Henry", "Jack", "Kate",
         "Laura", "Mike", "Nora", "Oscar", "Paul", "Rose", "Sam", "Tom")  # fmt: skip
THINGS = ("apple", "ball", "book", "box", "car", "chair", "clock", "coat", "cup", "door", "fish",
          "flower", "garden", "hat", "horse", "house", "key", "lamp", "letter", "moon", "paper",
          "river", "road", "ship", "shoe", "stone", "table", "tree", "wall", "window")  # fmt: skip
CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Tokyo", "Boston", "Chicago", "Dublin",
          "Vienna", "Moscow", "Cairo", "Sydney", "Delhi", "Athens", "Oslo")  # fmt: skip
WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen twenty").split()  # fmt: skip


def item(prompt: str, answer: str, group: str = "") -> Item:
    """An item whose answer is a word behind a blank; `group` decides its split."""
    return {"prompt": prompt, "answer": f" {answer}", "group": group}


# ------------------------------------------------------------------ closed book


def tiers() -> dict[str, list[list[str]]]:
    """The countries of `countries.txt` by tier, each with its four fields."""
    found: dict[str, list[list[str]]] = {}
    for line in COUNTRIES.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            rows.append(line.split("|"))
    return found


def facts(fields: list[str]) -> Iterator[Item]:
    """What is asked about one country."""
    country, capital, continent, people = fields
    start = country[0].upper() + country[1:]
    if capital != "-":
        yield item(f"The capital of {country} is", capital, country)
        yield item(f"{capital} is the capital of", country, country)
    if continent != "-":
        yield item(f"The continent of {country} is", continent, country)
    if people != "-":
        yield item(f"{start} is the country of people who are", people, country)


def of_tier(tier: str) -> Callable[[Random], Set]:
    """The facts about the countries of one tier."""

    def made(_: Random) -> Set:
        known = (["Scotland", "Edinburgh", "Europe", "Scottish"],
                 ["Taiwan", "Taipei", "Asia", "Taiwanese"])  # fmt: skip
        shots = [one for fields in known for one in facts(fields)]
        return header("", shots), [one for row in tiers()[tier] for one in facts(row)]

    return made


# ------------------------------------------------------------------ open book


def one_person(draw: Random) -> Set:
    """Two things are told about a person, one is asked."""

    def asked() -> Item:
        who, what, where = draw.choice(NAMES), draw.choice(THINGS), draw.choice(CITIES)
        ask, answer = draw.choice([("Where does {} live?", where), ("What does {} have?", what)])
        told = draw.choice(["{0} lives in {1}. {0} has a {2}.", "{0} has a {2}. {0} lives in {1}."])
        text = told.format(who, where, what) + f" Question: {ask.format(who)} Answer:"
        return item(text, answer)

    return several(asked, 4)


def two_persons(draw: Random) -> Set:
    """Of one person it is told where they live, of the other what they have; one is asked."""

    def asked() -> Item:
        lives, has = draw.sample(NAMES, 2)
        where, what = draw.choice(CITIES), draw.choice(THINGS)
        told = draw.sample([f"{lives} lives in {where}.", f"{has} has a {what}."], 2)
        ask, answer = draw.choice(
            [(f"Where does {lives} live?", where), (f"What does {has} have?", what)]
        )
        return item(f"{' '.join(told)} Question: {ask} Answer:", answer)

    return several(asked, 4)


# ------------------------------------------------------------------ arithmetic


def addition(draw: Random) -> Set:
    """Sums in digits, the second summand below ten."""
    every = [item(f"{a} + {b} =", str(a + b)) for a, b in product(range(1, 31), range(1, 11))]
    return drawn(draw, every, 8)


def addition_in_words(draw: Random) -> Set:
    """Sums in words, up to twenty."""
    pairs = [(a, b) for a, b in product(range(21), repeat=2) if a + b <= 20]
    every = [item(f"{WORDS[a]} plus {WORDS[b]} is", WORDS[a + b]) for a, b in pairs]
    return drawn(draw, every, 8)


# ------------------------------------------------------------------ logic, copying, order


def logic(draw: Random) -> Set:
    """True and False, joined by two of and, or, not; as many items are true as false."""
    every: dict[bool, list[Item]] = {True: [], False: []}
    values = (True, False)
    for a, b, c in product(values, repeat=3):
        for x, y in product(("and", "or"), repeat=2):
            for m, n in product(("", "not "), repeat=2):
                for text in (f"{m}{a} {x} ({n}{b} {y} {c})", f"({m}{a} {x} {n}{b}) {y} {c}"):
                    right = bool(eval(text))
                    every[right].append(item(f"{text} is", str(right)))
    few = min(len(some) for some in every.values())
    return drawn(draw, [one for some in every.values() for one in draw.sample(some, few)], 8)


def copying(draw: Random) -> Set:
    """Five words, and the same again."""

    def asked() -> Item:
        words = " ".join(draw.sample(THINGS, 5))
        return item(f"{words} ->", words)

    return several(asked, 4)


def ordering(draw: Random) -> Set:
    """Three digits, from the smallest to the largest."""

    def asked() -> Item:
        digits = draw.sample(range(10), 3)
        text, answer = (" ".join(map(str, some)) for some in (digits, sorted(digits)))
        return item(f"{text} ->", answer)

    return several(asked, 8)


# ------------------------------------------------------------------ files


def several(asked: Callable[[], Item], shots: int) -> Set:
    """Shots, and COUNT items, all different."""
    found: dict[str, Item] = {}
    while len(found) < COUNT + shots:
        one = asked()
        found.setdefault(one["prompt"], one)
    every = list(found.values())
    return header("", every[:shots]), every[shots:]


def drawn(draw: Random, every: list[Item], shots: int) -> Set:
    """Shots, and at most COUNT items, of all that there are."""
    some = draw.sample(every, min(len(every), COUNT + shots))
    return header("", some[:shots]), some[shots:]


def header(preamble: str, shots: list[Item]) -> dict[str, object]:
    """The first line of a file."""
    kept = [{key: one[key] for key in ("prompt", "answer")} for one in shots]
    return {"preamble": preamble, "shots": kept}


SETS: dict[str, tuple[Callable[[Random], Set], float]] = {
    "facts_frequent": (of_tier("frequent"), 0),
    "facts_middle": (of_tier("middle"), 0),
    "facts_rare": (of_tier("rare"), 0),
    "open_book_one": (one_person, 0),
    "open_book_two": (two_persons, 0),
    "addition": (addition, 0),
    "addition_words": (addition_in_words, 0),
    "logic": (logic, 0.5),
    "copying": (copying, 0),
    "ordering": (ordering, 0),
}
"""How each set is made, and what guessing gets."""


def made(name: str) -> Set:
    """A set: its first line, and its items with their splits."""
    draw = Random(f"refcurv {name}")
    first, items = SETS[name][0](draw)
    groups = list(dict.fromkeys(one["group"] or one["prompt"] for one in items))
    draw.shuffle(groups)
    dev = set(groups[: len(groups) // 3])
    return first, [
        {"prompt": one["prompt"], "answer": one["answer"],
         "split": "dev" if (one["group"] or one["prompt"]) in dev else "test"}
        for one in items
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    """Write every set."""
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    words = []
    for name, (_, chance) in SETS.items():
        first, items = made(name)
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in (first, *items)]
        path.write_text("".join(lines), encoding="utf-8")
        words += [
            f"--population {name}_{to}:answer:{to}:{chance:g}={path}" for to in ("dev", "test")
        ]
        print(f"{name}: {len(items)} items")
    (folder / "populations").write_text("\n".join(words) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
