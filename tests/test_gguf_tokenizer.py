"""files/gguf/tokenizer.py: the ids of the tokenizer that the file was made from."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

gguf = pytest.importorskip("gguf", reason="extra `gguf`")

from gguf_twins import KEYS, write  # noqa: E402

from refcurv.files.disk import file_sha256  # noqa: E402
from refcurv.files.texts import build_corpus  # noqa: E402
from refcurv.files.tokenizer import load_tokenizer  # noqa: E402
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError  # noqa: E402

LEARNT = [
    "the cat sat on the mat, the dog sat on the log",
    "aaaa aaa aa a bab abba 111 1234 12 345 6789",
    "élan vital, naïve café 🐈 🐶🐈, ünïcödé",
    "We'll see what they've done; I'm sure it's THEY'RE",
] * 3
ALPHABET = "abcdeth 12345678,.'! \t\n\r  é🐈漢ß\u0301\u00a0\u200d<|en>/_"
Plain = dict[str, Any]


def hard_texts(count: int) -> list[str]:
    draw = random.Random(4)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 30))) for _ in range(count)]
    words = ["".join(draw.sample([*LEARNT[0].split(), "  ", "<|end|>", "\n\n", "  12"], 5))
             for _ in range(count)]  # fmt: skip
    return [*texts, *words, *LEARNT, "", " ", "  x", "<|end|>", " <|end|> x"]


# ------------------------------------------------------------------ two of the library's own


def gpt2_like(cuts: list[Any]) -> Any:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *cuts,
            pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=not len(cuts) or cuts[0] is DIGITS
            ),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LEARNT, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, show_progress=False,
        special_tokens=["<|begin|>", "<|end|>"]))  # fmt: skip
    return made


DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "isolated",
)
CUTS: dict[str, list[Any]] = {"gpt-2": [], "smollm": [DIGITS], "dbrx": [LLAMA3]}


@cache
def byte_level(pre: str) -> tuple[Any, Plain]:
    """A tokenizer, and the keys of the GGUF file that describe it."""
    made = gpt2_like(CUTS[pre])
    merges = json.loads(made.to_str())["model"]["merges"]
    vocabulary = made.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    return made, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@cache
def pieces(prefix: bool) -> tuple[Any, Plain]:
    """SentencePiece's BPE as the library has it, and its keys: a score is minus the rank."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=[*special, *bytes_]
    )
    made.train_from_iterator(LEARNT, trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [  # Phi-3's take the space behind them along
        one | {"rstrip": one["content"] in special[2:]}
        for one in data["added_tokens"] if one["content"] in special[1:]
    ]  # fmt: skip
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    vocabulary = made.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    rank = {"".join(merge): k for k, merge in reversed([*enumerate(data["model"]["merges"])])}
    scores = [-float(rank.get(token, 1000)) for token in tokens]
    return made, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * 256 + [1] * (len(tokens) - 260),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


MADE: dict[str, Callable[[], tuple[Any, Plain]]] = {
    **{pre: lambda pre=pre: byte_level(pre) for pre in CUTS},  # type: ignore[misc]
    "pieces": lambda: pieces(True),
    "pieces-bare": lambda: pieces(False),
}


def described(folder: Path, plain: Plain, architecture: str = "llama") -> Path:
    return write(folder / "t.gguf", architecture, KEYS, {"x": np.zeros(1, np.float32)}, plain)


@pytest.mark.parametrize("kind", MADE)
def test_ids_are_those_of_the_tokenizer_that_was_written(tmp_path: Path, kind: str) -> None:
    theirs, plain = MADE[kind]()
    # with a prefix of its own per stretch of text, as Phi-3 has it
    ours = load_tokenizer(described(tmp_path, plain, "phi3"), None)
    texts = hard_texts(150)
    for text, a, b in zip(
        texts,
        ours.library.encode_batch(texts, add_special_tokens=False),
        theirs.encode_batch(texts, add_special_tokens=False),
        strict=True,
    ):
        assert a.ids == b.ids, repr(text)
    assert ours.vocabulary == theirs.get_vocab_size()
    assert ours.before == ((1,) if kind.startswith("pieces") else ()) and ours.behind == ()


def test_a_word_behind_a_special_token_has_no_space_of_its_own(tmp_path: Path) -> None:
    """What a file does not say, and `gguf_tokenizer` assumes; Phi-3 is known to be otherwise."""
    _, plain = pieces(True)
    for architecture, bare, spaced in (("llama", "the", "▁the"), ("phi3", "▁the", "▁the")):
        ours = load_tokenizer(described(tmp_path, plain, architecture), None).library
        lines = "▁the" if architecture == "phi3" else "<0x0A>▁<0x0A>the"
        for behind, want in (("the", bare), (" the", spaced), ("\n \nthe", lines)):
            ids = ours.encode(f"the<|end|>{behind}", add_special_tokens=False).ids
            told = [ours.id_to_token(i) for i in ids]
            at = told.index("<|end|>")
            assert "".join(told[:at]) == "▁the" and "".join(told[at + 1 :]) == want


@pytest.mark.parametrize(
    ("pre", "architecture", "composed"),
    [("qwen2", "qwen2", True), ("olmo", "olmo", True), ("gpt-2", "gptneox", True),
     ("gpt-2", "gpt2", False), ("llama-bpe", "llama", False), ("smollm", "llama", False)],
)  # fmt: skip
def test_letters_are_composed_where_the_tokenizer_that_was_written_did(
    tmp_path: Path, pre: str, architecture: str, composed: bool
) -> None:
    """A text and its composed form (NFC) have the same ids, which a file does not say."""
    made, plain = byte_level("gpt-2")
    path = described(tmp_path, plain | {f"{_KEY}pre": pre}, architecture)
    ours, same = load_tokenizer(path, None).library, 0
    theirs = tokenizers.Tokenizer.from_str(made.to_str())
    if composed:
        theirs.normalizer = normalizers.NFC()
    texts = [*hard_texts(150), "cafe\u0301 \u1100\u1161<|end|>e\u0301"]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        whole = ours.encode(unicodedata.normalize("NFC", text), add_special_tokens=False).ids
        same += ids == whole
        if pre in ("olmo", "gpt-2"):
            assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert (same == len(texts)) == composed


@pytest.mark.peers
@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3"])
@pytest.mark.parametrize("kind", ["gpt-2", "dbrx", "pieces"])
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str, architecture: str) -> None:
    """Its conversion of a GGUF file takes the cut of `smollm` for GPT-2's; the others are equal.

    It forgot that Phi-3's special tokens take the space behind them along.
    """
    pytest.importorskip("transformers", reason="extra `peers`")
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    path = described(tmp_path, MADE[kind]()[1] | {"tokenizer.ggml.add_space_prefix": (
        kind == "pieces" and architecture != "gemma")}, architecture)  # fmt: skip
    _, dictionary, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, dictionary)
    ours = load_tokenizer(path, None).library
    texts = hard_texts(150)
    if (kind, architecture) == ("pieces", "phi3"):
        texts = [re.sub(r"(?<=<\|end\|>)\s+", "", text) for text in texts]
    for text in texts:
        ids = [one.encode(text, add_special_tokens=False).ids for one in (ours, theirs)]
        assert ids[0] == ids[1], repr(text)


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    _, plain = MADE["gpt-2"]()
    for more, before, behind in (
        ({}, (), ()),
        ({"add_bos_token": True}, (0,), ()),
        ({"add_bos_token": True, "add_eos_token": True}, (0,), (1,)),
        ({"add_eos_token": True}, (), (1,)),
        ({"pre": "llama-bpe"}, (0,), ()),
        ({"pre": "llama-bpe", "add_bos_token": False}, (), ()),
    ):
        keys = plain | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
        found = load_tokenizer(described(tmp_path, keys), None)
        assert (found.before, found.behind) == (before, behind), more
    for spelled in ("$A", "$B:1", "a:0"):  # with which the library spells a text and its type
        keys = plain | {f"{_KEY}tokens": [spelled, *plain[f"{_KEY}tokens"][1:]]}
        found = load_tokenizer(described(tmp_path, keys | {f"{_KEY}add_bos_token": True}), None)
        assert (found.before, found.behind) == ((0,), ())


@pytest.mark.parametrize("kind", ["gpt-2", "pieces"])
def test_tokens_that_a_user_defined_stay_whole(tmp_path: Path, kind: str) -> None:
    """They are of a type of their own, and no merges lead to them."""
    _, plain = MADE[kind]()
    tokens, types = plain[f"{_KEY}tokens"][:-1], plain[f"{_KEY}token_type"][:-1]
    keys = plain | {f"{_KEY}tokens": [*tokens, "<think>"], f"{_KEY}token_type": [*types, 4]}
    merges = [one for one in plain.get(f"{_KEY}merges", []) if one.replace(" ", "") in tokens]
    ours = load_tokenizer(described(tmp_path, keys | {f"{_KEY}merges": merges}), None).library
    assert ours.encode("the<think> cat", add_special_tokens=False).tokens.count("<think>") == 1


def test_a_file_that_does_not_say_how_texts_are_cut_is_refused(tmp_path: Path) -> None:
    """As converters of early 2024 left them: GPT-2's cut would give other ids in silence."""
    plain = {key: value for key, value in MADE["dbrx"]()[1].items() if key != f"{_KEY}pre"}
    with pytest.raises(ConventionError, match=r"tokenizer\.ggml\.pre is None, which is not built"):
        load_tokenizer(described(tmp_path, plain), None)


def test_a_corpus_of_a_gguf_files_tokenizer(tmp_path: Path) -> None:
    theirs, plain = MADE["smollm"]()
    (tmp_path / "a.txt").write_text(LEARNT[0])
    made = build_corpus([tmp_path / "a.txt"], described(tmp_path, plain), length=64)
    ids = theirs.encode(LEARNT[0], add_special_tokens=False).ids
    assert made.tokens[0, : len(ids)].tolist() == ids
    assert made.source["made_from"]["tokenizer"]["file"] == "t.gguf"


def test_the_tokenizer_of_a_split_file_is_its_first_parts(tmp_path: Path) -> None:
    """The metadata are there, so that is the file which the corpus names, whichever is given."""
    _, plain = MADE["smollm"]()
    split = {"split.count": 2, "split.tensors.count": 2}
    parts = [tmp_path / f"x-0000{k + 1}-of-00002.gguf" for k in (0, 1)]
    for k, path in enumerate(parts):
        keys = {"split.no": k, **split, **(plain if k == 0 else {})}
        write(path, "llama", KEYS, {f"x{k}": np.zeros(1, np.float32)}, keys)
    (tmp_path / "a.txt").write_text(LEARNT[0])
    for path in parts:
        made = build_corpus([tmp_path / "a.txt"], path, length=64).source["made_from"]
        assert made["inputs"][parts[0].name] == file_sha256(parts[0]) and len(made["inputs"]) == 2


_KEY = "tokenizer.ggml."
WRONG: dict[str, tuple[str, Plain, str, type[RefcurvError]]] = {
    "a kind": ("gpt-2", {"model": "t5"}, "tokenizer.ggml.model is 't5'", ConventionError),
    "a cut": ("gpt-2", {"pre": "poro"}, "tokenizer.ggml.pre is 'poro'", ConventionError),
    "twice": ("gpt-2", {"tokens": ["a", "a"]}, "has the token 'a' twice", ConventionError),
    "types": ("gpt-2", {"token_type": [1, 3]}, "token_type has 2 items for", SchemaError),
    "a merge": ("gpt-2", {"merges": ["a b c"]}, "a merge of other than two tokens", SchemaError),
    "no merge": ("gpt-2", {"merges": ["a ☃"]}, "cannot use", SchemaError),
    "a flag": ("gpt-2", {"add_bos_token": "no"}, "is 'no', not true or false", SchemaError),
    "begin": ("gpt-2", {"add_bos_token": True, "bos_token_id": 9999}, "is 9999", SchemaError),
    "scores": ("pieces", {"scores": [0.0]}, "scores has 1 item for", SchemaError),
    "no scores": ("pieces", {"scores": [float("nan")] * 330}, "hold NaN or inf", SchemaError),
    "a long token": (
        "pieces",
        {"tokens": ["a" * 5000, *map(str, range(329))]},
        "a token of 5000 letters",
        SchemaError,
    ),
    "numbers": ("pieces", {"tokens": [1, 2]}, "has no list tokenizer.ggml.tokens", SchemaError),
    "no bytes": ("pieces", {"tokens": ["a"], "scores": [0.0]}, "of the 256 bytes", ConventionError),
    "a map": ("pieces", {"precompiled_charsmap": [1]}, "charsmap is not built", ConventionError),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tokenizer_that_is_not_built(tmp_path: Path, what: str) -> None:
    kind, change, message, error = WRONG[what]
    plain = MADE[kind]()[1] | {_KEY + key: value for key, value in change.items()}
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(described(tmp_path, plain), None)
    assert "\n" not in str(caught.value)
