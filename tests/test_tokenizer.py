"""files/encoding.py, tokenizer.py: pairs and long texts have the ids of the whole; the file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from refcurv.files import encoding, tokenizer
from refcurv.files.encoding import PIECE, encode, encode_pairs, in_pieces
from refcurv.files.texts import build_corpus
from refcurv.files.tokenizer import find_tokenizer, load_tokenizer
from refcurv.law.checks import SchemaError

LEARNT = [
    "the cat sat on the mat, the dog sat on the log",
    "aaaa aaa aa a bab abba 111 1234 12 345 6789",
    "élan vital, naïve café 🐈 🐶🐈, ünïcödé",
    "attitude gratitude, l'été ... !!! ----",
] * 3
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|[^\p{N}\p{L}]+"
"""Groups digits by threes from the right, so that it looks ahead to the end of a run."""


def trained(model: Any, trainer: Any, normalizer: Any = None, pre: Any = None) -> Any:
    made = tokenizers.Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    made.train_from_iterator(LEARNT, trainer)
    made.add_special_tokens(["<|endoftext|>", AddedToken("<wide>", lstrip=True, rstrip=True)])
    return made


def bpe(normalizer: Any = None, pre: Any = None, **options: Any) -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if pre is not None else [],
    )  # fmt: skip
    return trained(models.BPE(unk_token="<unk>", **options), trainer, normalizer, pre)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama2() -> Any:
    """Byte fallback, spaces as ▁, one before the text, no words: the first Llamas' conversion."""
    merges = [("▁", "a"), ("a", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("t", "he"),
              ("aa", "aa"), ("▁", "▁"), ("▁▁", "▁▁"), ("▁a", "aa"), ("▁", "aa")]  # fmt: skip
    pieces = ["<unk>", *ALPHABET, "▁", *(f"<0x{byte:02X}>" for byte in range(256)),
              *dict.fromkeys(one + two for one, two in merges)]  # fmt: skip
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges,
                       unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # fmt: skip
    made = tokenizers.Tokenizer(model)
    prepend = normalizers.Prepend("▁")
    made.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "▁")])
    return made


def unigram(pre: Any, normalizer: Any = None) -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return trained(models.Unigram(), trainer, normalizer, pre)


def word_pieces() -> Any:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizers.BertNormalizer(),
                   pre_tokenizers.BertPreTokenizer())  # fmt: skip


METASPACE = pre_tokenizers.Metaspace
BYTES = pre_tokenizers.ByteLevel
KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bpe(pre=BYTES(add_prefix_space=False)),
    "bytes with a space before": lambda: bpe(pre=BYTES(add_prefix_space=True)),
    "bytes of one word": lambda: bpe(pre=BYTES(add_prefix_space=False, use_regex=False)),
    "bytes composed": lambda: bpe(normalizers.NFC(), BYTES(add_prefix_space=False)),
    "bytes decomposed": lambda: bpe(normalizers.NFKD(), BYTES(add_prefix_space=False)),
    "threes from the left": lambda: bpe(pre=split(LLAMA3), ignore_merges=True),
    "threes from the right": lambda: bpe(pre=split(THREES)),
    "llama 2": llama2,
    "metaspace, first": lambda: bpe(pre=METASPACE(prepend_scheme="first", split=False)),
    "metaspace, always": lambda: bpe(pre=METASPACE(prepend_scheme="always")),
    "stripped": lambda: bpe(normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()]),
                            METASPACE()),
    "spaces merged": lambda: bpe(normalizers.Replace(Regex(" {2,}"), "▁"), METASPACE()),
    "unigram": lambda: unigram(METASPACE(), normalizers.NFKC()),
    "unigram of one word": lambda: unigram(METASPACE(split=False)),
    "word pieces": word_pieces,
}  # fmt: skip


@cache
def library(kind: str) -> Any:
    return KINDS[kind]()


# ------------------------------------------------------------------ long texts

PARTS = [
    "a", "ab", "the cat", " ", "  a", "1", "12345 ", "!", "🐶", "🐈 ", "e\u0301", "\u0301", "é",
    "\u1112\u1161\u11ab", "<|endoftext|>", " <wide> ", "\n", "'s", "zq", "x\ty",
]  # fmt: skip
COUNTS = [1, 1, 1, 2, 3, 7, 40, 150, 400]
RUNS = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(COUNTS)), min_size=1, max_size=14)


def whole(kind: str, text: str) -> list[int]:
    return library(kind).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@given(runs=RUNS)
@example(runs=[("a", 900)])
@example(runs=[("1", 1000), (" ", 1)])  # groups of three from a far end
@example(runs=[("9", 400), ("12", 150)])  # groups of three out of step, which tokens do not show
@example(runs=[(" ", 700), ("a", 1), (" ", 700)])
@example(runs=[("ab", 7), ("1", 400), ("12345 ", 400)])  # the best path of a word needs all of it
@example(runs=[("a", 1), ("the cat", 7), ("é", 1), ("1", 400), ("12345 ", 1), ("the cat", 3)])
def test_ids_in_pieces_are_those_of_the_whole(kind: str, runs: list[tuple[str, int]]) -> None:
    """Pieces of 213 letters share some 63, as those of 2**18 share 2**14.

    Of a run of digits by threes, pieces a multiple of three apart see one grouping, others two.
    """
    text = "".join(part * count for part, count in runs)
    want = whole(kind, text)
    for shared in (63, 64):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(encoding, "PIECE", 213)
            patched.setattr(encoding, "OVERLAP", shared)
            assert in_pieces(library(kind), text, lambda at: None).tolist() == want


def test_pieces_are_joined_without_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text longer than three pieces reaches the library where words end."""
    monkeypatch.setattr(encoding, "PIECE", 213)
    monkeypatch.setattr(encoding, "OVERLAP", 63)
    text = "the cat sat on the mat, 12345 dogs 🐶 on the log; " * 200
    for kind in KINDS:
        longest = 0

        class Spy:
            model = library(kind).model

            def encode(self, text: str, add_special_tokens: bool, kind: str = kind) -> Any:
                nonlocal longest
                longest = max(longest, len(text))
                return library(kind).encode(text, add_special_tokens=add_special_tokens)

        heard: list[int] = []
        assert in_pieces(Spy(), text, heard.append).tolist() == whole(kind, text)
        if kind != "unigram of one word":
            assert len(heard) > 10 and heard == sorted(heard)
            assert longest < 3 * 213


# ------------------------------------------------------------------ prefix and suffix


def made(kind: str) -> Any:
    return tokenizer.Tokenizer(library(kind), (), (), 1, {})


def spelled_bytes(kind: str, tokens: list[str]) -> list[int]:
    """How many bytes of the text each token spells; nothing of this uses offsets."""
    if kind != "llama 2":
        return [len(token) for token in tokens]  # a letter for each byte
    sizes = [1 if token[:3] == "<0x" else len(token.replace("▁", " ").encode()) for token in tokens]
    return [sizes[0] - 1, *sizes[1:]]  # the space that is put before


@pytest.mark.parametrize("kind", KINDS)
@given(runs=RUNS.filter(lambda runs: sum(count for _, count in runs) < 60), data=st.data())
def test_a_pair_has_the_ids_of_its_text(
    kind: str, runs: list[tuple[str, int]], data: st.DataObject
) -> None:
    """The ids of prefix + suffix; cut where the bytes of the tokens say, before one of both."""
    text = "".join(part * count for part, count in runs)
    seam = data.draw(st.integers(0, len(text)))
    [(ids, prompt, straddles)] = encode_pairs(made(kind), [(text[:seam], text[seam:])], "here")
    assert ids.tolist() == whole(kind, text)
    assert 0 <= prompt <= len(ids)
    special = any("<" in part for part, _ in runs)
    if kind in ("bytes", "bytes of one word", "threes from the left", "llama 2") and not special:
        sizes = spelled_bytes(kind, library(kind).encode(text, add_special_tokens=False).tokens)
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        before = len(text[:seam].encode())
        assert prompt == (sum(end <= before for end in ends) if seam else 0)
        assert straddles == (sum(sizes[:prompt]) != before)


SEAMS: dict[str, tuple[str, str, str, list[str], bool]] = {
    "a word": ("bytes", "the cat", " sat", ["the", "Ġcat"], False),
    "within a word": ("bytes", "the att", "itude", ["the", "Ġ"], True),
    "a space before": ("bytes", "the cat ", "sat", ["the", "Ġcat"], True),
    "a space put before": ("bytes with a space before", "the", " cat", ["Ġthe"], False),
    "an emoji": ("bytes", "zq🙂", "🙂z", ["z", "q", "ðŁ", "Ļ", "Ĥ"], False),
    "metaspace": ("metaspace, always", "the cat", " sat", ["▁the", "▁cat"], False),
    "metaspace, a space before": ("metaspace, always", "the cat ", "sat", ["▁the", "▁cat"], True),
    "llama 2": ("llama 2", "a", " the", ["▁a"], False),
    "a letter that composes": ("bytes composed", "zqe", "\u0301z", ["z", "q"], True),
    "Hangul that composes": ("bytes composed", "z\u1112\u1161", "\u11ab", ["z"], True),
    "kana that compose": ("stripped", "a\uff76", "\uff9e", ["▁a"], True),
    "a letter that does not": ("bytes", "zq", "\u0301z", ["z", "q"], False),
    "a ligature": ("bytes decomposed", "z\ufb01", "z", ["z", "f", "i"], False),
    "dots of one letter": ("bytes decomposed", "z\u2026", "\u2026z", ["z", ".."], True),
    "an accent that is dropped": ("word pieces", "the e", "\u0301 the", ["the"], True),
    "an added token": ("bytes", "zq<|endof", "text|>q", ["z", "q"], True),
    "an added token that takes spaces": ("bytes", "z ", "<wide>q", ["z"], True),
    "spaces stripped": ("stripped", " the", " cat ", ["▁the"], False),
    "an empty prefix": ("metaspace, always", "", "the", [], False),
    "an empty suffix": ("metaspace, always", "the", "", ["▁the"], False),
}  # fmt: skip


@pytest.mark.parametrize("name", SEAMS)
def test_seams_by_hand(name: str) -> None:
    kind, prefix, suffix, tokens, straddles = SEAMS[name]
    [(ids, prompt, both)] = encode_pairs(made(kind), [(prefix, suffix)], "here")
    assert [library(kind).id_to_token(i) for i in ids[:prompt]] == tokens
    assert both == straddles


def test_offsets_are_not_trimmed(tmp_path: Path) -> None:
    """A post-processor of GPT-2's leaves the space out of a token's offsets, not out of it."""
    saved = tokenizers.Tokenizer.from_str(library("bytes").to_str())
    saved.post_processor = processors.ByteLevel(trim_offsets=True)
    saved.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(tmp_path / "tokenizer.json", None)
    [(_, prompt, straddles)] = encode_pairs(read, [("the cat ", "sat")], "here")
    assert (prompt, straddles) == (2, True)


# ------------------------------------------------------------------ the file and its neighbours


def folder_of(path: Path, **beside: Any) -> Path:
    """A folder with a tokenizer.json of <unk>, <|endoftext|>, <wide>, and other files."""
    library("bytes").save(str(path / "tokenizer.json"))
    for name, content in beside.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def ids_of(folder: Path) -> dict[str, int]:
    return {name: library("bytes").token_to_id(name) for name in ("<unk>", "<|endoftext|>")}


BESIDE: dict[str, tuple[str, Any, str]] = {
    "a decoder": ("tokenizer_config", {"added_tokens_decoder": {
        "901": {"content": "<|im_start|>", "special": True}, "902": {"content": "<|im_end|>"}}},
        "lacks 2 of the tokens that the files beside it add: '<|im_start|>' 901, '<|im_end|>' 902"),
    "no id": ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "<pad>"}}},
              "lacks 1 of the tokens that the files beside it add: '<pad>'. Write"),
    "another id": ("tokenizer_config", {"added_tokens_decoder": {"7": {"content": "<unk>"}}},
                   "'<unk>' 7, which is 0 there"),
    "a special token": ("special_tokens_map", {"pad_token": {"content": "[PAD]"}}, "'[PAD]'. W"),
    "spelled": ("special_tokens_map", {"pad_token": "[PAD]"}, "'[PAD]'. Write it with them: tra"),
    "many": ("special_tokens_map", {"additional_special_tokens": ["<a>", {"content": "<b>"}]},
             "'<a>', '<b>'"),
    "named": ("tokenizer_config", {"extra_special_tokens": {"image": "<image>"}}, "'<image>'"),
    "an old list": ("added_tokens", {"[PAD]": 32000}, "'[PAD]' 32000"),
    "in the vocabulary only": ("added_tokens", {"a": 65}, "'a' 65"),
    "a hundred": ("added_tokens", {f"<{n}>": n for n in range(100)}, "lacks 100 of"),
    "no object": ("added_tokens", [], "must be a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_tokens_that_the_file_lacks(tmp_path: Path, name: str) -> None:
    """A tokenizer.json alone is right without its neighbours, and wrong with them."""
    file, content, says = BESIDE[name]
    folder = folder_of(tmp_path, **{file: content})
    with pytest.raises(SchemaError) as caught:
        load_tokenizer(folder / "tokenizer.json", None)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200
    (folder / f"{file}.json").unlink()
    load_tokenizer(folder / "tokenizer.json", None)


def test_tokens_that_the_file_has(tmp_path: Path) -> None:
    known = ids_of(tmp_path)
    folder = folder_of(
        tmp_path,
        tokenizer_config={
            "added_tokens_decoder": {str(i): {"content": name} for name, i in known.items()},
            "bos_token": "<|endoftext|>", "eos_token": None, "add_bos_token": True,
            "additional_special_tokens": ["<wide>"], "model_max_length": 8,
            "extra_special_tokens": {}, "split_special_tokens": False,
        },
        special_tokens_map={"unk_token": {"content": "<unk>"}, "pad_token": None},
        added_tokens=known,
    )  # fmt: skip
    read = load_tokenizer(find_tokenizer(folder), None)
    assert read.vocabulary == library("bytes").get_vocab_size()


FOLDERS: dict[str, tuple[list[str], str, str]] = {
    "nothing": ([], "", "has no tokenizer.json. Give the folder or the file that has it"),
    "sentencepiece": (["tokenizer.model"], "", "has no tokenizer.json, but tokenizer.model. Make"),
    "sentencepiece itself": (["tokenizer.model"], "tokenizer.model",
                             "is no tokenizer.json. Make one: transformers.AutoTokenizer.from_pre"),
    "a model by another name": (["m.model"], "m.model", "is no tokenizer.json. Make one"),
    "of many names": (["sentencepiece.bpe.model", "qwen.tiktoken"], "",
                      "but sentencepiece.bpe.model, qwen.tiktoken. Make one"),
    "vocabulary and merges": (["vocab.json", "merges.txt"], "", "but vocab.json, merges.txt. Make"),
    "vocabulary": (["vocab.json", "merges.txt"], "vocab.json", "is no tokenizer.json. Make one"),
    "words": (["vocab.txt"], "vocab.txt", "is no tokenizer.json. Make one"),
    "its configuration": (["tokenizer.json", "tokenizer_config.json"], "tokenizer_config.json",
                          "is no tokenizer.json. Give "),
    "the vocabulary beside it": (["tokenizer.json", "tokenizer.model"], "tokenizer.model",
                                 "is no tokenizer.json. Give "),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_tokenizer_json(tmp_path: Path, name: str) -> None:
    files, given_as, says = FOLDERS[name]
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(SchemaError) as caught:
        build_corpus([tmp_path / "a.txt"], tmp_path / given_as)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_large_weights_file_is_no_tokenizer(tmp_path: Path) -> None:
    """It is told by its first bytes, not by its length."""
    with (tmp_path / "w.h5").open("wb") as file:
        file.write(b"\x89HDF\r\n\x1a\n")
        file.truncate(1 << 29)
    with pytest.raises(SchemaError, match="is an HDF5 file, which has no tokenizer"):
        load_tokenizer(tmp_path / "w.h5", None)


def test_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    library("bytes").save(str(tmp_path / "tokenizer.json"))
    for given_as in ("", "tokenizer.json"):
        made = build_corpus([tmp_path / "a.txt"], tmp_path / given_as)
        assert made.tokens.tolist() == [whole("bytes", "the cat")]
        assert "tokenizer.json" in made.source["made_from"]["inputs"]
    assert find_tokenizer("nowhere/t.json") == Path("nowhere/t.json")


def test_letters_that_vanish_are_said(tmp_path: Path) -> None:
    """Byte-level BPE that was not given all bytes leaves the others out; so does transformers."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    loaded = []
    for alphabet in ([], pre_tokenizers.ByteLevel.alphabet()):
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
        trained(models.BPE(), trainer, pre=level).save(str(tmp_path / "t.json"))
        loaded.append(load_tokenizer(tmp_path / "t.json", None))
    found, whole_bytes = loaded
    assert not whole_bytes.lacks and len(found.lacks) > 100
    for texts in (["the cat", "a\x04b"], ["the \U0005e0f0"]):
        with pytest.warns(UserWarning, match="has no token for .*, which vanishes"):
            encode(found, texts, "x", lambda at: None)
        with pytest.warns(UserWarning, match="has no token for"):
            encode_pairs(found, [("the", texts[-1])], "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(found, ["the cat"], "x", lambda at: None)
        encode(whole_bytes, ["a\x04b"], "x", lambda at: None)


def test_a_panic_of_the_library_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Rust prints lines of its own on the process's stderr before Python hears of it."""

    class PanicException(BaseException):
        """What the library raises."""

    def panic(*_: object, **__: object) -> None:
        os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:1\nnote: run with ...\n")
        raise PanicException("index out of bounds")

    library = SimpleNamespace(encode=panic, encode_batch=panic, encode_batch_fast=panic)
    broken = tokenizer.Tokenizer(library, (), (), 8, {})
    for use in (
        lambda: encoding.encode(broken, ["a"], "a.txt", lambda done: None),
        lambda: encoding.encode(broken, ["a b " * PIECE], "a.txt", lambda done: None),
        lambda: encode_pairs(broken, [("a", "b")], "p.jsonl"),
    ):
        with pytest.raises(SchemaError, match=r"cannot use the tokenizer.*: index out of bounds"):
            use()
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"
