"""The tokenizer that a GGUF file describes, as an object of the library tokenizers.

GGUF names the kind (`tokenizer.ggml.model`) and, for byte-level BPE, how texts are cut into words
(`tokenizer.ggml.pre`). Each name is built here or refused: another cut gives other ids in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from refcurv.files.gguf.reading import Contents, open_gguf
from refcurv.files.ids import WHO
from refcurv.files.paths import PathLike
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of

_KEY: Final = "tokenizer.ggml."
_CONTROL, _USER = 3, 4
"""The types of special tokens and of those that a user defined."""

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGIT: Final = r"\p{N}"

_CUTS: Final = {
    (_GPT2,): "gpt-2 phi-2 olmo mpt jais",
    (_DIGIT, _GPT2): "smollm starcoder refact codeshell command-r",
    (_LLAMA3,): "llama3 llama-v3 llama-bpe falcon3 pixtral dbrx smaug-bpe",
    (_QWEN2,): "qwen2 deepseek-r1-qwen megrez stablelm2",
}
PRE: Final = {name: cuts for cuts, names in _CUTS.items() for name in names.split()}
"""Pre-tokenizer → the patterns that cut a text, one after another."""

_WHOLE_WORDS: Final = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")
"""Pre-tokenizers of Llama 3: a word of the vocabulary is one token, and a text begins with BOS."""

_COMPOSED: Final = ("qwen2", "olmo")
"""Pre-tokenizers of tokenizers that compose letters first (NFC); GGUF does not say it."""

_STRIPPED: Final = ("phi3",)
_KEPT: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Architectures whose special tokens take the space behind them along, all but these."""

_LONGEST: Final = 4096
"""Chosen: letters of a token. A token is looked up at each cut, and published ones have 256."""

_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
_NO_PREFIX: Final = ("gemma", "gemma2", "gemma3")


def gguf_tokenizer(given: PathLike) -> Any:
    """A tokenizers.Tokenizer with what is put before and behind a text as its post-processor.

    Definition
        gpt2: byte-level BPE with the file's merges, after the cuts that its pre-tokenizer names.
        GGUF does not say whether letters are composed first (NFC). Here they are where the
        pre-tokenizer is of Qwen or of OLMo, or the architecture GPT-NeoX, whose tokenizers do it.
        llama: SentencePiece's BPE. Two neighbours become a token if their join is one; the join
        of the best score comes first. A character that is no token becomes its bytes. GGUF does
        not say whether a word directly behind a special token has a space of its own. Here it has
        none, as with transformers' legacy=False, but for Phi-3. Nor does it say whether a special
        token takes the space behind it along. Phi-3's do, but for <s>, <unk> and <|endoftext|>.

    Raises:
        ConventionError: a kind or a pre-tokenizer that is not built, tokens that occur twice.
        SchemaError: lists of unequal lengths, ids outside the vocabulary.

    Proof: tests/test_gguf_tokenizer.py::test_ids_are_those_of_the_tokenizer_that_was_written,
        ::test_a_word_behind_a_special_token_has_no_space_of_its_own,
        ::test_letters_are_composed_where_the_tokenizer_that_was_written_did
    """
    found = open_gguf(given)
    kind = found.get(f"{_KEY}model")
    if kind not in ("gpt2", "llama"):
        raise ConventionError(
            f"{WHO}: {found.where}: tokenizer.ggml.model is {kind!r:.40}, which is not built; "
            "built are gpt2 and llama."
        )
    tokens = _list(found, "tokens", str)
    library = _byte_level(found, tokens) if kind == "gpt2" else _sentence_pieces(found, tokens)
    _add_special(found, library, tokens)
    _put_around(found, library, tokens, kind)
    return library


def _list(found: Contents, name: str, kind: type, count: int | None = None) -> list[Any]:
    values = found.get(_KEY + name)
    if not isinstance(values, list) or not values or not all(type(x) is kind for x in values):
        raise SchemaError(f"{WHO}: {found.where} has no list {_KEY}{name} of {kind.__name__}.")
    if count not in (None, len(values)):
        raise SchemaError(
            f"{WHO}: {found.where}: {_KEY}{name} has "
            f"{number_of(len(values), 'item')} for {number_of(int(count), 'token')}."
        )
    return values


def _flag(found: Contents, name: str) -> bool | None:
    """A key that is true, false or not there; no text, for "no" would be true."""
    value = found.get(_KEY + name)
    if value is None or type(value) is bool:
        return value
    raise SchemaError(f"{WHO}: {found.where}: {_KEY}{name} is {value!r:.40}, not true or false.")


def _vocabulary(found: Contents, spelled: Sequence[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(spelled)}
    if len(ids) != len(spelled):
        twice = next(t for i, t in enumerate(spelled) if ids[t] != i)
        raise ConventionError(f"{WHO}: {found.where} has the token {twice!r:.60} twice.")
    return ids


# ------------------------------------------------------------------ byte-level BPE


def _byte_level(found: Contents, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = found.get(f"{_KEY}pre")
    if pre not in PRE:
        raise ConventionError(
            f"{WHO}: {found.where}: tokenizer.ggml.pre is {pre!r:.40}, which is not built; "
            f"built are {', '.join(sorted(PRE))}."
        )
    for key in ("add_space_prefix", "remove_extra_whitespaces"):
        if _flag(found, key):
            raise ConventionError(f"{WHO}: {found.where}: {_KEY}{key} is not built for BPE.")
    merges = [tuple(merge.split(" ")) for merge in _list(found, "merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise SchemaError(f"{WHO}: {found.where} has a merge of other than two tokens.")
    library = Tokenizer(
        models.BPE(
            _vocabulary(found, tokens), merges, fuse_unk=False, ignore_merges=pre in _WHOLE_WORDS
        )
    )
    if pre in _COMPOSED or found.get("general.architecture") == "gptneox":
        library.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE[pre]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    library.decoder = decoders.ByteLevel()
    return library


# ------------------------------------------------------------------ SentencePiece


def _sentence_pieces(found: Contents, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if found.get(_KEY + key):
            raise ConventionError(f"{WHO}: {found.where}: {_KEY}{key} is not built.")
    architecture = found.get("general.architecture")
    scores = _list(found, "scores", float, len(tokens))
    if not np.isfinite(scores).all():  # NaN has no place in an order
        raise SchemaError(f"{WHO}: {found.where}: {_KEY}scores hold NaN or infinity.")
    if (longest := max(map(len, tokens))) > _LONGEST:
        raise SchemaError(f"{WHO}: {found.where} has a token of {longest} letters.")
    if architecture in _NO_PREFIX:  # their scores do not follow the order of merges; places do
        tokens = ["\u2581" * len(t) if " " in t and not t.strip(" ") else t for t in tokens]
        scores = [-float(i) for i in range(len(tokens))]
    ids = _vocabulary(found, tokens)
    lacking = [byte for byte in _BYTES if byte not in ids]
    if lacking:
        raise ConventionError(
            f"{WHO}: {found.where} has no token for {len(lacking)} of the 256 bytes, such as "
            f"{lacking[0]}; a letter that is no token would vanish."
        )
    unknown = found.get(f"{_KEY}unknown_token_id")
    library = Tokenizer(
        models.BPE(
            ids,
            _merges(ids, scores),
            unk_token=tokens[unknown] if _is_id(unknown, tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(found, "add_space_prefix")
    prefix = architecture not in _NO_PREFIX if prefix is None else prefix
    if architecture == "phi3" and prefix:
        library.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    elif prefix:
        library.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="\u2581", prepend_scheme="first", split=False
        )
    else:
        library.normalizer = normalizers.Replace(" ", "\u2581")
    return library


def _merges(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into one, the best score of the join first.

    Of joins of equal score the longer left token comes first, then the longer right one.
    """
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((scores[i], len(left), len(right), left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


# ------------------------------------------------------------------ special tokens


def _is_id(value: object, tokens: Sequence[str]) -> bool:
    return type(value) is int and 0 <= value < len(tokens)


def _add_special(found: Contents, library: Any, tokens: list[str]) -> None:
    """Control and user-defined tokens stay whole wherever they stand in a text."""
    from tokenizers import AddedToken

    if f"{_KEY}token_type" not in found.fields:
        raise SchemaError(f"{WHO}: {found.where} has no list {_KEY}token_type.")
    types = _list(found, "token_type", int, len(tokens))
    strips = found.get(f"{_KEY}model") == "llama" and (
        found.get("general.architecture") in _STRIPPED
    )
    special = [
        AddedToken(t, normalized=False, special=True, rstrip=strips and t not in _KEPT)
        for t, one in zip(tokens, types, strict=True)
        if one == _CONTROL
    ]
    plain = [AddedToken(t, normalized=False, special=False)
             for t, one in zip(tokens, types, strict=True)
             if one == _USER and library.token_to_id(t) is not None]  # fmt: skip
    library.add_special_tokens(special)
    library.add_tokens(plain)
    if library.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise SchemaError(f"{WHO}: {found.where} has special tokens outside its vocabulary.")


def _put_around(found: Contents, library: Any, tokens: list[str], kind: str) -> None:
    """BOS before and EOS behind each text, where the file says so."""
    from tokenizers import processors

    usual = {"bos": kind == "llama" or found.get(f"{_KEY}pre") in _WHOLE_WORDS, "eos": False}
    ends = {}
    for name, default in usual.items():
        wanted, i = _flag(found, f"add_{name}_token"), found.get(f"{_KEY}{name}_token_id")
        if default if wanted is None else wanted:
            if not _is_id(i, tokens):
                raise SchemaError(f"{WHO}: {found.where}: {_KEY}{name}_token_id is {i!r:.40}.")
            ends[name] = {"id": name, "ids": [i], "tokens": [tokens[i]]}
    if ends:  # by names of its own: a token may be spelled as the library spells a text, "$A"
        single = [name for name in ("bos", "$A", "eos") if name in ("$A", *ends)]
        library.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[*ends.values()]
        )
